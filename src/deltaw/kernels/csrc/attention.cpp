// Causal attention over examples that lie end to end, forward and backward; ops/attention.py says what is computed.
//
// A task is an example and a key/value head, with all query heads of the group or one of them. Its keys and values are
// packed once for the products (gemm.h); then queries go by tiles of 6 rows, over keys in panels of 64. Panels that a
// tile can't see are never touched. Products are block by block, everything else is in float32:
//   forward   S = q·kᵀ, softmax with the largest score and the sum so far (Milakov & Gimelshein 2018), o += P·v
//   backward  S again, dP = dO·vᵀ, dS = P∘(dP - rowsum(dO∘O)), dV += Pᵀ·dO, dK += dSᵀ·q, dQ += dS·k
// Sums are taken in an order that depends on shapes alone: any number of threads gives the same bits.
#include "gemm.h"

namespace {

constexpr int64_t FORWARD_KEYS = 512;   // keys whose scores are held at once
constexpr int64_t BACKWARD_KEYS = 256;
constexpr int64_t BACKWARD_ROWS = 96;   // a multiple of TILE and of 2
constexpr float LOG2_E = 1.44269504f;

// 2^x to about one unit in the last place; below -126 gives 0, NaN stays NaN. x is at most a little above 0 here.
static inline f32x16 exp2_16(f32x16 x) {
    __mmask16 keeps = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
    f32x16 n = (f32x16)_mm512_maskz_roundscale_ps(keeps, (__m512)x, 0);
    f32x16 r = x - n;
    f32x16 p = splat(1.327647129e-3f);
    p = p * r + 9.675540961e-3f;
    p = p * r + 5.550713092e-2f;
    p = p * r + 2.402212024e-1f;
    p = p * r + 6.931469440e-1f;
    p = p * r + 1.0f;
    return (f32x16)_mm512_maskz_scalef_ps(keeps, (__m512)p, (__m512)n);
}

// `outside` in the lanes that don't stand for a key from `first` to before `last`; lane 0 stands for `at`.
static inline f32x16 only(f32x16 v, int64_t at, int64_t first, int64_t last, float outside) {
    if (at >= first && at + 16 <= last) return v;
    const i32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    int32_t from = (int32_t)most(least(first - at, 16), 0), to = (int32_t)most(least(last - at, 16), 0);
    return (lane >= from) & (lane < to) ? v : splat(outside);
}

// 16 floats into a row of words; and those of two rows, as words that step from one row to the other.
template <int64_t P> static inline void store_row(word* to, int64_t column, f32x16 v) {
    if (P == 2)
        store16((bf16*)to + column, v);
    else
        store_words(to + column, v);
}

template <int64_t P> static inline void store_two_rows(word* to, int64_t stride, f32x16 even, f32x16 odd) {
    if (P == 2) {
        u32x16 low = widened(to_bf16(even)), high = widened(to_bf16(odd));
        store_words(to, (f32x16)(low | high << 16));
    } else {
        store_words(to, even);
        store_words(to + stride, odd);
    }
}

// Memory handed out piece by piece, each on a line of its own; from 0 it is only counted.
struct Scratch {
    uintptr_t at;
    float* take(int64_t n) {
        float* piece = (float*)at;
        at += (uintptr_t)round_up(n * 4, 64);
        return piece;
    }
    word* take_words(int64_t n) { return (word*)take(n); }
};

struct Example {
    int64_t first, length;
};

struct Sizes {
    int64_t tokens, heads, groups, size, v_size;  // T, N, G, D, D of v
    int64_t window;                               // larger than any example: none
    int64_t parts;                                // tasks that share a key/value head: 1, or a query head each
    float scaling;

