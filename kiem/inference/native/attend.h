// Attention of one new token in each of several sequences, with the norms of queries and keys, their
// rotary turn, and the write into the cache.

#pragma once

#include "linear.h"

// Norm, then the rotary turn by angles with these cosines and sines, of one head with c values.
template <class T>
static void norm_and_turn(const T *x, const T *gain, const float *cos, const float *sin, float *out, long c, float eps) {
    static thread_local std::vector<float> normed;
    normed.resize(c);
    norm(x, gain, normed.data(), c, eps);
    for (long i = 0; i < c / 2; i++) {
        float first = normed[i], second = normed[i + c / 2];
        out[i] = first * cos[i] - second * sin[i];
        out[i + c / 2] = second * cos[i + c / 2] + first * sin[i + c / 2];
    }
}

// One query head against the first `num_entries` keys and values.
template <class T>
static void attend_head(const float *q, const T *keys, const T *values, T *out, long num_entries, long c, float scale) {
    static thread_local std::vector<float> scores;
    scores.resize(num_entries + 16);
    float highest = -INFINITY;
    for (long s = 0; s < num_entries; s++) {
        Float16 products = {};
        for (long i = 0; i < c; i += 16) products = fma(load16(q + i), load16(keys + s * c + i), products);
        scores[s] = sum(products) * scale;
        highest = std::max(highest, scores[s]);
    }
    for (int i = 0; i < 16; i++) scores[num_entries + i] = -INFINITY;
    float total = 0;
    for (long s = 0; s < num_entries; s += 16) {
        store(&scores[s], exponential(load16(&scores[s]) - highest));
        for (long i = s; i < std::min(s + 16, num_entries); i++) total += scores[i];
    }
    for (long i = 0; i < c; i += 16) {
        Float16 mixed = {};
        for (long s = 0; s < num_entries; s++) mixed = fma(load16(values + s * c + i), spread(scores[s]), mixed);
        store16(out + i, mixed / total);
    }
}

template <class T>
static void attend(const T *projected, const T *q_gain, const T *k_gain, const float *cos, const float *sin, T *keys,
                   T *values, const int64_t *positions, T *out, long batch, long num_heads, long num_kv_heads, long c,
                   long num_entries, float eps, float scale) {
    static thread_local std::vector<float> buffer;
    buffer.resize((batch * num_heads + 1) * c);
    float *turned = buffer.data(), *turned_key = turned + batch * num_heads * c;
    for (long b = 0; b < batch; b++) {
        const T *q = projected + b * (num_heads + 2 * num_kv_heads) * c;
        for (long h = 0; h < num_heads; h++)
            norm_and_turn(q + h * c, q_gain, cos + b * c, sin + b * c, turned + (b * num_heads + h) * c, c, eps);
        for (long h = 0; h < num_kv_heads; h++) {
            const T *k = q + (num_heads + h) * c;
            long to = ((b * num_kv_heads + h) * num_entries + positions[b] % num_entries) * c;
            norm_and_turn(k, k_gain, cos + b * c, sin + b * c, turned_key, c, eps);
            for (long i = 0; i < c; i += 16) store16(keys + to + i, load16(turned_key + i));
            memcpy(values + to, k + num_kv_heads * c, c * sizeof(T));
        }
    }
#pragma omp parallel for schedule(dynamic, 1)
    for (long head = 0; head < batch * num_heads; head++) {
        long b = head / num_heads, kv_head = head % num_heads / (num_heads / num_kv_heads);
        long held = (b * num_kv_heads + kv_head) * num_entries * c;
        long seen = std::min(positions[b] + 1, int64_t(num_entries));
        attend_head(turned + head * c, keys + held, values + held, out + head * c, seen, c, scale);
    }
}
