// How a row of inputs becomes codes: what numerics/ranges.py and numerics/quantize.py say of scheme `int8`, to the bit.
#pragma once
#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace {
typedef int64_t i64;
constexpr i64 STEP = 64, TILE = 1024;  // codes of a row in a tile, bytes of a tile
constexpr uint32_t INFINITE = 0x7f800000, LARGEST = 0x7f7ffffe;  // bits of float32; the second as in numerics/ranges.py

// Largest magnitudes as the bits of floats, whose order is that of whole numbers, NaN above all.
inline __m512i larger(__m512i so_far, const float* x) {
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    for (int i = 0; i < 64; i += 16)
        so_far = _mm512_max_epi32(so_far, _mm512_and_si512(_mm512_loadu_si512(x + i), magnitude));
    return so_far;
}

inline __m512i larger(__m512i so_far, const uint16_t* x) {
    const __m512i magnitude = _mm512_set1_epi16(0x7fff);
    for (int i = 0; i < 64; i += 32)
        so_far = _mm512_max_epi16(so_far, _mm512_and_si512(_mm512_loadu_si512(x + i), magnitude));
    return so_far;
}

inline uint32_t largest(__m512i found, const float*) { return _mm512_reduce_max_epi32(found); }

inline uint32_t largest(__m512i found, const uint16_t*) {
    const __m512i low = _mm512_and_si512(found, _mm512_set1_epi32(0xffff));
    return uint32_t(_mm512_reduce_max_epi32(_mm512_max_epi32(_mm512_srli_epi32(found, 16), low))) << 16;
}

// limited: where a value may lie beyond the codes. Limits are whole, so limiting first is the same.
template <bool limited>
inline __m512i whole(__m512 x, __m512 inverse) {
    __m512 scaled = _mm512_mul_ps(x, inverse);
    if (limited) scaled = _mm512_max_ps(_mm512_min_ps(scaled, _mm512_set1_ps(127)), _mm512_set1_ps(-127));
    return _mm512_cvtps_epi32(scaled);
}

template <bool limited>
inline __m512i codes_of(const float* x, __m512 inverse) {
    __m512i q[4];
    for (int i = 0; i < 4; i++) q[i] = whole<limited>(_mm512_loadu_ps(x + 16 * i), inverse);
    const __m512i packed = _mm512_packs_epi16(_mm512_packs_epi32(q[0], q[1]), _mm512_packs_epi32(q[2], q[3]));
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return _mm512_permutexvar_epi32(order, packed);
}

template <bool limited>
inline __m512i codes_of(const uint16_t* x, __m512 inverse) {
    __m512i q[2];
    for (int i = 0; i < 2; i++) {
        const __m512i both = _mm512_loadu_si512(x + 32 * i), upper = _mm512_set1_epi32(int(0xffff0000));
        const __m512i even = whole<limited>(_mm512_castsi512_ps(_mm512_slli_epi32(both, 16)), inverse);
        const __m512i odd = whole<limited>(_mm512_castsi512_ps(_mm512_and_si512(both, upper)), inverse);
        q[i] = _mm512_mask_blend_epi16(0xaaaaaaaa, even, _mm512_slli_epi32(odd, 16));
    }
    return _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), _mm512_packs_epi16(q[0], q[1]));
}

// One row into its place in a row of tiles; `flip` makes codes unsigned. Returns its scale.
template <class T>
float quantise(const T* x, i64 k, float phase, __m512i flip, int8_t* to) {
    const i64 full = k / STEP, steps = (k + STEP - 1) / STEP;
    alignas(64) T rest[STEP] = {};
    memcpy(rest, x + full * STEP, (k - full * STEP) * sizeof(T));
    __m512i found = _mm512_setzero_si512();
    for (i64 s = 0; s < full; s++) found = larger(found, x + s * STEP);
    const uint32_t bits = largest(larger(found, rest), x), kept = bits > INFINITE ? bits : std::min(bits, LARGEST);
    float amax, scale;
    memcpy(&amax, &kept, sizeof amax);
    scale = bits == 0 ? 1 : bits > INFINITE ? amax : std::max(amax / 127, 0x1p-126f);
    scale *= phase;
    const __m512 inverse = _mm512_set1_ps(1 / scale);
    const bool limited = bits > LARGEST || phase != 1;
    for (i64 s = 0; s < steps; s++) {
        const T* from = s < full ? x + s * STEP : rest;
        __m512i codes = limited ? codes_of<true>(from, inverse) : codes_of<false>(from, inverse);
        _mm512_store_si512(to + s * TILE, _mm512_xor_si512(codes, flip));
    }
    return scale;
}

}  // namespace