    int64_t heads_of_part() const { return heads / groups / parts; }
    // The first key that a row sees.
    int64_t first_key(int64_t row) const { return most(0, row - window + 1); }
};

template <class T> struct View {  // [T, heads, D]
    T* at;
    int64_t token, head;
    T* row(int64_t t, int64_t h) const { return at + t * token + h * head; }
};

struct Task {
    Example example;
    int64_t group, part, first_head, last_head;
};

static inline Task task_at(const Sizes& z, const Example* examples, int64_t i) {
    int64_t per_example = z.groups * z.parts, group = i % per_example / z.parts, part = i % z.parts;
    int64_t first = group * (z.heads / z.groups) + part * z.heads_of_part();
    return {examples[i / per_example], group, part, first, first + z.heads_of_part()};
}

// --- forward ---

template <class T> struct Forward {
    static constexpr int64_t P = PAIR<T>;
    word *k_columns, *v_steps, *rows_of_16, *q, *p;
    float *s, *o;

    Forward(const Sizes& z, int64_t longest, Scratch& scratch) {
        int64_t keys = round_up(longest, PANEL);
        k_columns = scratch.take_words(keys * padded_words<T>(z.size));
        v_steps = scratch.take_words(keys / P * round_up(z.v_size, PANEL));
        rows_of_16 = scratch.take_words(16 * padded_words<T>(z.size));
        q = scratch.take_words(TILE * padded_words<T>(z.size));
        p = scratch.take_words(TILE * FORWARD_KEYS / P);
        s = scratch.take(TILE * FORWARD_KEYS);
        o = scratch.take(TILE * round_up(z.v_size, 16));
    }

    // Scores of one row become P; gives what the sums so far have to be multiplied with.
    float soften(int64_t i, int64_t begin, int64_t end, int64_t first, int64_t last, float scale, float& top,
                 float& total) {
        float* row = s + i * FORWARD_KEYS;
        f32x16 highest = splat(top);
        for (int64_t at = begin; at < end; at += 16) {
            f32x16 v = only(load16(row + at - begin) * scale, at, first, last, -__builtin_inff());
            store16(row + at - begin, v);
            highest = max16(v, highest);
        }
        float now = max16(highest), shift = now == -__builtin_inff() ? 0.0f : now;
        f32x16 sums = {};
        for (int64_t at = begin; at < end; at += 16) {
            f32x16 e = exp2_16(load16(row + at - begin) - shift);
            sums += e;
            store_row<P>(p + i * (FORWARD_KEYS / P), at - begin, e);
        }
        float keeps = exp2_16(splat(top - shift))[0];
        total = total * keeps + sum16(sums);
        top = now;
        return keeps;
    }

    void run(const Sizes& z, const Task& task, View<const T> q_view, View<const T> k_view, View<const T> v_view,
             View<T> o_view, float* stats) {
        auto [first, length] = task.example;
        int64_t keys = round_up(length, PANEL), width = padded_words<T>(z.size), o_width = round_up(z.v_size, 16);
        pack_columns(k_columns, k_view.row(first, task.group), k_view.token, length, z.size, rows_of_16);
        pack_steps(v_steps, v_view.row(first, task.group), v_view.token, length, keys, z.v_size);
        float scale = z.scaling * LOG2_E;
        for (int64_t head = task.first_head; head < task.last_head; head++)
            for (int64_t r = 0; r < length; r += TILE) {
                int64_t rows = least(TILE, length - r), end = r + rows;
                float top[TILE], total[TILE] = {}, keeps[TILE];
                for (float& value : top) value = -__builtin_inff();
                pack_rows(q, q_view.row(first + r, head), q_view.token, rows, rows, z.size);
                int64_t oldest = z.first_key(r) / PANEL * PANEL;
                for (int64_t begin = oldest; begin < end; begin += FORWARD_KEYS) {
                    int64_t stop = least(begin + FORWARD_KEYS, end), columns = round_up(stop - begin, 16);
                    multiply<P>(q, width, 1, k_columns + begin * width, PANEL * width, s, FORWARD_KEYS, rows, columns,
                                words<T>(z.size), false);
                    for (int64_t i = 0; i < rows; i++)
                        keeps[i] = soften(i, begin, begin + columns, z.first_key(r + i), r + i + 1, scale, top[i],
                                          total[i]);
                    if (begin > oldest)
                        for (int64_t i = 0; i < rows; i++)
                            for (int64_t j = 0; j < o_width; j += 16)
                                store16(o + i * o_width + j, load16(o + i * o_width + j) * keeps[i]);
                    multiply<P>(p, FORWARD_KEYS / P, 1, v_steps + begin / P * PANEL, keys / P * PANEL, o, o_width, rows,
                                z.v_size, words<T>(stop - begin), begin > oldest);
                }
                for (int64_t i = 0; i < rows; i++) {
                    float inverse = 1.0f / total[i];
                    float* saved = stats + 2 * (head * z.tokens + first + r + i);
                    saved[0] = top[i], saved[1] = inverse;
                    T* to = o_view.row(first + r + i, head);
                    for_each16(z.v_size, [&](int64_t j, int64_t m) {
                        store_some(to + j, load16(o + i * o_width + j) * inverse, m);
                    });
                }
            }
    }
};

// --- backward ---

template <class T> struct Backward {
    static constexpr int64_t P = PAIR<T>, ROWS = BACKWARD_ROWS, LD = BACKWARD_KEYS + 16;  // an odd number of lines
    word *k_columns, *k_steps, *v_columns, *rows_of_16;    // of the example
    word *q_rows, *q_steps, *do_rows, *do_steps;           // of a block of rows
    word *p_pairs, *ds_pairs, *ds_rows;                    // of a block of rows, a block of keys
    float *dk, *dv, *dq, *delta, *s, *dp;

    Backward(const Sizes& z, int64_t longest, Scratch& scratch) {
        int64_t keys = round_up(longest, PANEL), width = padded_words<T>(z.size), v_width = padded_words<T>(z.v_size);
        int64_t steps = round_up(z.size, PANEL), v_steps = round_up(z.v_size, PANEL);
        k_columns = scratch.take_words(keys * width);
        k_steps = scratch.take_words(keys / P * steps);
        v_columns = scratch.take_words(keys * v_width);
        rows_of_16 = scratch.take_words(16 * most(width, v_width));
        q_rows = scratch.take_words(ROWS * width);
        q_steps = scratch.take_words(ROWS / P * steps);
        do_rows = scratch.take_words(ROWS * v_width);
        do_steps = scratch.take_words(ROWS / P * v_steps);
        p_pairs = scratch.take_words(ROWS / P * LD);
        ds_pairs = scratch.take_words(ROWS / P * LD);
        ds_rows = P == 2 ? scratch.take_words(ROWS * LD / 2) : ds_pairs;
        dk = scratch.take(keys * round_up(z.size, 16));
        dv = scratch.take(keys * round_up(z.v_size, 16));
        dq = scratch.take(ROWS * round_up(z.size, 16));
        delta = scratch.take(ROWS);
        s = scratch.take(TILE * PANEL);
        dp = scratch.take(TILE * PANEL);
    }

    // P and dS of a tile of rows (from row r of the example, row i of the block) and a panel of keys (from key j,
    // column c of the block); zero where a row doesn't see a key, and in rows that the example hasn't.
    void soften(const Sizes& z, int64_t r, int64_t i, int64_t j, int64_t c, int64_t rows, int64_t vectors,
                const float* stats) {
        float scale = z.scaling * LOG2_E;
        for (int64_t m = 0; m < TILE; m += 2) {
            word *p_to = p_pairs + (i + m) / P * LD + c, *ds_to = ds_pairs + (i + m) / P * LD + c;
            for (int64_t v = 0; v < PANEL / 16; v++) {
                f32x16 p[2] = {}, ds[2] = {};
                if (v < vectors)
                    for (int64_t odd = 0; odd < 2; odd++) {
                        int64_t row = m + odd;
                        if (row >= rows) continue;
                        const float *saved = stats + 2 * row, *s_at = s + row * PANEL + 16 * v;
                        f32x16 e = exp2_16(load16(s_at) * scale - saved[0]) * saved[1];
                        p[odd] = only(e, j + 16 * v, z.first_key(r + row), r + row + 1, 0.0f);
                        ds[odd] = p[odd] * (load16(dp + row * PANEL + 16 * v) - delta[i + row]);
                    }
                store_two_rows<P>(p_to + 16 * v, LD, p[0], p[1]);
                store_two_rows<P>(ds_to + 16 * v, LD, ds[0], ds[1]);
                if (P == 2)
                    for (int64_t odd = 0; odd < 2; odd++)
                        store_row<P>(ds_rows + (i + m + odd) * (LD / 2), c + 16 * v, ds[odd]);
            }
        }
    }

    // Tiles of the block from row r that see keys of the panel from key j: from..to in rows of the block.
    static void seen(const Sizes& z, int64_t r, int64_t rows, int64_t j, int64_t& from, int64_t& to) {
        from = j <= r ? 0 : (j - r) / TILE * TILE;
        to = rows;
        while (to > from && z.first_key(r + (to - 1) / TILE * TILE) >= j + PANEL) to = (to - 1) / TILE * TILE;
        to = round_up(to, TILE);
    }

    void block(const Sizes& z, int64_t r, int64_t rows, int64_t begin, int64_t stop, const float* stats, bool add) {
        int64_t width = padded_words<T>(z.size), v_width = padded_words<T>(z.v_size);
        int64_t k_width = round_up(z.size, 16), dv_width = round_up(z.v_size, 16), from, to;
        for (int64_t j = begin; j < stop; j += PANEL) {
            seen(z, r, rows, j, from, to);
            for (int64_t i = from; i < to; i += TILE) {
                int64_t vectors = (least(PANEL, least(r + i + TILE, stop) - j) + 15) / 16;
                multiply_tile<P>(q_rows + i * width, width, 1, k_columns + j * width, s, PANEL, TILE, words<T>(z.size),
                                 vectors, false);
                multiply_tile<P>(do_rows + i * v_width, v_width, 1, v_columns + j * v_width, dp, PANEL, TILE,
                                 words<T>(z.v_size), vectors, false);
                soften(z, r + i, i, j, j - begin, least(TILE, rows - i), vectors, stats + 2 * i);
            }
            for (int64_t n = j; n < least(j + PANEL, stop); n += TILE) {
                int64_t keys = least(TILE, j + PANEL - n), i = most(from, n - r), steps = (to - i) / P;
                if (steps <= 0) continue;
                const word *p = p_pairs + i / P * LD + n - begin, *ds = ds_pairs + i / P * LD + n - begin;
                multiply<P>(p, 1, LD, do_steps + i / P * PANEL, ROWS / P * PANEL, dv + n * dv_width, dv_width, keys,
                            z.v_size, steps, true);
                multiply<P>(ds, 1, LD, q_steps + i / P * PANEL, ROWS / P * PANEL, dk + n * k_width, k_width, keys,
                            z.size, steps, true);
            }
        }
        int64_t all_steps = steps_of_keys * PANEL;
        for (int64_t i = 0; i < rows; i += TILE) {
            // Panels that this tile sees; the others' places in the buffer hold nothing of its own.
            int64_t first = most(begin, z.first_key(r + i) / PANEL * PANEL), last = least(stop, r + i + TILE);
            float* to_dq = dq + i * k_width;
            if (first < last)
                multiply<P>(ds_rows + (i * LD + first - begin) / P, LD / P, 1, k_steps + first / P * PANEL, all_steps,
                            to_dq, k_width, TILE, z.size, words<T>(last - first), add);
            else if (!add)
                memset(to_dq, 0, (size_t)(TILE * k_width) * 4);
        }
    }
    int64_t steps_of_keys;

    void run(const Sizes& z, const Task& task, View<const T> q_view, View<const T> k_view, View<const T> v_view,
             View<const T> o_view, View<const T> do_view, View<T> dq_view, const float* stats) {
        auto [first, length] = task.example;
        int64_t keys = round_up(length, PANEL), k_width = round_up(z.size, 16);
        steps_of_keys = keys / P;
        pack_columns(k_columns, k_view.row(first, task.group), k_view.token, length, z.size, rows_of_16);
        pack_columns(v_columns, v_view.row(first, task.group), v_view.token, length, z.v_size, rows_of_16);
        pack_steps(k_steps, k_view.row(first, task.group), k_view.token, length, keys, z.size);
        memset(dk, 0, (size_t)(keys * k_width) * 4);
        memset(dv, 0, (size_t)(keys * round_up(z.v_size, 16)) * 4);
        for (int64_t head = task.first_head; head < task.last_head; head++)
            for (int64_t r = 0; r < length; r += ROWS) {
                int64_t rows = least(ROWS, length - r), padded = round_up(rows, TILE), t = first + r;
                const T *q = q_view.row(t, head), *d_o = do_view.row(t, head);
                pack_rows(q_rows, q, q_view.token, rows, padded, z.size);
                pack_rows(do_rows, d_o, do_view.token, rows, padded, z.v_size);
                pack_steps(q_steps, q, q_view.token, rows, ROWS, z.size);
                pack_steps(do_steps, d_o, do_view.token, rows, ROWS, z.v_size);
                for (int64_t i = 0; i < rows; i++) {
                    const T *o = o_view.row(t + i, head), *grad = do_view.row(t + i, head);
                    prefetch_row(o, o_view.token, z.v_size);
                    f32x16 sums = {};
                    for_each16(z.v_size, [&](int64_t c, int64_t m) {
                        sums += load_some(o + c, m) * load_some(grad + c, m);
                    });
                    delta[i] = sum16(sums);
                }
                int64_t oldest = z.first_key(r) / PANEL * PANEL;
                for (int64_t begin = oldest; begin < r + rows; begin += BACKWARD_KEYS)
                    block(z, r, rows, begin, least(begin + BACKWARD_KEYS, r + rows), stats + 2 * (head * z.tokens + t),
                          begin > oldest);
                write(dq_view.row(t, head), dq_view.token, dq, rows, z.size, z.scaling);
            }
    }

    template <class To>
    static void write(To* to, int64_t stride, const float* from, int64_t rows, int64_t n, float factor) {
        for (int64_t i = 0; i < rows; i++, to += stride, from += round_up(n, 16))
            for_each16(n, [&](int64_t j, int64_t m) { store_some(to + j, load16(from + j) * factor, m); });
    }
};

// Sums of the parts, [parts, G, T, n], as one.
template <class T> void add_parts(const Sizes& z, const float* parts, View<T> to, int64_t n, float factor) {
    parallel_for(z.tokens, 16, [=](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; t++)
            for (int64_t g = 0; g < z.groups; g++)
                for_each16(n, [&](int64_t j, int64_t m) {
                    f32x16 sum = {};
                    for (int64_t part = 0; part < z.parts; part++)
                        sum += load_some(parts + ((part * z.groups + g) * z.tokens + t) * n + j, m);
                    store_some(to.row(t, g) + j, sum * factor, m);
                });
    });
}

