// Weights in 4 bits: made of dense ones, made dense, or multiplied with a few rows as they are.
//
// A byte holds two codes, the first in the upper half; a block of B weights (a power of two, 32 or more) shares a
// scale. Scales come as float32, or quantised again: scale = map[code]·absmax[block/256] + offset.
#include "common.h"

namespace {

// A product that is rounded before it is added to, as torch does it, and not fused with the sum.
template <class V> static inline V rounded(V product) {
#if defined(__AVX512F__)
    asm("" : "+v"(product));
#elif defined(__x86_64__)
    asm("" : "+x"(product));
#else
    asm("" : "+w"(product));
#endif
    return product;
}

struct Scales {
    const float* plain;      // [S], or null
    const uint8_t* codes;    // [S]
    const float* map;        // [256]
    const float* absmax;     // [⌈S/256⌉]
    float offset;

    float at(int64_t i) const { return plain ? plain[i] : rounded(map[codes[i]] * absmax[i / 256]) + offset; }
};

// --- dense: w[i] = levels[code[i]]·scale, rounded once ---

static inline void pairs_to_dense(const uint8_t* packed, const f32x16 table, float* w, int64_t i, int64_t n) {
    for (; i < n; i++) w[i] = table[i % 2 ? packed[i / 2] & 15 : packed[i / 2] >> 4];
}

static inline void pairs_to_dense(const uint8_t* packed, const u16x16 table, bf16* w, int64_t i, int64_t n) {
    for (; i < n; i++) w[i].bits = table[i % 2 ? packed[i / 2] & 15 : packed[i / 2] >> 4];
}

static inline void block_to_dense(const uint8_t* packed, f32x16 levels, float scale, float* w, int64_t n) {
    f32x16 table = levels * scale;
    int64_t i = 0;
#if defined(__AVX512F__)
    for (; i + 16 <= n; i += 16) {
        // a byte in each 64-bit lane: its upper half is the first code, its lower half the second
        __m512i v = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i*)(packed + i / 2)));
        __m512i index = _mm512_or_si512(_mm512_srli_epi64(v, 4), _mm512_slli_epi64(v, 32));
        _mm512_storeu_ps(w + i, _mm512_permutexvar_ps(index, (__m512)table));
    }
#endif
    pairs_to_dense(packed, table, w, i, n);
}

static inline void block_to_dense(const uint8_t* packed, f32x16 levels, float scale, bf16* w, int64_t n) {
    f32x16 exact = levels * scale;
    u16x16 table = scale > 1e-35f ? to_bf16(exact) : to_bf16_by_integers(exact);  // keeps denormals
    int64_t i = 0;
#if defined(__AVX512BW__)
    // twice, so that an index's fifth bit doesn't matter
    __m512i looked_up = _mm512_broadcast_i64x4((__m256i)table);
    for (; i + 32 <= n; i += 32) {
        __m512i v = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(packed + i / 2)));
        __m512i index = _mm512_or_si512(_mm512_srli_epi32(v, 4), _mm512_slli_epi32(v, 16));
        _mm512_storeu_si512(w + i, _mm512_permutexvar_epi16(index, looked_up));
    }
#endif
    pairs_to_dense(packed, table, w, i, n);
}

template <class T>
void dequantize(const uint8_t* packed, const float* levels, Scales scales, T* w, int64_t n, int64_t block) {
    int64_t num_blocks = (n + block - 1) / block;
    parallel_for(num_blocks, 65536 / block + 1, [=](int64_t begin, int64_t end) {
        f32x16 table = load16(levels);
        for (int64_t b = begin; b < end; b++) {
            int64_t first = b * block, size = first + block <= n ? block : n - first;
            block_to_dense(packed + first / 2, table, scales.at(b), w + first, size);
        }
    });
}

// --- quantise: scale = largest magnitude of a block, code = the level nearest to value/scale ---
// bounds lie between neighbouring levels, in ascending order, filled up to 16 with infinity; order gives their codes.

