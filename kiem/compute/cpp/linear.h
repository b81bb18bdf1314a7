// Matrix products of few rows with weights that stay as they are stored, y[b, n] = sum_k x[b, k] w[n, k].
//
// Decoding reads every weight once for a handful of rows, so memory is the limit: while some rows of a
// matrix are multiplied, those that the thread takes next are fetched into its cache. All sums of a row are
// made in the same order, whatever the number of rows: a row's result does not depend on its neighbours.
//
// int8 and int4 weights are multiplied in whole numbers. 16 rows of the matrix lie interleaved, so that a
// vector holds four values of each of 16 rows, multiplied with the same four values of x. Weights are
// stored plus an offset that makes them unsigned; x is rounded to int8 with a scale for every 32 values,
// and a sum begins at minus the offset times the sum of these x, unless the products leave the offset out.

#pragma once

#include <vector>

#include "parallel.h"
#include "vectors.h"

static const long GROUP = 32;  // values of x with one scale
// Rows of x at a time: as many as there are registers for their sums.
static const long MAX_BATCH = PARTS == 1 ? 8 : 4;
// Unrolled, GCC adds up the products of all words last, and has no registers for them without AVX-512: on AVX2
// products with int8 then take 1.4 times as long.
#if NATIVE_BYTES == 64
#define UNROLL_WORDS _Pragma("GCC unroll 8")
#else
#define UNROLL_WORDS _Pragma("GCC unroll 1")
#endif
// Rows of x that all rows of a matrix are multiplied with before the next ones: they stay in a cache.
static const long TILE = 32;

// A matrix [num_rows, k]; kernels.py has its twin.
struct Weight {
    const void *data;
    const uint16_t *scales;  // bf16; of int8 and int4
    long num_rows;
};

// Rows of x as the formats want them.
struct Rows {
    long k;
    float *values;    // [batch, k]
    void *numbers;    // [batch, k], of the type and in the order that `Products` takes
    float *scales;    // [batch, k / GROUP]
    int32_t *starts;  // [batch, k / GROUP]: -offset times the sum of a group's numbers; 0 for signed products
};

// fp32 or bf16, row after row.
template <class T> struct Plain {
    static constexpr int ROWS = 4, OFFSET = 0;
    const T *weights;
    long num_rows, k;

    Plain(const Weight &matrix, long k) : weights((const T *)matrix.data), num_rows(matrix.num_rows), k(k) {}

    const char *address(long n) const { return (const char *)(weights + n * k); }

    template <int NUM_ROWS, int BATCH>
    void dot_rows(long n, const Rows &x, long from, float (*out)[16], long ahead) const {
        Float16 sums[NUM_ROWS][BATCH] = {};
        const T *w = weights + n * k;
        for (long at = 0; at < k; at += 32) {
            for (int r = 0; r < NUM_ROWS; r++)
                for (long i = 0; i < 32; i += 64 / sizeof(T)) prefetch((const char *)(w + r * k + at + i) + ahead);
#pragma GCC unroll 2
            for (int i = 0; i < 32; i += 16) {
                Float16 ws[NUM_ROWS];
                for (int r = 0; r < NUM_ROWS; r++) ws[r] = load16(w + r * k + at + i);
#pragma GCC unroll 8
                for (int b = 0; b < BATCH; b++) {
                    Float16 xs = load16(x.values + (from + b) * k + at + i);
                    for (int r = 0; r < NUM_ROWS; r++) sums[r][b] = fma(ws[r], xs, sums[r][b]);
                }
            }
        }
        for (int r = 0; r < NUM_ROWS; r++)
            for (int b = 0; b < BATCH; b++) out[b][r] = sum(sums[r][b]);
    }

    template <int BATCH> void dot(long n, const Rows &x, long from, float (*out)[16], const char *next) const {
        const int together = std::min(ROWS, (PARTS == 1 ? 16 : 4) / BATCH);  // as there are registers
        long end = std::min(n + ROWS, num_rows), row = n, ahead = next - address(n);
        for (; row + together <= end; row += together)
            dot_rows<together, BATCH>(row, x, from, lanes(out, row - n), ahead);
        for (; row < end; row++) dot_rows<1, BATCH>(row, x, from, lanes(out, row - n), ahead);
    }

    static float (*lanes(float (*out)[16], long lane))[16] { return (float (*)[16])(out[0] + lane); }

    void dequantize_row(long n, float *out) const {
        for (long at = 0; at < k; at += 16) store(out + at, load16(weights + n * k + at));
    }
};

