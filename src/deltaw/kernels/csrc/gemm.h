// C[M, N] (+)= A[M, K]·B[K, N] on small blocks, sums in float32.
//
// Operands are made of 32-bit words. A word is one float; or, where the processor multiplies bfloat16, two bfloat16 that
// follow each other along K (the first in the low half). bfloat16 elsewhere is turned into float when it is packed.
//   A: any strides in words between rows and along K, so that rows and columns of a buffer serve alike.
//   B: panels of 64 columns, one after the other, in each the 64 words of one step along K, then those of the next.
//   C: float32, rows ldc apart. Columns go in vectors of 16; what lies behind N in the last of them is written too.
// K is in words. Packed buffers are padded with zeros, so that odd sizes need no code here.
#pragma once

#include "common.h"

typedef uint32_t word;

constexpr int64_t PANEL = 64;  // columns
constexpr int64_t TILE = 6;    // rows: 6 × 4 vectors of sums, 4 of B and one of A fill 32 registers

#if defined(__AVX512BF16__)
template <class T> constexpr int64_t PAIR = sizeof(T) == 2 ? 2 : 1;  // numbers in a word
#else
template <class T> constexpr int64_t PAIR = 1;
#endif

static inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// --- the product ---

template <int64_t P> static inline f32x16 dot(f32x16 sum, word a, f32x16 b) {
#if defined(__AVX512BF16__)
    if (P == 2) return (f32x16)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32((int)a), (__m512bh)b);
#endif
    float f;
    memcpy(&f, &a, 4);
    return sum + f * b;
}

// M rows of V vectors: all sums stay in registers.
template <int64_t P, int M, int V>
static inline void multiply_registers(const word* a, int64_t row, int64_t step, const word* b, float* c, int64_t ldc,
                                      int64_t k, bool add) {
    f32x16 sums[M][V] = {};
    for (int64_t i = 0; i < k; i++, a += step, b += PANEL) {
        f32x16 bs[V];
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) memcpy(&bs[v], b + 16 * v, sizeof bs[v]);
#pragma GCC unroll 8
        for (int m = 0; m < M; m++)
#pragma GCC unroll 8
            for (int v = 0; v < V; v++) sums[m][v] = dot<P>(sums[m][v], a[m * row], bs[v]);
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) {
            float* at = c + m * ldc + 16 * v;
            store16(at, add ? load16(at) + sums[m][v] : sums[m][v]);
        }
}

template <int64_t P, int M>
static void multiply_rows(const word* a, int64_t row, int64_t step, const word* b, float* c, int64_t ldc, int64_t k,
                          int64_t vectors, bool add) {
    switch (vectors) {
        case 1: return multiply_registers<P, M, 1>(a, row, step, b, c, ldc, k, add);
        case 2: return multiply_registers<P, M, 2>(a, row, step, b, c, ldc, k, add);
        case 3: return multiply_registers<P, M, 3>(a, row, step, b, c, ldc, k, add);
        default: return multiply_registers<P, M, 4>(a, row, step, b, c, ldc, k, add);
    }
}

// Up to 6 rows, one panel.
template <int64_t P>
static inline void multiply_tile(const word* a, int64_t row, int64_t step, const word* b, float* c, int64_t ldc,
                                 int64_t rows, int64_t k, int64_t vectors, bool add) {
    switch (rows) {
        case 1: return multiply_rows<P, 1>(a, row, step, b, c, ldc, k, vectors, add);
        case 2: return multiply_rows<P, 2>(a, row, step, b, c, ldc, k, vectors, add);
        case 3: return multiply_rows<P, 3>(a, row, step, b, c, ldc, k, vectors, add);
        case 4: return multiply_rows<P, 4>(a, row, step, b, c, ldc, k, vectors, add);
        case 5: return multiply_rows<P, 5>(a, row, step, b, c, ldc, k, vectors, add);
        default: return multiply_rows<P, 6>(a, row, step, b, c, ldc, k, vectors, add);
    }
}