static inline u32x16 count_below(f32x16 v, const float* bounds) {
    u32x16 count = {};
    for (int j = 0; j < 15; j++)  // a mask of minus ones where the value lies above
        count += (u32x16)_mm512_maskz_set1_epi32(_mm512_cmp_ps_mask((__m512)v, (__m512)splat(bounds[j]), _CMP_GT_OQ), 1);
    return count;
}

template <class T>
void quantize(const T* w, const float* bounds, const int32_t* order, uint8_t* packed, float* scales, int64_t n,
              int64_t block) {
    parallel_for((n + block - 1) / block, 4096 / block + 1, [=](int64_t begin, int64_t end) {
        __m512i codes_of = _mm512_loadu_si512(order);
        for (int64_t b = begin; b < end; b++) {
            int64_t first = b * block, size = first + block <= n ? block : n - first;
            f32x16 highest = {};
            int64_t is_finite = 1;
            for_each16(size, [&](int64_t i, int64_t m) {
                f32x16 v = load_some(w + first + i, m);
                __m512 magnitude = _mm512_abs_ps((__m512)v);
                is_finite &= _mm512_cmp_ps_mask(magnitude, (__m512)splat(3.402823466e38f), _CMP_LE_OQ) == 0xffff;
                highest = max16((f32x16)magnitude, highest);
            });
            float largest = is_finite ? max16(highest) : __builtin_nanf("");
            float divisor = largest > 1e-38f ? largest : 1e-38f;
            // bitsandbytes divides the last block where it is short, and multiplies the others
            bool is_short = size < block;
            scales[b] = is_short ? (is_finite ? divisor : largest) : largest;
            float inverse = 1.0f / divisor;
            for_each16(size, [&](int64_t i, int64_t m) {
                f32x16 v = load_some(w + first + i, m);
                v = is_short ? v / divisor : v * inverse;
                __m512i code = _mm512_permutexvar_epi32((__m512i)count_below(v, bounds), codes_of);
                // two codes a byte, the first in the upper half
                __m512i pairs = _mm512_or_si512(_mm512_slli_epi64(code, 4), _mm512_srli_epi64(code, 32));
                __m128i bytes = _mm512_cvtepi64_epi8(_mm512_and_si512(pairs, _mm512_set1_epi64(0xff)));
                uint8_t eight[16];
                _mm_storeu_si128((__m128i*)eight, bytes);
                memcpy(packed + (first + i) / 2, eight, (size_t)((m + 1) / 2));
            });
        }
    });
}

// --- y[t, n] = Σ_k x[t, k]·W[n, k] for a few rows t, reading W once in 4 bits. K is a multiple of 128 and of the
// block, so that blocks end where rows do. ---

constexpr int64_t MOST_ROWS = 4;  // at once: more don't fit the registers

void row_scales(const Scales& scales, int64_t first, int64_t count, float* out) {
    int64_t i = 0;
    if (scales.plain) {
        memcpy(out, scales.plain + first, (size_t)count * sizeof(float));
        return;
    }
#if defined(__AVX512F__)
    for (; i + 16 <= count && (first + i) / 256 == (first + i + 15) / 256; i += 16) {
        __m512i index = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(scales.codes + first + i)));
        __m512 level = _mm512_i32gather_ps(index, scales.map, 4);
        __m512 product = rounded((__m512)((f32x16)level * scales.absmax[(first + i) / 256]));
        __m512 scale = (__m512)((f32x16)product + scales.offset);
        _mm512_storeu_ps(out + i, scale);
    }
#endif
    for (; i < count; i++) out[i] = scales.at(first + i);
}