// Whole numbers of 8 or 4 bits: [num_rows / 16, k / values in a word, 16 rows, one word of 32 bits].
// A word of 8 bits holds four values of a row; one of 4 bits eight, the first four in the lower half of
// each byte. Scales: [num_rows / 16, k / SCALED, 16 rows]. The last rows are filled up to 16.
template <int BITS> struct Packed {
    static constexpr int ROWS = 16, OFFSET = BITS == 8 ? 128 : 8;
    typedef typename Products<BITS>::Number Number;
    static const long SCALED = BITS == 8 ? 128 : 64;  // weights with one scale
    static const long WORDS = GROUP * BITS / 32;      // vectors of a group
    const UInt16 *weights;
    const uint16_t *scales;
    long k;

    Packed(const Weight &matrix, long k) : weights((const UInt16 *)matrix.data), scales(matrix.scales), k(k) {}

    const char *address(long n) const { return (const char *)(weights + n / ROWS * (k / GROUP * WORDS)); }

    template <int BATCH> void dot(long n, const Rows &x, long from, float (*out)[16], const char *next) const {
        Float16 sums[BATCH] = {};
        const long ahead = next - address(n);
        const UInt16 *w = weights + n / ROWS * (k / GROUP * WORDS);
        const uint16_t *scale = scales + n * (k / SCALED);
        for (long at = 0; at < k; at += SCALED, scale += ROWS) {
            Float16 parts[BATCH] = {};
            for (long group = at / GROUP; group < (at + SCALED) / GROUP; group++, w += WORDS) {
                Products<BITS> products[BATCH];
                const Number *numbers = (const Number *)x.numbers + from * k + group * GROUP;
                UNROLL_WORDS
                for (int i = 0; i < WORDS; i++) {
                    prefetch((const char *)(w + i) + ahead);
                    UInt16 words = w[i];
#pragma GCC unroll 8
                    for (int b = 0; b < BATCH; b++) {
                        if (BITS == 8) {
                            products[b].add(words, numbers + b * k + 4 * i);
                        } else {
                            products[b].add(words & 0x0f0f0f0fu, numbers + b * k + 8 * i);
                            products[b].add((words >> 4) & 0x0f0f0f0fu, numbers + b * k + 8 * i + 4);
                        }
                    }
                }
                for (int b = 0; b < BATCH; b++) {
                    long of_x = (from + b) * (k / GROUP) + group;
                    Float16 whole = to_float(products[b].total() + x.starts[of_x]);
                    parts[b] = fma(whole, broadcast(x.scales[of_x]), parts[b]);
                }
            }
            for (int b = 0; b < BATCH; b++) sums[b] = fma(parts[b], load16(scale), sums[b]);
        }
        for (int b = 0; b < BATCH; b++) store(out[b], sums[b]);
    }

    void dequantize_row(long n, float *out) const {
        long lane = n % ROWS;
        const uint32_t *w = (const uint32_t *)(weights + n / ROWS * (k / GROUP * WORDS)) + lane;
        const uint16_t *scale = scales + n / ROWS * ROWS * (k / SCALED) + lane;
        for (long at = 0; at < k; at += GROUP) {
            uint32_t words[8];
            for (int i = 0; i < WORDS; i++, w += ROWS) {
                if (BITS == 8) {
                    words[i] = *w;
                } else {
                    words[2 * i] = *w & 0x0f0f0f0fu;
                    words[2 * i + 1] = (*w >> 4) & 0x0f0f0f0fu;
                }
            }
            const uint8_t *numbers = (const uint8_t *)words;
            float step = from_bf16(scale[at / SCALED * ROWS]);
            for (int i = 0; i < GROUP; i++) out[at + i] = float(int(numbers[i]) - OFFSET) * step;
        }
    }
};

