// What decoding does on the CPU: matrix products of few rows with weights that stay as they are stored,
// y[b, n] = sum_k x[b, k] w[n, k], and around them norms and the attention of one token a sequence.
//
// Decoding reads every weight once for a handful of rows, so memory is the limit, and the weights are
// turned to fp32 on the way from memory into the multiplication. All sums of a row are made in the same
// order, whatever the number of rows: a row's result does not depend on its neighbours.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

// How far ahead of use weights are asked for: rows follow each other in memory.
static const long PREFETCH_BYTES = 4096;

typedef float Float16 __attribute__((vector_size(64)));
typedef int32_t Int16 __attribute__((vector_size(64)));
typedef uint32_t UInt16 __attribute__((vector_size(64)));
typedef uint16_t Half16 __attribute__((vector_size(32)));
typedef int8_t Byte16 __attribute__((vector_size(16)));

template <class V> static inline V load(const void *from) {
    V v;
    memcpy(&v, from, sizeof v);
    return v;
}

// GCC 12 takes its generic conversions of narrow vectors apart into single values.
static inline Float16 bf16_to_fp32(const uint16_t *from) {
#ifdef __AVX512F__
    __m256i narrow = _mm256_loadu_si256((const __m256i *)from);
    return (Float16)_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16);
#else
    return (Float16)(__builtin_convertvector(load<Half16>(from), UInt16) << 16);
#endif
}

static inline Float16 int8_to_fp32(const int8_t *from) {
#ifdef __AVX512F__
    return (Float16)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)from)));
#else
    return __builtin_convertvector(load<Byte16>(from), Float16);
#endif
}

template <class V> static inline void store(void *to, V v) { memcpy(to, &v, sizeof v); }

// To nearest, ties to even; not for NaN.
static inline void fp32_to_bf16(Float16 v, uint16_t *to) {
    UInt16 bits = (UInt16)v;
    bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
#ifdef __AVX512F__
    _mm256_storeu_si256((__m256i *)to, _mm512_cvtepi32_epi16((__m512i)bits));
#else
    store(to, __builtin_convertvector(bits, Half16));
#endif
}

static inline float from_bf16(uint16_t bits) {
    uint32_t wide = uint32_t(bits) << 16;
    float value;
    memcpy(&value, &wide, sizeof value);
    return value;
}

// How weights lie in memory. A format gives STEP weights of a row as vectors of 16 fp32 values.
struct Fp32 {
    static const long STEP = 32, STEP_BYTES = 128;
    const float *weights;
    long k;
    struct Part { const float *w; };
    const void *row(long n) const { return weights + n * k; }
    Part part(long n, long at) const { return {weights + n * k + at}; }
    static inline Float16 vector(const Part &part, int i) { return load<Float16>(part.w + 16 * i); }
};

struct Bf16 {
    static const long STEP = 32, STEP_BYTES = 64;
    const uint16_t *weights;
    long k;
    struct Part { const uint16_t *w; };
    const void *row(long n) const { return weights + n * k; }
    Part part(long n, long at) const { return {weights + n * k + at}; }
    static inline Float16 vector(const Part &part, int i) { return bf16_to_fp32(part.w + 16 * i); }
};

// int8, and a bf16 scale for every 128 values.
struct Int8 {
    static const long STEP = 128, STEP_BYTES = 128;
    const int8_t *weights;
    const uint16_t *scales;
    long k;
    struct Part { const int8_t *w; Float16 scale; };
    const void *row(long n) const { return weights + n * k; }
    Part part(long n, long at) const {
        Float16 zero = {};
        return {weights + n * k + at, zero + from_bf16(scales[(n * k + at) / STEP])};
    }
    static inline Float16 vector(const Part &part, int i) { return int8_to_fp32(part.w + 16 * i) * part.scale; }
};

