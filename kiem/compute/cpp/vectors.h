// Vectors of 16 values and the arithmetic that the kernels share.
//
// It is written with GCC's and Clang's vector types, which every processor has an equivalent of; a few
// instructions stand where compilers do not find them. Compiled with -ffp-contract=off: products and
// sums are fused where fma() says so and nowhere else, so results do not depend on the compiler's
// choice.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

// Which instructions multiply whole numbers: 3 ARM's DotProd, 2 AVX512_VNNI, 1 AVX2, 0 none in particular.
#ifndef KIEM_DOT4
#if defined(__ARM_FEATURE_DOTPROD)
#define KIEM_DOT4 3
#elif defined(__AVX512VNNI__)
#define KIEM_DOT4 2
#elif defined(__AVX2__)
#define KIEM_DOT4 1
#else
#define KIEM_DOT4 0
#endif
#endif

// The bytes of a native vector. Compilers take wider vectors apart badly, so 16 values are as many
// native vectors as that takes.
#if defined(__AVX512F__)
#define NATIVE_BYTES 64
#elif defined(__AVX__)
#define NATIVE_BYTES 32
#else
#define NATIVE_BYTES 16
#endif
static const int PARTS = 64 / NATIVE_BYTES;

// 16 values of 4 bytes.
template <class T> struct Vector16 {
    typedef T Part __attribute__((vector_size(NATIVE_BYTES)));
    Part parts[PARTS];
};
typedef Vector16<float> Float16;
typedef Vector16<int32_t> Int16;
typedef Vector16<uint32_t> UInt16;

#define EACH_PART _Pragma("GCC unroll 4") for (int p = 0; p < PARTS; p++)

#define OPERATOR(op)                                                                                     \
    template <class T> static inline Vector16<T> operator op(Vector16<T> a, Vector16<T> b) {             \
        EACH_PART a.parts[p] = a.parts[p] op b.parts[p];                                                 \
        return a;                                                                                        \
    }                                                                                                    \
    template <class T, class S> static inline Vector16<T> operator op(Vector16<T> a, S b) {              \
        EACH_PART a.parts[p] = a.parts[p] op T(b);                                                       \
        return a;                                                                                        \
    }
OPERATOR(+)
OPERATOR(-)
OPERATOR(*)
OPERATOR(/)
OPERATOR(&)
OPERATOR(<<)
OPERATOR(>>)
#undef OPERATOR

// The same bits as values of another type.
template <class T, class S> static inline Vector16<T> bits_as(Vector16<S> v) {
    Vector16<T> out;
    EACH_PART out.parts[p] = (typename Vector16<T>::Part)v.parts[p];
    return out;
}

template <class T> static inline Vector16<T> broadcast(T value) {
    Vector16<T> out;
    EACH_PART out.parts[p] = value - (typename Vector16<T>::Part){};
    return out;
}

template <class T> static inline Vector16<T> load(const T *from) {
    Vector16<T> v;
    EACH_PART memcpy(&v.parts[p], from + p * (16 / PARTS), NATIVE_BYTES);
    return v;
}

template <class T> static inline void store(T *to, Vector16<T> v) {
    EACH_PART memcpy(to + p * (16 / PARTS), &v.parts[p], NATIVE_BYTES);
}

static inline Float16 fma(Float16 a, Float16 b, Float16 c) {
#if defined(__AVX512F__)
    c.parts[0] = (Float16::Part)_mm512_fmadd_ps((__m512)a.parts[0], (__m512)b.parts[0], (__m512)c.parts[0]);
    return c;
#elif defined(__FMA__)
    EACH_PART c.parts[p] = (Float16::Part)_mm256_fmadd_ps((__m256)a.parts[p], (__m256)b.parts[p], (__m256)c.parts[p]);
    return c;
#elif defined(__ARM_FEATURE_FMA)
    EACH_PART c.parts[p] = (Float16::Part)vfmaq_f32((float32x4_t)c.parts[p], (float32x4_t)a.parts[p], (float32x4_t)b.parts[p]);
    return c;
#else
    return a * b + c;
#endif
}

// GCC 12 takes its generic conversions of narrow vectors apart into single values.
static inline Float16 load16(const uint16_t *from) {
    UInt16 wide;
#if defined(__AVX512F__)
    wide.parts[0] = (UInt16::Part)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from));
#elif defined(__AVX2__)
    EACH_PART wide.parts[p] = (UInt16::Part)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)from + p));
#elif defined(__ARM_NEON)
    EACH_PART wide.parts[p] = (UInt16::Part)vmovl_u16(vld1_u16(from + 4 * p));
#else
    for (int i = 0; i < 16; i++) wide.parts[i / (16 / PARTS)][i % (16 / PARTS)] = from[i];
#endif
    return bits_as<float>(wide << 16);
}

static inline Float16 load16(const float *from) { return load(from); }

// To nearest, ties to even; not for NaN. The upper halves are bf16.
static inline UInt16 round_to_bf16(Float16 v) {
    UInt16 bits = bits_as<uint32_t>(v);
    return bits + ((bits >> 16) & 1) + 0x7fff;
}

static inline void store16(uint16_t *to, Float16 v) {
    UInt16 bits = round_to_bf16(v) >> 16;
#if defined(__AVX512F__)
    _mm256_storeu_si256((__m256i *)to, _mm512_cvtepi32_epi16((__m512i)bits.parts[0]));
#elif defined(__AVX2__)
    // Packs within halves of 128 bits: the quarters come out as 0 2 1 3.
    __m256i packed = _mm256_packus_epi32((__m256i)bits.parts[0], (__m256i)bits.parts[1]);
    _mm256_storeu_si256((__m256i *)to, _mm256_permute4x64_epi64(packed, 0xd8));
#else
    uint32_t values[16];
    store(values, bits);
    for (int i = 0; i < 16; i++) to[i] = uint16_t(values[i]);
#endif
}