// Products of the rows from number n on with some of x; `next` is what to fetch meanwhile.
template <class Format>
static void dot_batch(const Format &format, long n, const Rows &x, long from, long batch, float (*out)[16],
                      const char *next) {
    switch (batch) {
        case 1: format.template dot<1>(n, x, from, out, next); break;
        case 2: format.template dot<2>(n, x, from, out, next); break;
        case 3: format.template dot<3>(n, x, from, out, next); break;
        case 4: format.template dot<4>(n, x, from, out, next); break;
#if NATIVE_BYTES == 64
        case 5: format.template dot<5>(n, x, from, out, next); break;
        case 6: format.template dot<6>(n, x, from, out, next); break;
        case 7: format.template dot<7>(n, x, from, out, next); break;
        case 8: format.template dot<8>(n, x, from, out, next); break;
#endif
    }
}

// y [batch, width] of the weights' rows one after the other; or, gated, gelu of the first matrix's
// times the second's.
template <class Format>
static void multiply(const Weight *weights, long num_weights, bool is_gated, const Rows &x, long batch, float *y,
                     long width) {
    long num_parts = is_gated ? 1 : num_weights, first_items[4] = {}, first_rows[4] = {};
    for (long m = 0; m < num_parts; m++) {
        first_items[m + 1] = first_items[m] + (weights[m].num_rows + Format::ROWS - 1) / Format::ROWS;
        first_rows[m + 1] = first_rows[m] + weights[m].num_rows;
    }
    auto part_of = [&](long item) {
        long m = 0;
        while (item >= first_items[m + 1]) m++;
        return m;
    };
    auto run = [&](long item, long next_item, long from, long end) {
        long m = part_of(item), next_m = part_of(next_item), n = (item - first_items[m]) * Format::ROWS;
        long num_rows = std::min<long>(Format::ROWS, weights[m].num_rows - n);
        Format format(weights[m], x.k), second(weights[is_gated ? 1 : m], x.k);
        const char *next = Format(weights[next_m], x.k).address((next_item - first_items[next_m]) * Format::ROWS);
        for (; from < end; from += MAX_BATCH) {
            long some = std::min(MAX_BATCH, end - from);
            alignas(64) float out[MAX_BATCH][16], up[MAX_BATCH][16];
            dot_batch(format, n, x, from, some, out, is_gated ? second.address(n) : next);
            if (is_gated) {
                dot_batch(second, n, x, from, some, up, next);
                for (long b = 0; b < some; b++) store(out[b], gelu(load(out[b])) * load(up[b]));
            }
            for (long b = 0; b < some; b++)
                memcpy(y + (from + b) * width + first_rows[m] + n, out[b], num_rows * sizeof(float));
        }
    };
    for (long from = 0; from < batch; from += TILE)
        parallel_for(first_items[num_parts],
                     [&](long item, long next_item) { run(item, next_item, from, std::min(from + TILE, batch)); });
}

// Rounds row b of x to int8, with a scale for every 32 values: the largest magnitude becomes 127.
template <int BITS> static void round_row(const Rows &x, long b) {
    typedef Products<BITS> P;
    typename P::Number *numbers = (typename P::Number *)x.numbers;
    for (long at = b * x.k; at < (b + 1) * x.k; at += GROUP) {
        Float16 first = load16(x.values + at), second = load16(x.values + at + 16);
        float most = max_of(max(abs(first), abs(second)));
        float inverse = most > 0 ? 127 / most : 0;
        int32_t whole[GROUP], total = 0;
        store(whole, to_int(round(first * inverse)));
        store(whole + 16, to_int(round(second * inverse)));
        for (int i = 0; i < GROUP; i++) {
            bool is_inner = i % 4 == 1 || i % 4 == 2;
            numbers[at + i] = whole[P::EVEN_FIRST && is_inner ? i ^ 3 : i];
            total += whole[i];
        }
        x.scales[at / GROUP] = most / 127;
        x.starts[at / GROUP] = P::IS_SIGNED ? 0 : -Packed<BITS>::OFFSET * total;
    }
}