template <int64_t ROWS>
void few_rows_plain(const float* x, int64_t k, const uint8_t* packed, const float* levels, const float* scale,
                    int64_t block, float* sums) {
    f32x16 totals[ROWS] = {};
    float w[16];
    for (int64_t b = 0; b < k / block; b++) {
        f32x16 part[ROWS] = {};
        for (int64_t i = b * block; i < (b + 1) * block; i += 16) {
            block_to_dense(packed + i / 2, load16(levels), 1.0f, w, 16);
            f32x16 weights = load16(w);
            for (int64_t t = 0; t < ROWS; t++) part[t] += weights * load16(x + t * k + i);
        }
        for (int64_t t = 0; t < ROWS; t++) totals[t] += part[t] * scale[b];
    }
    for (int64_t t = 0; t < ROWS; t++) sums[t] = sum16(totals[t]);
}

#if defined(__AVX512BF16__)
// 64 bytes are 128 codes. In each 16-bit lane lie four of them; shifted by 4, 0, 12 and 8 the lane's low bits are the
// first, second, third and fourth. x comes in that order: see ``spread``.
template <int64_t ROWS>
void few_rows_bf16(const bf16* x, int64_t k, const uint8_t* packed, const float* levels, const float* scale,
                   int64_t block, float* sums) {
    uint16_t table[32];
    u16x16 rounded = to_bf16(load16(levels));
    memcpy(table, &rounded, 32);
    memcpy(table + 16, &rounded, 32);
    __m512i looked_up = _mm512_loadu_si512(table);
    __m512 totals[ROWS];
    for (int64_t t = 0; t < ROWS; t++) totals[t] = _mm512_setzero_ps();
    // a lane sums 8 weights: of blocks of 32 or 64, the 16 lanes hold four or two
    i32x16 which;
    for (int lane = 0; lane < 16; lane++) which[lane] = (int32_t)(lane * 8 / block);
    const __mmask16 blocks = (__mmask16)(block < 128 ? (1 << 128 / block) - 1 : 1);
    for (int64_t i = 0; i < k; i += 128) {
        __m512i v = _mm512_loadu_si512(packed + i / 2);
        __m512bh w0 = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(v, 4), looked_up);
        __m512bh w1 = (__m512bh)_mm512_permutexvar_epi16(v, looked_up);
        __m512bh w2 = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(v, 12), looked_up);
        __m512bh w3 = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(v, 8), looked_up);
        __m512 scales = _mm512_permutexvar_ps((__m512i)which, _mm512_maskz_loadu_ps(blocks, scale + i / block));
        for (int64_t t = 0; t < ROWS; t++) {
            const bf16* xt = x + t * k + i;
            __m512 part = _mm512_dpbf16_ps(_mm512_setzero_ps(), w0, (__m512bh)_mm512_loadu_si512(xt));
            part = _mm512_dpbf16_ps(part, w1, (__m512bh)_mm512_loadu_si512(xt + 32));
            part = _mm512_dpbf16_ps(part, w2, (__m512bh)_mm512_loadu_si512(xt + 64));
            part = _mm512_dpbf16_ps(part, w3, (__m512bh)_mm512_loadu_si512(xt + 96));
            totals[t] = _mm512_fmadd_ps(part, scales, totals[t]);
        }
    }
    for (int64_t t = 0; t < ROWS; t++) sums[t] = _mm512_reduce_add_ps(totals[t]);
}
#endif

// Rows as the product reads them: float32, or bfloat16 with every 128 numbers dealt out to four hands.
void spread(const float* x, float* out, int64_t size) { memcpy(out, x, (size_t)size * sizeof(float)); }