template <class Work> int64_t bytes_a_thread(const Sizes& z, int64_t longest) {
    Scratch counted{0};
    Work work(z, longest, counted);
    return (int64_t)counted.at;
}

// What to hand over as scratch, in bytes: forward's and backward's.
template <class T> void scratch_sizes(int64_t* bytes, const Sizes& z, int64_t longest) {
    int64_t parts = z.parts > 1 ? z.parts * z.groups * z.tokens * (z.size + z.v_size) * 4 + 128 : 0;
    bytes[0] = bytes_a_thread<Forward<T>>(z, longest) * num_threads() + 64;
    bytes[1] = bytes_a_thread<Backward<T>>(z, longest) * num_threads() + 64 + parts;
}

template <class Work> Work for_thread(const Sizes& z, int64_t longest, void* scratch, int thread) {
    Scratch own{(uintptr_t)round_up((int64_t)scratch, 64) + (uintptr_t)(bytes_a_thread<Work>(z, longest) * thread)};
    return Work(z, longest, own);
}

template <class T>
void forward(const Sizes& z, const Example* examples, int64_t num_examples, View<const T> q, View<const T> k,
             View<const T> v, View<T> o, float* stats, void* scratch) {
    int64_t longest = examples[0].length;
    parallel_tasks(num_examples * z.groups * z.parts, [=](int64_t i, int thread) {
        Forward<T> work = for_thread<Forward<T>>(z, longest, scratch, thread);
        work.run(z, task_at(z, examples, i), q, k, v, o, stats);
    });
}

