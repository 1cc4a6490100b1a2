// What stands between the products, each in one pass over its rows: RMS norm, gated activations, rotary positions,
// the softmax of a loss. Arithmetic is in float32; results are rounded once, or where torch's own operations round.
#include "common.h"

namespace {

constexpr int64_t GRAIN_BYTES = 32 * 1024;  // less than this is not worth another thread

int64_t grain(int64_t row_bytes) { return row_bytes > GRAIN_BYTES ? 1 : GRAIN_BYTES / (row_bytes + 1) + 1; }

// --- RMS norm (Zhang & Sennrich 2019): y = w∘x·r with r = 1/sqrt(mean(x²) + eps) ---
// Llama's kind rounds x·r before it multiplies by w; Gemma's multiplies by 1 + w and rounds once.

template <class T>
void rms_norm(const T* x, const T* w, T* y, float* r, int64_t rows, int64_t n, float eps, int64_t adds_one) {
    parallel_for(rows, grain(n * sizeof(T)), [=](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; t++) {
            const T* xt = x + t * n;
            T* yt = y + t * n;
            f32x16 squares = {};
            for_each16(n, [&](int64_t i, int64_t m) {
                f32x16 v = load_some(xt + i, m);
                squares += v * v;
            });
            float scale = 1.0f / __builtin_sqrtf(sum16(squares) / (float)n + eps);
            r[t] = scale;
            for_each16(n, [&](int64_t i, int64_t m) {
                f32x16 v = load_some(xt + i, m) * scale, weight = load_some(w + i, m);
                v = adds_one ? v * (1.0f + weight) : rounded_to(x, v) * weight;
                store_some(yt + i, v, m);
            });
        }
    });
}

// dx = r·(g - x·r²·mean(g∘x)) with g = w∘dy.
template <class T>
void rms_norm_backward(const T* dy, const T* x, const T* w, const float* r, T* dx, int64_t rows, int64_t n,
                       int64_t adds_one) {
    parallel_for(rows, grain(n * sizeof(T)), [=](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; t++) {
            const T *dyt = dy + t * n, *xt = x + t * n;
            T* dxt = dx + t * n;
            f32x16 products = {};
            float one = adds_one ? 1.0f : 0.0f;
            for_each16(n, [&](int64_t i, int64_t m) {
                products += load_some(dyt + i, m) * (load_some(w + i, m) + one) * load_some(xt + i, m);
            });
            float along = sum16(products) / (float)n * r[t] * r[t];
            for_each16(n, [&](int64_t i, int64_t m) {
                f32x16 g = load_some(dyt + i, m) * (load_some(w + i, m) + one);
                store_some(dxt + i, r[t] * (g - load_some(xt + i, m) * along), m);
            });
        }
    });
}

// --- gated activations (Shazeer 2020): p = act(g)∘u; act 0 is SiLU, 1 GELU's tanh form ---

struct Activated {
    f32x16 value, slope;
};

static inline f32x16 sigmoid16(f32x16 x) { return reciprocal16(1.0f + exp16(-x)); }

static inline Activated activate(f32x16 g, int64_t act) {
    if (act == 0) {
        f32x16 s = sigmoid16(g);
        return {g * s, s * (1.0f + g * (1.0f - s))};
    }
    // tanh(v) = 2·sigmoid(2v) - 1
    f32x16 squared = g * g;
    f32x16 v = 0.7978845608f * g * (1.0f + 0.044715f * squared);
    f32x16 h = sigmoid16(2.0f * v);
    f32x16 slope_of_v = 0.7978845608f * (1.0f + 3.0f * 0.044715f * squared);
    return {g * h, h + 2.0f * g * h * (1.0f - h) * slope_of_v};
}

template <class T> void gate(const T* g, const T* u, T* p, int64_t size, int64_t act) {
    parallel_for((size + 15) / 16, grain(16 * sizeof(T)), [=](int64_t begin, int64_t end) {
        int64_t first = begin * 16, last = end * 16 < size ? end * 16 : size;
        for_each16(last - first, [&](int64_t i, int64_t m) {
            i += first;
            f32x16 value = rounded_to(g, activate(load_some(g + i, m), act).value);
            store_some(p + i, value * load_some(u + i, m), m);
        });
    });
}