// y = x / sqrt(mean(x^2) + eps) * (1 + weight), of n values.
template <class X, class T> static void norm(const X *x, const T *weight, float *y, long n, float eps) {
    Float16 squares = {};
    for (long i = 0; i < n; i += 16) squares = fma(load16(x + i), load16(x + i), squares);
    float factor = 1.0f / std::sqrt(sum(squares) / n + eps);
    for (long i = 0; i < n; i += 16) store(y + i, load16(x + i) * factor * (load16(weight + i) + 1.0f));
}

// One to three matrices side by side, and the norms around them; kernels.py has its twin.
struct Linear {
    Weight weights[3];
    const void *norm_before, *norm_after;  // weights of norms, or null
    long num_weights, k, format;           // format: 0 fp32, 1 bf16, 2 int8, 3 int4
    long is_gated, is_bf16, y_is_fp32;     // is_bf16: norms, x, residual and y, unless it is fp32
    float eps;
};

template <class T>
static void linear(const Linear &layer, const T *x, const T *residual, void *y, long batch) {
    long k = layer.k, groups = k / GROUP, width = 0;
    for (long m = 0; m < (layer.is_gated ? 1 : layer.num_weights); m++) width += layer.weights[m].num_rows;
    static thread_local std::vector<float> values, scales, sums;
    static thread_local std::vector<int16_t> numbers;
    static thread_local std::vector<int32_t> starts;
    values.resize(batch * k);
    if (layer.format >= 2) {
        numbers.resize(batch * k);
        scales.resize(batch * groups);
        starts.resize(batch * groups);
    }
    Rows rows = {k, values.data(), numbers.data(), scales.data(), starts.data()};
#pragma omp parallel for if (batch >= TILE)
    for (long b = 0; b < batch; b++) {
        float *row = rows.values + b * k;
        if (layer.norm_before) norm(x + b * k, (const T *)layer.norm_before, row, k, layer.eps);
        else for (long i = 0; i < k; i += 16) store(row + i, load16(x + b * k + i));
        if (layer.format == 2) round_row<8>(rows, b);
        if (layer.format == 3) round_row<4>(rows, b);
    }
    bool is_final = layer.y_is_fp32 && !layer.norm_after && !residual;
    if (!is_final) sums.resize(batch * width + 16);
    float *out = is_final ? (float *)y : sums.data();
#define MULTIPLY(...) \
    multiply<__VA_ARGS__>(layer.weights, layer.num_weights, layer.is_gated, rows, batch, out, width)
    switch (layer.format) {
        case 0: MULTIPLY(Plain<float>); break;
        case 1: MULTIPLY(Plain<uint16_t>); break;
        case 2: MULTIPLY(Packed<8>); break;
        case 3: MULTIPLY(Packed<4>); break;
    }
#undef MULTIPLY
    if (is_final) return;
    for (long b = 0; b < batch; b++) {
        float *row = out + b * width;
        if (layer.norm_after) norm(row, (const T *)layer.norm_after, row, width, layer.eps);
        if (residual)
            for (long i = 0; i < width; i += 16) store(row + i, load16(row + i) + load16(residual + b * width + i));
    }
    T *to = (T *)y;
    long i = 0, num = batch * width;
    for (; i + 16 <= num; i += 16) store16(to + i, load16(out + i));
    T last[16];
    store16(last, load16(out + i));
    memcpy(to + i, last, (num - i) * sizeof *last);
}