#if defined(__AVX512BF16__)
typedef bf16 ReadAs;
void spread(const bf16* x, bf16* out, int64_t size) {
    for (int64_t i = 0; i < size; i += 128)
        for (int64_t j = 0; j < 128; j++) out[i + (j % 4) * 32 + j / 4] = x[i + j];
}
template <int64_t ROWS>
void few_rows(const bf16* x, int64_t k, const uint8_t* packed, const float* levels, const float* scale, int64_t block,
              float* sums) {
    few_rows_bf16<ROWS>(x, k, packed, levels, scale, block, sums);
}
#else
typedef float ReadAs;
void spread(const bf16* x, float* out, int64_t size) {
    for (int64_t i = 0; i < size; i++) out[i] = load1(x + i);
}
#endif
template <int64_t ROWS>
void few_rows(const float* x, int64_t k, const uint8_t* packed, const float* levels, const float* scale, int64_t block,
              float* sums) {
    few_rows_plain<ROWS>(x, k, packed, levels, scale, block, sums);
}

static inline void store1(float* p, float v) { *p = v; }
static inline void store1(bf16* p, float v) { p->bits = to_bf16(splat(v))[0]; }

// scratch: rows·k numbers as they are read, then k/block floats for each thread.
template <class T, class Read>
void multiply(const T* x, int64_t rows, const uint8_t* packed, const float* levels, Scales scales, T* y, int64_t n,
              int64_t k, int64_t block, Read* read, float* scale_scratch) {
    spread(x, read, rows * k);
    int64_t per_row = k / block;
    int64_t threads = num_threads(), strip = (n + threads * 4 - 1) / (threads * 4);
    parallel_tasks((n + strip - 1) / strip, [=](int64_t task, int thread) {
        float* scale = scale_scratch + thread * per_row;
        for (int64_t j = task * strip; j < n && j < (task + 1) * strip; j++) {
            const uint8_t* codes = packed + j * k / 2;
            row_scales(scales, j * per_row, per_row, scale);
            float sums[MOST_ROWS];
            for (int64_t t = 0; t < rows; t += MOST_ROWS) {
                int64_t here = rows - t < MOST_ROWS ? rows - t : MOST_ROWS;
                const Read* xt = read + t * k;
                if (here == 4)
                    few_rows<4>(xt, k, codes, levels, scale, block, sums);
                else if (here == 3)
                    few_rows<3>(xt, k, codes, levels, scale, block, sums);
                else if (here == 2)
                    few_rows<2>(xt, k, codes, levels, scale, block, sums);
                else
                    few_rows<1>(xt, k, codes, levels, scale, block, sums);
                for (int64_t i = 0; i < here; i++) store1(y + (t + i) * n + j, sums[i]);
            }
        }
    });
}

}  // namespace

#define QUANTIZE(suffix, T)                                                                                           \
    EXPORT void deltaw_quantize4_##suffix(const T* w, const float* bounds, const int32_t* order, uint8_t* packed,    \
                                          float* scales, int64_t n, int64_t block) {                                 \
        quantize(w, bounds, order, packed, scales, n, block);                                                         \
    }

QUANTIZE(f32, float)
QUANTIZE(bf16, bf16)

#define FOR_DTYPE(suffix, T, Read)                                                                                    \
    EXPORT void deltaw_dequantize4_##suffix(const uint8_t* packed, const float* levels, const float* scales,         \
                                            const uint8_t* codes, const float* map, const float* absmax,             \
                                            float offset, T* w, int64_t n, int64_t block) {                          \
        dequantize(packed, levels, Scales{scales, codes, map, absmax, offset}, w, n, block);                         \
    }                                                                                                                 \
    EXPORT void deltaw_multiply4_##suffix(const T* x, int64_t rows, const uint8_t* packed, const float* levels,      \
                                          const float* scales, const uint8_t* codes, const float* map,               \
                                          const float* absmax, float offset, T* y, int64_t n, int64_t k,             \
                                          int64_t block, void* read, float* scale_scratch) {                         \
        multiply(x, rows, packed, levels, Scales{scales, codes, map, absmax, offset}, y, n, k, block, (Read*)read,   \
                 scale_scratch);                                                                                      \
    }

FOR_DTYPE(f32, float, float)
FOR_DTYPE(bf16, bf16, ReadAs)
