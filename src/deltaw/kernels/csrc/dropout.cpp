// Dropout masks of one bit an entry, and rows with what they drop set to zero.
//
// Bits come from PCG64 in its DXSM variant (O'Neill 2014), as numpy has it: each 64-bit word decides four entries by
// fifteen of its bits each, and a row begins with a new word. Bit j of byte j/8 of a row is set where entry j is kept.
#include "common.h"

namespace {

typedef unsigned __int128 u128;
constexpr uint64_t MULTIPLIER = 0xda942042e4dd58b5ULL;

static inline uint64_t next(u128& state, u128 increment) {
    uint64_t high = (uint64_t)(state >> 64), low = (uint64_t)state | 1;
    high ^= high >> 32;
    high *= MULTIPLIER;
    high ^= high >> 48;
    high *= low;
    state = state * MULTIPLIER + increment;
    return high;
}

// The state after n more words: the map of one step, squared again and again (Brown 1994).
u128 advanced(u128 state, u128 increment, uint64_t n) {
    u128 factor = 1, offset = 0, step_factor = MULTIPLIER, step_offset = increment;
    for (; n; n >>= 1) {
        if (n & 1) {
            factor *= step_factor;
            offset = offset * step_factor + step_offset;
        }
        step_offset *= step_factor + 1;
        step_factor *= step_factor;
    }
    return factor * state + offset;
}

void draw(u128 state, u128 increment, int64_t highest_dropped, uint8_t* bits, int64_t rows, int64_t columns) {
    int64_t words = (columns + 3) / 4, bytes = (columns + 7) / 8;
    parallel_for(rows, 16384 / (columns + 1) + 1, [=](int64_t begin, int64_t end) {
        u128 s = advanced(state, increment, (uint64_t)(begin * words));
        const __m512i dropped = _mm512_set1_epi16((int16_t)highest_dropped);
        for (int64_t t = begin; t < end; t++) {
            uint8_t* row = bits + t * bytes;
            uint64_t drawn[8];
            for (int64_t w = 0; w < words; w += 8) {
                int64_t here = words - w < 8 ? words - w : 8;
                for (int64_t i = 0; i < here; i++) drawn[i] = next(s, increment);
                for (int64_t i = here; i < 8; i++) drawn[i] = 0;
                __m512i numbers = _mm512_srai_epi16(_mm512_loadu_si512(drawn), 1);
                uint32_t kept = _mm512_cmpgt_epi16_mask(numbers, dropped);
                int64_t left = columns - w * 4;
                if (left < 32) kept &= (1u << left) - 1;
                int64_t size = bytes - w / 2;
                memcpy(row + w / 2, &kept, (size_t)(size < 4 ? size : 4));
            }
        }
    });
}

static inline uint32_t bits_at(const uint8_t* row, int64_t column, int64_t bytes) {
    uint32_t bits = 0;
    int64_t first = column / 8, size = bytes - first;
    memcpy(&bits, row + first, (size_t)(size < 4 ? size : 4));
    return bits;
}

// y = x∘m, not scaled; onto: y += x∘m.
template <class T>
void keep(const T* x, const uint8_t* bits, T* y, int64_t rows, int64_t columns, int64_t onto) {
    int64_t bytes = (columns + 7) / 8;
    parallel_for(rows, 16384 / (columns + 1) + 1, [=](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; t++) {
            const uint8_t* row = bits + t * bytes;
            const T* xt = x + t * columns;
            T* yt = y + t * columns;
            for (int64_t i = 0; i < columns; i += 32) {
                uint32_t kept = bits_at(row, i, bytes);
                for (int64_t half = i; half < i + 32 && half < columns; half += 16, kept >>= 16) {
                    int64_t m = columns - half < 16 ? columns - half : 16;
                    f32x16 v = (f32x16)_mm512_maskz_mov_ps((__mmask16)kept, (__m512)load_some(xt + half, m));
                    if (onto) v += load_some(yt + half, m);
                    store_some(yt + half, v, m);
                }
            }
        }
    });
}

}  // namespace

EXPORT void deltaw_dropout_bits(int64_t state_high, int64_t state_low, int64_t increment_high, int64_t increment_low,
                                int64_t highest_dropped, uint8_t* bits, int64_t rows, int64_t columns) {
    u128 state = ((u128)(uint64_t)state_high << 64) | (uint64_t)state_low;
    u128 increment = ((u128)(uint64_t)increment_high << 64) | (uint64_t)increment_low;
    draw(state, increment, highest_dropped, bits, rows, columns);
}

#define FOR_DTYPE(suffix, T)                                                                                          \
    EXPORT void deltaw_keep_##suffix(const T* x, const uint8_t* bits, T* y, int64_t rows, int64_t columns,           \
                                     int64_t onto) {                                                                  \
        keep(x, bits, y, rows, columns, onto);                                                                        \
    }

FOR_DTYPE(f32, float)
FOR_DTYPE(bf16, bf16)