// Four bits, and a bf16 scale for every 32 values. 128 values are 16 words of 32 bits: value
// 16 i + lane is nibble i of word `lane`; a nibble stands for itself minus 8.
struct Int4 {
    static const long STEP = 128, STEP_BYTES = 64;
    const uint8_t *weights;
    const uint16_t *scales;
    long k;
    struct Part { UInt16 words; const uint16_t *scales; };
    const void *row(long n) const { return weights + n * k / 2; }
    Part part(long n, long at) const {
        return {load<UInt16>(weights + (n * k + at) / 2), scales + (n * k + at) / 32};
    }
    static inline Float16 vector(const Part &part, int i) {
        const Float16 values = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
        uint32_t bits;  // two scales: broadcast together, since that needs no arithmetic
        memcpy(&bits, part.scales + i / 4 * 2, sizeof bits);
        UInt16 pair = bits - (UInt16){};
        Float16 scale = (Float16)(i / 2 % 2 ? pair & 0xffff0000u : pair << 16);
#ifdef __AVX512F__
        return __builtin_shuffle(values * scale, (Int16)(part.words >> (4 * i)));
#else
        return __builtin_convertvector((Int16)((part.words >> (4 * i)) & 15) - 8, Float16) * scale;
#endif
    }
};

static inline float sum(Float16 v) {
    float s[16];
    memcpy(s, &v, sizeof s);
    for (int width = 8; width > 0; width /= 2)
        for (int i = 0; i < width; i++) s[i] += s[i + width];
    return s[0];
}