template <class T>
void backward(const Sizes& z, const Example* examples, int64_t num_examples, View<const T> q, View<const T> k,
              View<const T> v, View<const T> o, View<const T> d_o, const float* stats, View<T> dq, View<T> dk,
              View<T> dv, void* scratch) {
    int64_t longest = examples[0].length, of_threads = bytes_a_thread<Backward<T>>(z, longest) * num_threads();
    Scratch after{(uintptr_t)round_up((int64_t)scratch, 64) + (uintptr_t)of_threads};
    float* dk_parts = after.take(z.parts > 1 ? z.parts * z.groups * z.tokens * z.size : 0);
    float* dv_parts = after.take(0);
    parallel_tasks(num_examples * z.groups * z.parts, [=](int64_t i, int thread) {
        Backward<T> work = for_thread<Backward<T>>(z, longest, scratch, thread);
        Task task = task_at(z, examples, i);
        auto [first, length] = task.example;
        work.run(z, task, q, k, v, o, d_o, dq, stats);
        if (z.parts > 1) {
            int64_t row = (task.part * z.groups + task.group) * z.tokens + first;
            work.write(dk_parts + row * z.size, z.size, work.dk, length, z.size, 1.0f);
            work.write(dv_parts + row * z.v_size, z.v_size, work.dv, length, z.v_size, 1.0f);
        } else {
            work.write(dk.row(first, task.group), dk.token, work.dk, length, z.size, z.scaling);
            work.write(dv.row(first, task.group), dv.token, work.dv, length, z.v_size, 1.0f);
        }
    });
    if (z.parts > 1) {
        add_parts(z, dk_parts, dk, z.size, z.scaling);
        add_parts(z, dv_parts, dv, z.v_size, 1.0f);
    }
}

}  // namespace

