// Vectors of 16 values and the arithmetic that the kernels share.
//
// It is written with GCC's and Clang's vector types, which every processor has an equivalent of; a few
// instructions of AVX-512 stand where compilers do not find them. Compiled with -ffp-contract=off:
// products and sums are fused where fma() says so and nowhere else, so results do not depend on the
// compiler's choice.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

// Which instructions multiply whole numbers: 2 AVX512_VNNI, 1 AVX2, 0 none in particular.
#ifndef KIEM_DOT4
#if defined(__AVX512VNNI__)
#define KIEM_DOT4 2
#elif defined(__AVX2__)
#define KIEM_DOT4 1
#else
#define KIEM_DOT4 0
#endif
#endif

typedef float Float16 __attribute__((vector_size(64)));
typedef float Float8 __attribute__((vector_size(32)));
typedef float Float4 __attribute__((vector_size(16)));
typedef int32_t Int16 __attribute__((vector_size(64)));
typedef uint32_t UInt16 __attribute__((vector_size(64)));
typedef uint16_t Half16 __attribute__((vector_size(32)));

template <class V> static inline V load(const void *from) {
    V v;
    memcpy(&v, from, sizeof v);
    return v;
}

template <class V> static inline void store(void *to, V v) { memcpy(to, &v, sizeof v); }

static inline Float16 broadcast(float value) { return value - (Float16){}; }

static inline Float16 fma(Float16 a, Float16 b, Float16 c) {
#if defined(__AVX512F__)
    return (Float16)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    for (int i = 0; i < 16; i++) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
#else
    return a * b + c;
#endif
}

// GCC 12 takes its generic conversions of narrow vectors apart into single values.
static inline Float16 load16(const uint16_t *from) {
#if defined(__AVX512F__)
    __m256i narrow = _mm256_loadu_si256((const __m256i *)from);
    return (Float16)_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16);
#else
    return (Float16)(__builtin_convertvector(load<Half16>(from), UInt16) << 16);
#endif
}

static inline Float16 load16(const float *from) { return load<Float16>(from); }

// To bf16: to nearest, ties to even; not for NaN.
static inline void store16(uint16_t *to, Float16 v) {
    UInt16 bits = (UInt16)v;
    bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
#if defined(__AVX512F__)
    _mm256_storeu_si256((__m256i *)to, _mm512_cvtepi32_epi16((__m512i)bits));
#else
    store(to, __builtin_convertvector(bits, Half16));
#endif
}

static inline void store16(float *to, Float16 v) { store(to, v); }

static inline Float16 to_bf16_and_back(Float16 v) {
    UInt16 bits = (UInt16)v;
    return (Float16)((bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u);
}

static inline float from_bf16(uint16_t bits) {
    uint32_t wide = uint32_t(bits) << 16;
    float value;
    memcpy(&value, &wide, sizeof value);
    return value;
}

static inline uint16_t to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static inline float sum(Float16 v) {
    Float8 halves[2];
    Float4 quarters[2];
    memcpy(halves, &v, sizeof v);
    halves[0] += halves[1];
    memcpy(quarters, halves, sizeof quarters);
    quarters[0] += quarters[1];
    return (quarters[0][0] + quarters[0][2]) + (quarters[0][1] + quarters[0][3]);
}

static inline float max_of(Float16 v) {
    float most = v[0];
    for (int i = 1; i < 16; i++) most = v[i] > most ? v[i] : most;
    return most;
}

static inline Float16 abs(Float16 v) { return (Float16)((UInt16)v & 0x7fffffffu); }

static inline Float16 max(Float16 a, Float16 b) { return a > b ? a : b; }
static inline Float16 min(Float16 a, Float16 b) { return a < b ? a : b; }

// To the nearest whole number, ties to even, of magnitudes up to 2^22: beyond them fp32 has no fractions.
static inline Float16 round(Float16 v) { return (v + 12582912.0f) - 12582912.0f; }

static inline Int16 to_int(Float16 v) { return __builtin_convertvector(v, Int16); }
static inline Float16 to_float(Int16 v) { return __builtin_convertvector(v, Float16); }

// e^v, to some 2 units in the last place (range reduction and polynomial of Cephes' expf).
static inline Float16 exp(Float16 v) {
    v = max(min(v, broadcast(88.0f)), broadcast(-87.0f));
    Float16 n = round(v * 1.44269504f);
    Float16 r = fma(n, broadcast(-0.693359375f), v);
    r = fma(n, broadcast(2.12194440e-4f), r);
    Float16 p = fma(broadcast(1.9875691500e-4f), r, broadcast(1.3981999507e-3f));
    p = fma(p, r, broadcast(8.3334519073e-3f));
    p = fma(p, r, broadcast(4.1665795894e-2f));
    p = fma(p, r, broadcast(1.6666665459e-1f));
    p = fma(p, r, broadcast(5.0000001201e-1f));
    p = fma(p, r * r, r + 1.0f);
    return (Float16)((Int16)p + (to_int(n) << 23));
}

// GELU in its tanh form: g (1 + tanh u) / 2 is g / (1 + e^-2u).
static inline Float16 gelu(Float16 g) {
    Float16 u = g * fma(g * g, broadcast(0.044715f), broadcast(1.0f)) * 0.7978845608f;
    return g / (exp(u * -2.0f) + 1.0f);
}

// In each lane, the sum plus four products: of four unsigned bytes of `w` with the signed bytes of `x`.
static inline Int16 dot4(Int16 sum, UInt16 w, const int8_t *x) {
#if KIEM_DOT4 == 2
    int32_t four;
    memcpy(&four, x, sizeof four);
    return (Int16)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, _mm512_set1_epi32(four));
#elif KIEM_DOT4 == 1
    // Pairs of 16 bits: the even bytes, then the odd ones.
    __m256i even = _mm256_set1_epi32(uint16_t(x[0]) | int32_t(x[2]) * 65536);
    __m256i odd = _mm256_set1_epi32(uint16_t(x[1]) | int32_t(x[3]) * 65536);
    for (int half = 0; half < 2; half++) {
        __m256i bytes, sums;
        memcpy(&bytes, (char *)&w + 32 * half, sizeof bytes);
        memcpy(&sums, (char *)&sum + 32 * half, sizeof sums);
        __m256i low = _mm256_and_si256(bytes, _mm256_set1_epi16(255)), high = _mm256_srli_epi16(bytes, 8);
        sums = _mm256_add_epi32(sums, _mm256_madd_epi16(low, even));
        sums = _mm256_add_epi32(sums, _mm256_madd_epi16(high, odd));
        memcpy((char *)&sum + 32 * half, &sums, sizeof sums);
    }
    return sum;
#else
    for (int i = 0; i < 4; i++) sum += (Int16)((w >> (8 * i)) & 255) * int32_t(x[i]);
    return sum;
#endif
}