template <class Format, int ROWS, int BATCH>
static inline void dot(const Format &format, long n, const float *x, long k, float *out, long out_stride) {
    Float16 sums[ROWS][BATCH] = {};
    const char *rows[ROWS];
    for (int r = 0; r < ROWS; r++) rows[r] = (const char *)format.row(n + r);
    for (long at = 0; at < k; at += Format::STEP) {
        typename Format::Part parts[ROWS];
        for (int r = 0; r < ROWS; r++) {
            for (long ahead = 0; ahead < Format::STEP_BYTES; ahead += 64)
                __builtin_prefetch(rows[r] + at / Format::STEP * Format::STEP_BYTES + ahead + PREFETCH_BYTES);
            parts[r] = format.part(n + r, at);
        }
#pragma GCC unroll 8
        for (int i = 0; i < Format::STEP / 16; i++) {
            Float16 w[ROWS];
            for (int r = 0; r < ROWS; r++) w[r] = Format::vector(parts[r], i);
#pragma GCC unroll 8
            for (int b = 0; b < BATCH; b++) {
                Float16 xs = load<Float16>(x + b * k + at + 16 * i);
                for (int r = 0; r < ROWS; r++) sums[r][b] += w[r] * xs;
            }
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int b = 0; b < BATCH; b++) out[b * out_stride + n + r] = sum(sums[r][b]);
}

template <class Format, int ROWS>
static void dot_rows(const Format &format, long n, const float *x, long batch, long k, float *out, long out_stride) {
    for (; batch >= 8; batch -= 8, x += 8 * k, out += 8 * out_stride)
        for (int r = 0; r < ROWS; r += 2 < ROWS ? 2 : ROWS)
            dot<Format, (ROWS < 2 ? ROWS : 2), 8>(format, n + r, x, k, out, out_stride);
    switch (batch) {
        case 1: dot<Format, ROWS, 1>(format, n, x, k, out, out_stride); break;
        case 2: dot<Format, ROWS, 2>(format, n, x, k, out, out_stride); break;
        case 3: dot<Format, ROWS, 3>(format, n, x, k, out, out_stride); break;
        case 4: dot<Format, ROWS, 4>(format, n, x, k, out, out_stride); break;
        case 5: dot<Format, ROWS, 5>(format, n, x, k, out, out_stride); break;
        case 6: dot<Format, ROWS, 6>(format, n, x, k, out, out_stride); break;
        case 7: dot<Format, ROWS, 7>(format, n, x, k, out, out_stride); break;
    }
}

template <class Format>
static void product(const Format &format, const float *x, long batch, long num_rows, long k, float *out) {
    // Not in equal halves: another program may hold up one of the threads.
#pragma omp parallel for schedule(dynamic, 32)
    for (long n = 0; n < num_rows / 4; n++) dot_rows<Format, 4>(format, 4 * n, x, batch, k, out, num_rows);
    for (long n = num_rows / 4 * 4; n < num_rows; n++) dot_rows<Format, 1>(format, n, x, batch, k, out, num_rows);
}

template <class Format>
static void unpack(const Format &format, long num_rows, long k, void *out, long out_is_bf16) {
#pragma omp parallel for schedule(static)
    for (long n = 0; n < num_rows; n++)
        for (long at = 0; at < k; at += Format::STEP) {
            typename Format::Part part = format.part(n, at);
            for (int i = 0; i < Format::STEP / 16; i++) {
                long place = n * k + at + 16 * i;
                if (out_is_bf16) fp32_to_bf16(Format::vector(part, i), (uint16_t *)out + place);
                else store((float *)out + place, Format::vector(part, i));
            }
        }
}

// y = x w^T. x, y: [batch, k], [batch, num_rows], bf16 or fp32; weights: [num_rows, k] in one of four
// formats (0 fp32, 1 bf16, 2 int8, 3 int4); scales: those of formats 2 and 3. k is a multiple of STEP.
extern "C" void kiem_linear(const void *x, const void *weights, const uint16_t *scales, void *y, long batch,
                            long num_rows, long k, long format, long x_is_bf16, long y_is_bf16) {
    static thread_local std::vector<float> x_buffer, y_buffer;
    const float *x32 = (const float *)x;
    if (x_is_bf16) {
        x_buffer.resize(batch * k);
        for (long i = 0; i < batch * k; i += 16)
            store(x_buffer.data() + i, bf16_to_fp32((const uint16_t *)x + i));
        x32 = x_buffer.data();
    }
    float *y32 = (float *)y;
    if (y_is_bf16) {
        y_buffer.resize(batch * num_rows + 16);
        y32 = y_buffer.data();
    }
    switch (format) {
        case 0: product(Fp32{(const float *)weights, k}, x32, batch, num_rows, k, y32); break;
        case 1: product(Bf16{(const uint16_t *)weights, k}, x32, batch, num_rows, k, y32); break;
        case 2: product(Int8{(const int8_t *)weights, scales, k}, x32, batch, num_rows, k, y32); break;
        case 3: product(Int4{(const uint8_t *)weights, scales, k}, x32, batch, num_rows, k, y32); break;
    }
    if (y_is_bf16) {
        uint16_t last[16], *to = (uint16_t *)y;
        long i = 0, num = batch * num_rows;
        for (; i + 16 <= num; i += 16) fp32_to_bf16(load<Float16>(y32 + i), to + i);
        fp32_to_bf16(load<Float16>(y32 + i), last);
        memcpy(to + i, last, (num - i) * sizeof *last);
    }
}

// The weights themselves, bf16 or fp32 [num_rows, k], of format 2 or 3.
extern "C" void kiem_unpack(const void *weights, const uint16_t *scales, void *out, long num_rows, long k,
                            long format, long out_is_bf16) {
    if (format == 2) unpack(Int8{(const int8_t *)weights, scales, k}, num_rows, k, out, out_is_bf16);
    else unpack(Int4{(const uint8_t *)weights, scales, k}, num_rows, k, out, out_is_bf16);
}

static inline Float16 load16(const float *from) { return load<Float16>(from); }
static inline Float16 load16(const uint16_t *from) { return bf16_to_fp32(from); }
static inline void store16(float *to, Float16 v) { store(to, v); }
static inline void store16(uint16_t *to, Float16 v) { fp32_to_bf16(v, to); }

// y = x / sqrt(mean(x^2) + eps) * (1 + gain), of n values.
template <class T, class Y> static void norm(const T *x, const T *gain, Y *y, long n, float eps) {
    Float16 squares = {};
    for (long i = 0; i < n; i += 16) squares += load16(x + i) * load16(x + i);
    float factor = 1.0f / std::sqrt(sum(squares) / n + eps);
    for (long i = 0; i < n; i += 16) store16(y + i, load16(x + i) * factor * (load16(gain + i) + 1.0f));
}

extern "C" void kiem_norm(const void *x, const void *gain, void *y, long num_rows, long n, float eps, long is_bf16) {
    for (long row = 0; row < num_rows; row++) {
        long at = row * n;
        if (is_bf16) norm((const uint16_t *)x + at, (const uint16_t *)gain, (uint16_t *)y + at, n, eps);
        else norm((const float *)x + at, (const float *)gain, (float *)y + at, n, eps);
    }
}

// Norm, then the rotary turn by angles with these cosines and sines, of one head with c values.
template <class T>
static void norm_and_turn(const T *x, const T *gain, const float *cos, const float *sin, float *out, long c, float eps) {
    std::vector<float> normed(c);
    norm(x, gain, normed.data(), c, eps);
    for (long i = 0; i < c; i++) {
        float other = i < c / 2 ? -normed[i + c / 2] : normed[i - c / 2];
        out[i] = normed[i] * cos[i] + other * sin[i];
    }
}

// One query head against the first `num_entries` keys and values.
template <class T>
static void attend_head(const float *q, const T *keys, const T *values, T *out, long num_entries, long c, float scale) {
    static thread_local std::vector<float> scores;
    scores.resize(num_entries);
    float highest = -INFINITY, total = 0;
    for (long s = 0; s < num_entries; s++) {
        Float16 products = {};
        for (long i = 0; i < c; i += 16) products += load<Float16>(q + i) * load16(keys + s * c + i);
        scores[s] = sum(products) * scale;
        highest = scores[s] > highest ? scores[s] : highest;
    }
    for (long s = 0; s < num_entries; s++) total += scores[s] = std::exp(scores[s] - highest);
    for (long i = 0; i < c; i += 16) {
        Float16 mixed = {};
        for (long s = 0; s < num_entries; s++) mixed += load16(values + s * c + i) * scores[s];
        store16(out + i, mixed / total);
    }
}

template <class T>
static void attend(const T *q, const T *k, const T *v, const T *q_gain, const T *k_gain, const float *cos,
                   const float *sin, T *keys, T *values, const int64_t *positions, T *out, long batch, long num_heads,
                   long num_kv_heads, long c, long num_entries, float eps, float scale) {
    std::vector<float> turned(batch * num_heads * c);
    for (long b = 0; b < batch; b++) {
        for (long h = 0; h < num_kv_heads; h++) {
            long from = (b * num_kv_heads + h) * c;
            long to = ((b * num_kv_heads + h) * num_entries + positions[b] % num_entries) * c;
            norm_and_turn(k + from, k_gain, cos + b * c, sin + b * c, turned.data(), c, eps);
            for (long i = 0; i < c; i += 16) store16(keys + to + i, load16(turned.data() + i));
            memcpy(values + to, v + from, c * sizeof(T));
        }
    }
    for (long b = 0; b < batch; b++)
        for (long h = 0; h < num_heads; h++) {
            long at = (b * num_heads + h) * c;
            norm_and_turn(q + at, q_gain, cos + b * c, sin + b * c, turned.data() + at, c, eps);
        }
#pragma omp parallel for schedule(static)
    for (long head = 0; head < batch * num_heads; head++) {
        long b = head / num_heads, kv_head = head % num_heads / (num_heads / num_kv_heads);
        long held = (b * num_kv_heads + kv_head) * num_entries * c;
        long seen = positions[b] + 1 < num_entries ? positions[b] + 1 : num_entries;
        attend_head(turned.data() + head * c, keys + held, values + held, out + head * c, seen, c, scale);
    }
}

// Attention of one new token in each of `batch` slots. q: [batch, num_heads, c]; k, v: [batch, num_kv_heads, c];
// gains of their norms: [c]; cos, sin: fp32 [batch, c]; keys, values: the cache, [batch, num_kv_heads, num_entries, c],
// where the token at position p is entry p % num_entries; out: as q. All but cos and sin are bf16 or all fp32.
extern "C" void kiem_attend(const void *q, const void *k, const void *v, const void *q_gain, const void *k_gain,
                            const float *cos, const float *sin, void *keys, void *values, const int64_t *positions,
                            void *out, long batch, long num_heads, long num_kv_heads, long c, long num_entries,
                            float eps, float scale, long is_bf16) {
#define ATTEND(T)                                                                                                   \
    attend((const T *)q, (const T *)k, (const T *)v, (const T *)q_gain, (const T *)k_gain, cos, sin, (T *)keys,     \
           (T *)values, positions, (T *)out, batch, num_heads, num_kv_heads, c, num_entries, eps, scale)
    if (is_bf16) ATTEND(uint16_t);
    else ATTEND(float);
}