// Sizes and strides come as a list: sizes are T, N, G, D, D of v, window, parts; strides are two a tensor, token and
// head, in numbers. Examples are (first token, length), the longest first.
#define SIZES {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6], scaling}
#define VIEW(x, i) {x, strides[2 * (i)], strides[2 * (i) + 1]}

#define FOR_DTYPE(suffix, T)                                                                                          \
    EXPORT void deltaw_attention_scratch_##suffix(int64_t* bytes, const int64_t* sizes, int64_t longest) {            \
        float scaling = 1.0f;                                                                                         \
        scratch_sizes<T>(bytes, SIZES, longest);                                                                      \
    }                                                                                                                 \
    EXPORT void deltaw_attention_##suffix(const T* q, const T* k, const T* v, T* o, float* stats,                     \
                                          const int64_t* sizes, const int64_t* strides, const Example* examples,      \
                                          int64_t num_examples, float scaling, void* scratch) {                       \
        forward<T>(SIZES, examples, num_examples, VIEW(q, 0), VIEW(k, 1), VIEW(v, 2), VIEW(o, 3), stats, scratch);    \
    }                                                                                                                 \
    EXPORT void deltaw_attention_backward_##suffix(const T* q, const T* k, const T* v, const T* o, const T* d_o,      \
                                                   const float* stats, T* dq, T* dk, T* dv, const int64_t* sizes,     \
                                                   const int64_t* strides, const Example* examples,                   \
                                                   int64_t num_examples, float scaling, void* scratch) {              \
        backward<T>(SIZES, examples, num_examples, VIEW(q, 0), VIEW(k, 1), VIEW(v, 2), VIEW(o, 3), VIEW(d_o, 4),      \
                    stats, VIEW(dq, 5), VIEW(dk, 6), VIEW(dv, 7), scratch);                                           \
    }

FOR_DTYPE(f32, float)
FOR_DTYPE(bf16, bf16)