static inline void store16(float *to, Float16 v) { store(to, v); }

static inline Float16 to_bf16_and_back(Float16 v) { return bits_as<float>(round_to_bf16(v) & 0xffff0000u); }

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
    float values[16];
    store(values, v);
#pragma GCC unroll 2
    for (int width = 8; width >= 4; width /= 2)
        for (int i = 0; i < width; i++) values[i] += values[i + width];
    return (values[0] + values[2]) + (values[1] + values[3]);
}

static inline float max_of(Float16 v) {
    float values[16];
    store(values, v);
    return *std::max_element(values, values + 16);
}

static inline Float16 abs(Float16 v) { return bits_as<float>(bits_as<uint32_t>(v) & 0x7fffffffu); }

static inline Float16 max(Float16 a, Float16 b) {
    EACH_PART a.parts[p] = a.parts[p] > b.parts[p] ? a.parts[p] : b.parts[p];
    return a;
}

static inline Float16 min(Float16 a, Float16 b) {
    EACH_PART a.parts[p] = a.parts[p] < b.parts[p] ? a.parts[p] : b.parts[p];
    return a;
}

// To the nearest whole number, ties to even, of magnitudes up to 2^22: beyond them fp32 has no fractions.
static inline Float16 round(Float16 v) { return (v + 12582912.0f) - 12582912.0f; }

static inline Int16 to_int(Float16 v) {
    Int16 out;
    EACH_PART out.parts[p] = __builtin_convertvector(v.parts[p], Int16::Part);
    return out;
}

static inline Float16 to_float(Int16 v) {
    Float16 out;
    EACH_PART out.parts[p] = __builtin_convertvector(v.parts[p], Float16::Part);
    return out;
}

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
    return bits_as<float>(bits_as<int32_t>(p) + (to_int(n) << 23));
}

// GELU in its tanh form: g (1 + tanh u) / 2 is g / (1 + e^-2u).
static inline Float16 gelu(Float16 g) {
    Float16 u = g * fma(g * g, broadcast(0.044715f), broadcast(1.0f)) * 0.7978845608f;
    return g / (exp(u * -2.0f) + 1.0f);
}

static inline int32_t four_bytes(const void *from) {
    int32_t four;
    memcpy(&four, from, sizeof four);
    return four;
}

// In each lane, sums of products of unsigned bytes with signed ones: those of weights of BITS bits with
// as many values of x, at most 32 of them.
template <int BITS> struct Products {
    typedef int8_t Number;                     // of x
    static constexpr bool EVEN_FIRST = false;  // of four, the second and third change places
    // DotProd takes signed bytes: a flipped highest bit leaves 128 out of the weights' bytes.
    static constexpr bool IS_SIGNED = KIEM_DOT4 == 3 && BITS == 8;

    Int16 sums = {};

    // Adds four products to each lane: bytes of `w` with numbers of x.
    void add(UInt16 w, const Number *x) {
#if KIEM_DOT4 == 3
        int8x16_t four = vreinterpretq_s8_s32(vdupq_n_s32(four_bytes(x)));
        EACH_PART {
            int8x16_t bytes = (int8x16_t)w.parts[p];
            if (IS_SIGNED) bytes = veorq_s8(bytes, vdupq_n_s8(-128));
            sums.parts[p] = (Int16::Part)vdotq_s32((int32x4_t)sums.parts[p], bytes, four);
        }
#elif KIEM_DOT4 == 2
        __m512i &sum = (__m512i &)sums.parts[0];
        sum = _mm512_dpbusd_epi32(sum, (__m512i)w.parts[0], _mm512_set1_epi32(four_bytes(x)));
#else
        for (int i = 0; i < 4; i++) sums = sums + bits_as<int32_t>((w >> (8 * i)) & 255) * broadcast<int32_t>(x[i]);
#endif
    }

    Int16 total() const { return sums; }
};

#if KIEM_DOT4 == 1
// Pairs of 16 bits: of the even bytes, and of the odd ones.
template <> struct Products<8> {
    typedef int16_t Number;
    static constexpr bool EVEN_FIRST = true, IS_SIGNED = false;

    Int16 sums = {};

    void add(UInt16 w, const Number *x) {
        __m256i even = _mm256_set1_epi32(four_bytes(x)), odd = _mm256_set1_epi32(four_bytes(x + 2));
        EACH_PART {
            __m256i bytes = (__m256i)w.parts[p], &sum = (__m256i &)sums.parts[p];
            sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_and_si256(bytes, _mm256_set1_epi16(255)), even));
            sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_srli_epi16(bytes, 8), odd));
        }
    }

    Int16 total() const { return sums; }
};

// 16 bits hold the sum of 16 products with 4 bits, which is at most 16 * 15 * 127.
template <> struct Products<4> {
    typedef int8_t Number;
    static constexpr bool EVEN_FIRST = false, IS_SIGNED = false;

    __m256i pairs[PARTS] = {};

    void add(UInt16 w, const Number *x) {
        __m256i four = _mm256_set1_epi32(four_bytes(x));
        EACH_PART pairs[p] = _mm256_add_epi16(pairs[p], _mm256_maddubs_epi16((__m256i)w.parts[p], four));
    }

    Int16 total() const {
        Int16 sums;
        EACH_PART sums.parts[p] = (Int16::Part)_mm256_madd_epi16(pairs[p], _mm256_set1_epi16(1));
        return sums;
    }
};
#endif
