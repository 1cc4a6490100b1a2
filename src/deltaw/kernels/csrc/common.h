// What all kernels share: vectors of 16 floats, bfloat16 and float32 as storage, and torch's own thread pool.
//
// Vectors are GCC's and Clang's extension where arithmetic is plain, and AVX-512's intrinsics where it isn't. The source
// is compiled once a level (see setup.py), and Python loads the one that the processor can run. No exceptions, no C++
// runtime, no libm.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <immintrin.h>

#define EXPORT extern "C" __attribute__((visibility("default")))

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));

struct bf16 {
    uint16_t bits;
};

static inline f32x16 splat(float x) { return f32x16{} + x; }

// --- loads and stores: 16 numbers of either dtype, arithmetic always in float32 ---

static inline u32x16 widened(u16x16 h) {
    return (u32x16)_mm512_cvtepu16_epi32((__m256i)h);  // GCC 12 makes five instructions of __builtin_convertvector
}

static inline f32x16 load16(const float* p) {
    f32x16 v;
    memcpy(&v, p, sizeof v);
    return v;
}

static inline f32x16 load16(const bf16* p) {
    u16x16 h;
    memcpy(&h, p, sizeof h);
    return (f32x16)(widened(h) << 16);
}

static inline void store16(float* p, f32x16 v) { memcpy(p, &v, sizeof v); }

// Round to nearest, ties to even, NaN stays NaN: what torch does.
static inline u16x16 to_bf16_by_integers(f32x16 v) {
    u32x16 u = (u32x16)v;
    u32x16 rounded = (u + (0x7fff + ((u >> 16) & 1))) >> 16;
    u32x16 nan = (u32x16)(v != v);
    return __builtin_convertvector((rounded & ~nan) | (((u >> 16) | 0x40) & nan), u16x16);
}

// The same, but that the instruction takes numbers below 1.2e-38 (denormals) for zeros.
static inline u16x16 to_bf16(f32x16 v) {
#if defined(__AVX512BF16__)
    return (u16x16)_mm512_cvtneps_pbh((__m512)v);
#else
    return to_bf16_by_integers(v);
#endif
}

static inline void store16(bf16* p, f32x16 v) {
    u16x16 h = to_bf16(v);
    memcpy(p, &h, sizeof h);
}

static inline float load1(const float* p) { return *p; }
static inline float load1(const bf16* p) {
    uint32_t u = (uint32_t)p->bits << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}

// The last n < 16 numbers of a row; what lies behind them is neither read nor written.
template <class T> static inline f32x16 load_tail(const T* p, int64_t n) {
    T padded[16] = {};
    memcpy(padded, p, (size_t)n * sizeof(T));
    return load16(padded);
}

template <class T> static inline void store_tail(T* p, f32x16 v, int64_t n) {
    T padded[16];
    store16(padded, v);
    memcpy(p, padded, (size_t)n * sizeof(T));
}

// As if rounded to T and read again: where torch rounds between two operations, so do the kernels that follow it.
static inline f32x16 rounded_to(const float*, f32x16 v) { return v; }
static inline f32x16 rounded_to(const bf16*, f32x16 v) {
    return (f32x16)(widened(to_bf16(v)) << 16);
}

// body(i, load, store) for every 16 numbers of a row of n: full vectors first, then the tail.
template <class Body> static inline void for_each16(int64_t n, Body body) {
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) body(i, (int64_t)16);
    if (i < n) body(i, n - i);
}

template <class T> static inline f32x16 load_some(const T* p, int64_t n) { return n == 16 ? load16(p) : load_tail(p, n); }
template <class T> static inline void store_some(T* p, f32x16 v, int64_t n) {
    if (n == 16)
        store16(p, v);
    else
        store_tail(p, v, n);
}

// All lanes as one: each with the one 8 further on, then 4, 2 and 1.
template <class Fold> static inline float fold16(f32x16 v, Fold fold) {
    v = fold(v, __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
    v = fold(v, __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
    v = fold(v, __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
    v = fold(v, __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
    return v[0];
}

static inline float sum16(f32x16 v) {
    return fold16(v, [](f32x16 a, f32x16 b) { return a + b; });
}

static inline f32x16 max16(f32x16 a, f32x16 b) { return a > b ? a : b; }

static inline float max16(f32x16 v) {
    return fold16(v, [](f32x16 a, f32x16 b) { return max16(a, b); });
}

// e^x to about one unit in the last place; −∞ and all below −110 give 0, above 88 infinity, NaN stays NaN.
static inline f32x16 exp16(f32x16 x) {
    x = (f32x16)_mm512_max_ps((__m512)splat(-110.0f), (__m512)x);  // of a number and NaN the second one
    f32x16 n = (f32x16)_mm512_roundscale_ps((__m512)(x * 1.44269504f), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    f32x16 r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    f32x16 p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + (r + 1.0f);
    return (f32x16)_mm512_scalef_ps((__m512)p, (__m512)n);
}

// 1/x to about two units in the last place: an estimate and a step of Newton's. 1/∞ is 0.
static inline f32x16 reciprocal16(f32x16 x) {
    f32x16 y = (f32x16)_mm512_rcp14_ps((__m512)x);
    f32x16 better = y * (2.0f - x * y);
    return (f32x16)_mm512_mask_blend_ps(_mm512_cmp_ps_mask((__m512)y, (__m512)f32x16{}, _CMP_EQ_OQ), (__m512)better,
                                        (__m512)y);
}

// --- threads ---

// How many threads a parallel loop may have: torch's own number.
int num_threads();
// Run task(context, part) for part 0 … parts-1 on that many threads at once.
void run_parallel(int parts, void (*task)(void*, int), void* context);

// body(begin, end) over 0 … n in pieces of at least grain, one a thread.
template <class Body> static inline void parallel_for(int64_t n, int64_t grain, Body body) {
    int64_t most = grain > 0 ? (n + grain - 1) / grain : n;
    int parts = (int)(most < num_threads() ? most : num_threads());
    if (parts <= 1) {
        if (n > 0) body((int64_t)0, n);
        return;
    }
    struct Context {
        Body* body;
        int64_t n;
        int parts;
    } context{&body, n, parts};
    run_parallel(
        parts,
        [](void* opaque, int part) {
            Context& c = *(Context*)opaque;
            int64_t begin = c.n * part / c.parts, end = c.n * (part + 1) / c.parts;
            if (begin < end) (*c.body)(begin, end);
        },
        &context);
}

// body(i, thread) for i in 0 … n, whoever is free takes the next: for pieces of unequal work.
template <class Body> static inline void parallel_tasks(int64_t n, Body body) {
    int parts = (int)(n < num_threads() ? n : num_threads());
    struct Context {
        Body* body;
        int64_t n;
        int64_t next;
    } context{&body, n, 0};
    auto run = [](void* opaque, int part) {
        Context& c = *(Context*)opaque;
        for (;;) {
            int64_t i = __atomic_fetch_add(&c.next, 1, __ATOMIC_RELAXED);
            if (i >= c.n) return;
            (*c.body)(i, part);
        }
    };
    if (parts <= 1)
        run(&context, 0);
    else
        run_parallel(parts, run, &context);
}
