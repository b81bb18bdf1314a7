// Attention of one new token in each of several sequences, with the norms of queries and keys, the rotary
// embedding, and the write into the cache.

#pragma once

#include "linear.h"

// Norm, then rotation by angles with these cosines and sines [c / 2], of one head with c values.
template <class T>
static void norm_and_rotate(const T *x, const T *weight, const float *cos, const float *sin, float *out, long c,
                            float eps) {
    static thread_local std::vector<float> normed;
    normed.resize(c);
    norm(x, weight, normed.data(), c, eps);
    for (long i = 0; i < c / 2; i++) {
        float first = normed[i], second = normed[i + c / 2];
        out[i] = first * cos[i] - second * sin[i];
        out[i + c / 2] = second * cos[i] + first * sin[i];
    }
}

// Entries of the cache that a thread attends to at a time.
static const long SPLIT = 64;
// Columns that are added up at a time: as there are registers for four heads.
static const long WIDTH = PARTS == 1 ? 64 : 16;

// What HEADS queries [HEADS, c] make of `num` entries: e^(score - highest), the highest, and their sum.
template <int HEADS, class T>
static void score(const float *q, const T *keys, const T *values, float (*weights)[SPLIT], float *highest, float *total,
                  long num, long c, float scale) {
    for (long s = 0; s < num; s++) {
        Float16 products[HEADS] = {};
        for (long i = 0; i < c; i += 16) {
            __builtin_prefetch(keys + (s + 8) * c + i);
            __builtin_prefetch(values + s * c + i);  // `weighted_sum` is next
            Float16 key = load16(keys + s * c + i);
            for (int h = 0; h < HEADS; h++) products[h] = fma(load16(q + h * c + i), key, products[h]);
        }
        for (int h = 0; h < HEADS; h++) weights[h][s] = sum(products[h]) * scale;
    }
    for (int h = 0; h < HEADS; h++) {
        highest[h] = *std::max_element(weights[h], weights[h] + num);
        Float16 sums = {};
        for (long s = 0; s < num; s += 16) {
            for (long i = num; i < s + 16; i++) weights[h][i] = -INFINITY;  // e^ is some 1e-38, beside a 1
            store(weights[h] + s, exp(load16(weights[h] + s) - highest[h]));
            sums = sums + load16(weights[h] + s);
        }
        total[h] = sum(sums);
    }
}

// Sums of `num` values, NUM_COLUMNS of c, weighted by each of HEADS rows of weights.
template <int HEADS, int NUM_COLUMNS, class T>
static void weighted_sum(const float (*weights)[SPLIT], const T *values, float *out, long num, long c) {
    Float16 partial[HEADS][NUM_COLUMNS / 16] = {};
    for (long s = 0; s < num; s++)
        for (int i = 0; i < NUM_COLUMNS / 16; i++) {
            Float16 value = load16(values + s * c + 16 * i);
            for (int h = 0; h < HEADS; h++) partial[h][i] = fma(value, broadcast(weights[h][s]), partial[h][i]);
        }
    for (int h = 0; h < HEADS; h++)
        for (int i = 0; i < NUM_COLUMNS / 16; i++) store(out + h * c + 16 * i, partial[h][i]);
}