// Any number of rows and columns; panel is the distance between B's panels.
template <int64_t P>
static inline void multiply(const word* a, int64_t row, int64_t step, const word* b, int64_t panel, float* c,
                            int64_t ldc, int64_t rows, int64_t columns, int64_t k, bool add) {
    for (int64_t n = 0; n < columns; n += PANEL, b += panel)
        for (int64_t m = 0; m < rows; m += TILE)
            multiply_tile<P>(a + m * row, row, step, b, c + m * ldc + n, ldc, least(TILE, rows - m), k,
                             (least(PANEL, columns - n) + 15) / 16, add);
}

// --- packing: x is [rows, n], its rows stride numbers apart ---

static inline void store_words(word* to, f32x16 v) { memcpy(to, &v, sizeof v); }

// Words along a row for n numbers, and with the padding that packing may write.
template <class T> constexpr int64_t words(int64_t n) { return (n + PAIR<T> - 1) / PAIR<T>; }
template <class T> constexpr int64_t padded_words(int64_t n) { return round_up(words<T>(n), 16); }

// Rows of a batch lie far apart, each on lines and often on a page of its own: what comes soon is asked for ahead.
template <class T> static inline void prefetch_row(const T* x, int64_t stride, int64_t n) {
    for (int64_t i = 0; i < n; i += 64 / (int64_t)sizeof(T)) __builtin_prefetch(x + 12 * stride + i);
}

// Row by row, padded_words apart: A of x·B. Rows from `rows` to `padded_rows` become zero.
template <class T>
static void pack_rows(word* to, const T* x, int64_t stride, int64_t rows, int64_t padded_rows, int64_t n) {
    int64_t width = padded_words<T>(n);
    for (int64_t r = 0; r < rows; r++, to += width, x += stride) {
        int64_t i = 0;
        prefetch_row(x, stride, n);
        for_each16(n, [&](int64_t at, int64_t m) {
            if (PAIR<T> == 2)
                store_some((T*)to + at, load_some(x + at, m), 16);
            else
                store_words(to + at, load_some(x + at, m));
            i = at + 16;
        });
        if (PAIR<T> == 2 && i < 2 * width) store_some((T*)to + i, f32x16{}, 16);
    }
    if (rows < padded_rows) memset(to, 0, (size_t)((padded_rows - rows) * width) * 4);
}

// Panels with x's rows along K: B of A·x. K is padded with zeros to padded_rows, a multiple of PAIR.
template <class T>
static void pack_steps(word* to, const T* x, int64_t stride, int64_t rows, int64_t padded_rows, int64_t n) {
    int64_t steps = padded_rows / PAIR<T>;
    for_each16(n, [&](int64_t i, int64_t m) {
        word* at = to + i / PANEL * PANEL * steps + i % PANEL;
        const T* from = x + i;
        for (int64_t r = 0; r < padded_rows; r += PAIR<T>, at += PANEL, from += PAIR<T> * stride) {
            f32x16 low = {}, high = {};
            if (r < rows) low = load_some(from, m);
            if (PAIR<T> == 2) {  // a bfloat16 is the upper half of its float
                if (r + 1 < rows) high = load_some(from + stride, m);
                low = (f32x16)((u32x16)low >> 16 | (u32x16)high);
            }
            store_words(at, low);
        }
    });
}

// 16 × 16 words turned round.
static inline void transpose16(const word* from, int64_t from_stride, word* to, int64_t to_stride) {
    for (int64_t j = 0; j < 16; j++)
        for (int64_t i = 0; i < 16; i++) to[j * to_stride + i] = from[i * from_stride + j];
}

// Panels with x's rows along N: B of A·xᵀ. rows_of_16 holds 16 packed rows in between.
template <class T>
static void pack_columns(word* to, const T* x, int64_t stride, int64_t rows, int64_t n, word* rows_of_16) {
    int64_t width = padded_words<T>(n);
    for (int64_t r = 0; r < rows; r += 16) {
        pack_rows(rows_of_16, x + r * stride, stride, least(16, rows - r), 16, n);
        word* panel = to + r / PANEL * PANEL * width + r % PANEL;
        for (int64_t i = 0; i < width; i += 16) transpose16(rows_of_16 + i, width, panel + i * PANEL, PANEL);
    }
}