// dg = dp∘u∘act'(g), du = dp∘act(g); dg and du may lie where g and u lie.
template <class T>
void gate_backward(const T* dp, const T* g, const T* u, T* dg, T* du, int64_t size, int64_t act) {
    parallel_for((size + 15) / 16, grain(16 * sizeof(T)), [=](int64_t begin, int64_t end) {
        int64_t first = begin * 16, last = end * 16 < size ? end * 16 : size;
        for_each16(last - first, [&](int64_t i, int64_t m) {
            i += first;
            f32x16 d = load_some(dp + i, m), up = load_some(u + i, m);
            Activated a = activate(load_some(g + i, m), act);
            store_some(dg + i, d * up * a.slope, m);
            store_some(du + i, d * a.value, m);
        });
    });
}

// --- DoRA's column scale: y = c∘u in place; back, g = c∘dy and the column sums of dy∘y (dc = sums/c) in one pass ---

template <class T> void scale_columns(T* y, const float* c, int64_t rows, int64_t n) {
    parallel_for(rows, grain(n * sizeof(T)), [=](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; t++)
            for_each16(n, [&](int64_t i, int64_t m) {
                T* at = y + t * n + i;
                store_some(at, load_some(at, m) * load_some(c + i, m), m);
            });
    });
}

constexpr int64_t SUM_ROWS = 64;  // that are summed together, whatever the number of threads

// sums is [⌈rows/64⌉, n].
template <class T>
void scale_columns_backward(const T* dy, const T* y, const float* c, T* g, float* sums, int64_t rows, int64_t n) {
    parallel_tasks((rows + SUM_ROWS - 1) / SUM_ROWS, [=](int64_t task, int) {
        float* own = sums + task * n;
        int64_t first = task * SUM_ROWS, last = first + SUM_ROWS < rows ? first + SUM_ROWS : rows;
        memset(own, 0, (size_t)n * sizeof(float));
        for (int64_t t = first; t < last; t++)
            for_each16(n, [&](int64_t i, int64_t m) {
                f32x16 d = load_some(dy + t * n + i, m);
                store_some(g + t * n + i, d * load_some(c + i, m), m);
                store_some(own + i, load_some(own + i, m) + d * load_some(y + t * n + i, m), m);
            });
    });
}

// --- rotary positions (Su et al. 2021, in halves): y = x∘cos + rotate_half(x)∘sin, or its transpose with -sin ---
// x and y are [T, heads, D] with their own strides between tokens and heads; cos and sin are [T, D].

template <class T>
void rotate(const T* x, const T* cos, const T* sin, T* y, int64_t tokens, int64_t heads, int64_t size,
            int64_t x_token, int64_t x_head, int64_t y_token, int64_t y_head, float sign) {
    int64_t half = size / 2;
    parallel_for(tokens, grain(heads * size * sizeof(T)), [=](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; t++) {
            const T *c = cos + t * size, *s = sin + t * size;
            for (int64_t h = 0; h < heads; h++) {
                const T* xt = x + t * x_token + h * x_head;
                T* yt = y + t * y_token + h * y_head;
                for_each16(half, [&](int64_t i, int64_t m) {
                    f32x16 a = load_some(xt + i, m), b = load_some(xt + half + i, m);
                    f32x16 sa = sign * load_some(s + i, m), sb = sign * load_some(s + half + i, m);
                    f32x16 ca = load_some(c + i, m), cb = load_some(c + half + i, m);
                    // forward: (a·c - b·s, b·c + a·s); its transpose takes each half's s from the other's place
                    f32x16 first = sign > 0 ? rounded_to(x, b * sa) : rounded_to(x, b * sb);
                    f32x16 second = sign > 0 ? rounded_to(x, a * sb) : rounded_to(x, a * sa);
                    store_some(yt + i, rounded_to(x, a * ca) - first, m);
                    store_some(yt + half + i, rounded_to(x, b * cb) + second, m);
                });
            }
        }
    });
}

// --- the loss: logits of a block of rows become their gradient, softmax(l) - onehot(target), in place ---