// HEADS queries at a time share what is read of their common keys and values. Splits of the entries are
// attended to by themselves and then combined (as in Flash-Decoding).
template <int HEADS, class T>
static void attend_heads(const float *rotated, const T *keys, const T *values, const int64_t *positions, T *out,
                         long batch, long num_heads, long num_kv_heads, long c, long num_entries, float scale) {
    long num_splits = (num_entries + SPLIT - 1) / SPLIT, num_groups = batch * num_heads / HEADS;
    static thread_local std::vector<float> buffer;
    buffer.resize(num_groups * num_splits * HEADS * (c + 2));
    float *partial = buffer.data(), *highest = partial + num_groups * num_splits * HEADS * c;
    float *totals = highest + num_groups * num_splits * HEADS;
    auto num_seen = [&](long b) { return std::min<long>(positions[b] + 1, num_entries); };
#pragma omp parallel
    {
#pragma omp for schedule(dynamic, 1)
        for (long item = 0; item < num_groups * num_splits; item++) {
            long at = item / num_splits * HEADS, first = item % num_splits * SPLIT;  // at: of batch * num_heads
            long b = at / num_heads, kv_head = at % num_heads / (num_heads / num_kv_heads);
            long from = ((b * num_kv_heads + kv_head) * num_entries + first) * c;
            long num = std::min(num_seen(b) - first, SPLIT);
            if (num <= 0) continue;
            alignas(64) float weights[HEADS][SPLIT];
            score<HEADS>(rotated + at * c, keys + from, values + from, weights, highest + item * HEADS,
                         totals + item * HEADS, num, c, scale);
            float *to = partial + item * HEADS * c;
            long i = 0;
            for (; i + WIDTH <= c; i += WIDTH) weighted_sum<HEADS, WIDTH>(weights, values + from + i, to + i, num, c);
            for (; i < c; i += 16) weighted_sum<HEADS, 16>(weights, values + from + i, to + i, num, c);
        }
#pragma omp for schedule(static)
        for (long at = 0; at < batch * num_heads; at++) {
            long end = (num_seen(at / num_heads) + SPLIT - 1) / SPLIT;
            long first = at / HEADS * num_splits * HEADS + at % HEADS;
            float most = -INFINITY, total = 0;
            for (long split = 0; split < end; split++) most = std::max(most, highest[first + split * HEADS]);
            for (long split = 0; split < end; split++) {
                float &weight = highest[first + split * HEADS];
                weight = std::exp(weight - most);
                total += weight * totals[first + split * HEADS];
            }
            for (long i = 0; i < c; i += 16) {
                Float16 combined = {};
                for (long split = 0; split < end; split++) {
                    long place = first + split * HEADS;
                    combined = fma(load16(partial + place * c + i), broadcast(highest[place] / total), combined);
                }
                store16(out + at * c + i, combined);
            }
        }
    }
}

template <class T>
static void attend(const T *qkv, const T *q_norm, const T *k_norm, const float *cos, const float *sin, T *keys,
                   T *values, const int64_t *positions, T *out, long batch, long num_heads, long num_kv_heads, long c,
                   long num_entries, float eps, float scale) {
    static thread_local std::vector<float> buffer;
    buffer.resize((batch * num_heads + 1) * c);
    float *rotated = buffer.data(), *rotated_key = rotated + batch * num_heads * c;
    for (long b = 0; b < batch; b++) {
        const T *q = qkv + b * (num_heads + 2 * num_kv_heads) * c;
        const float *cos_b = cos + b * c / 2, *sin_b = sin + b * c / 2;
        for (long h = 0; h < num_heads; h++)
            norm_and_rotate(q + h * c, q_norm, cos_b, sin_b, rotated + (b * num_heads + h) * c, c, eps);
        for (long h = 0; h < num_kv_heads; h++) {
            const T *k = q + (num_heads + h) * c;
            long to = ((b * num_kv_heads + h) * num_entries + positions[b] % num_entries) * c;
            norm_and_rotate(k, k_norm, cos_b, sin_b, rotated_key, c, eps);
            for (long i = 0; i < c; i += 16) store16(keys + to + i, load16(rotated_key + i));
            memcpy(values + to, k + num_kv_heads * c, c * sizeof(T));
        }
    }
#define ATTEND_HEADS(HEADS) \
    attend_heads<HEADS>(rotated, keys, values, positions, out, batch, num_heads, num_kv_heads, c, num_entries, scale)
    long group = num_heads / num_kv_heads;
    if (group % 4 == 0) ATTEND_HEADS(4);
    else if (group % 2 == 0) ATTEND_HEADS(2);
    else ATTEND_HEADS(1);
#undef ATTEND_HEADS
}