template <class T>
void cross_entropy(T* logits, const int64_t* targets, float* losses, int64_t rows, int64_t n, int64_t wants_grad) {
    parallel_tasks(rows, [=](int64_t t, int) {
        T* l = logits + t * n;
        f32x16 highest = splat(-__builtin_inff());
        for_each16(n, [&](int64_t i, int64_t m) {
            f32x16 v = load_some(l + i, m);
            if (m == 16)
                highest = max16(v, highest);
            else
                for (int j = 0; j < m; j++) highest[0] = v[j] > highest[0] ? v[j] : highest[0];
        });
        float top = max16(highest);
        f32x16 sums = {};
        for_each16(n, [&](int64_t i, int64_t m) {
            f32x16 e = exp16(load_some(l + i, m) - top);
            if (m < 16)
                for (int j = (int)m; j < 16; j++) e[j] = 0;
            sums += e;
        });
        float total = sum16(sums), at_target = load1(l + targets[t]);
        // log(total) is the caller's, who has a logarithm: losses hold [top - l_target, total].
        losses[2 * t] = top - at_target;
        losses[2 * t + 1] = total;
        if (!wants_grad) return;
        float inverse = 1.0f / total;
        for_each16(n, [&](int64_t i, int64_t m) {
            f32x16 p = exp16(load_some(l + i, m) - top) * inverse;
            if (targets[t] >= i && targets[t] < i + m) p[targets[t] - i] -= 1.0f;
            store_some(l + i, p, m);
        });
    });
}

}  // namespace

#define FOR_DTYPE(suffix, T)                                                                                          \
    EXPORT void deltaw_rms_norm_##suffix(const T* x, const T* w, T* y, float* r, int64_t rows, int64_t n, float eps,  \
                                         int64_t adds_one) {                                                          \
        rms_norm(x, w, y, r, rows, n, eps, adds_one);                                                                 \
    }                                                                                                                 \
    EXPORT void deltaw_rms_norm_backward_##suffix(const T* dy, const T* x, const T* w, const float* r, T* dx,         \
                                                  int64_t rows, int64_t n, int64_t adds_one) {                        \
        rms_norm_backward(dy, x, w, r, dx, rows, n, adds_one);                                                        \
    }                                                                                                                 \
    EXPORT void deltaw_gate_##suffix(const T* g, const T* u, T* p, int64_t size, int64_t act) {                       \
        gate(g, u, p, size, act);                                                                                     \
    }                                                                                                                 \
    EXPORT void deltaw_gate_backward_##suffix(const T* dp, const T* g, const T* u, T* dg, T* du, int64_t size,        \
                                              int64_t act) {                                                          \
        gate_backward(dp, g, u, dg, du, size, act);                                                                   \
    }                                                                                                                 \
    EXPORT void deltaw_scale_columns_##suffix(T* y, const float* c, int64_t rows, int64_t n) {                        \
        scale_columns(y, c, rows, n);                                                                                 \
    }                                                                                                                 \
    EXPORT void deltaw_scale_columns_backward_##suffix(const T* dy, const T* y, const float* c, T* g, float* sums,    \
                                                       int64_t rows, int64_t n) {                                     \
        scale_columns_backward(dy, y, c, g, sums, rows, n);                                                           \
    }                                                                                                                 \
    EXPORT void deltaw_rotate_##suffix(const T* x, const T* cos, const T* sin, T* y, int64_t tokens, int64_t heads,   \
                                       int64_t size, int64_t x_token, int64_t x_head, int64_t y_token,                \
                                       int64_t y_head, float sign) {                                                  \
        rotate(x, cos, sin, y, tokens, heads, size, x_token, x_head, y_token, y_head, sign);                          \
    }                                                                                                                 \
    EXPORT void deltaw_cross_entropy_##suffix(T* logits, const int64_t* targets, float* losses, int64_t rows,         \
                                              int64_t n, int64_t wants_grad) {                                        \
        cross_entropy(logits, targets, losses, rows, n, wants_grad);                                                  \
    }

FOR_DTYPE(f32, float)
FOR_DTYPE(bf16, bf16)
