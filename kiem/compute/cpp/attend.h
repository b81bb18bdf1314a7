// Attention of one new token in each of several sequences, with the norms of queries and keys, their
// rotary turn, and the write into the cache.

#pragma once

#include "linear.h"

// Norm, then the rotary turn by angles with these cosines and sines [c / 2], of one head with c values.
template <class T>
static void norm_and_turn(const T *x, const T *gain, const float *cos, const float *sin, float *out, long c, float eps) {
    static thread_local std::vector<float> normed;
    normed.resize(c);
    norm(x, gain, normed.data(), c, eps);
    for (long i = 0; i < c / 2; i++) {
        float first = normed[i], second = normed[i + c / 2];
        out[i] = first * cos[i] - second * sin[i];
        out[i + c / 2] = second * cos[i] + first * sin[i];
    }
}

// A thread's share: so many entries of the cache.
static const long PART = 64;

// What HEADS queries [HEADS, c] make of `num` entries: e^(score - highest), the highest, and their sum.
template <int HEADS, class T>
static void score(const float *q, const T *keys, const T *values, float (*powers)[PART], float *highest, float *total,
                  long num, long c, float scale) {
    for (long s = 0; s < num; s++) {
        Float16 products[HEADS] = {};
        for (long i = 0; i < c; i += 16) {
            __builtin_prefetch(keys + (s + 8) * c + i);
            __builtin_prefetch(values + s * c + i);  // `mix` is next
            Float16 key = load16(keys + s * c + i);
            for (int h = 0; h < HEADS; h++) products[h] = fma(load16(q + h * c + i), key, products[h]);
        }
        for (int h = 0; h < HEADS; h++) powers[h][s] = sum(products[h]) * scale;
    }
    for (int h = 0; h < HEADS; h++) {
        highest[h] = *std::max_element(powers[h], powers[h] + num);
        Float16 sums = {};
        for (long s = 0; s < num; s += 16) {
            for (long i = num; i < s + 16; i++) powers[h][i] = -INFINITY;  // e^ is some 1e-38, beside a 1
            store(powers[h] + s, exponential(load16(powers[h] + s) - highest[h]));
            sums += load16(powers[h] + s);
        }
        total[h] = sum(sums);
    }
}

// Sums of `num` values, WIDTH columns of c, weighted by each of HEADS rows of powers.
template <int HEADS, int WIDTH, class T>
static void mix(const float (*powers)[PART], const T *values, float *out, long num, long c) {
    Float16 mixed[HEADS][WIDTH / 16] = {};
    for (long s = 0; s < num; s++)
        for (int i = 0; i < WIDTH / 16; i++) {
            Float16 value = load16(values + s * c + 16 * i);
            for (int h = 0; h < HEADS; h++) mixed[h][i] = fma(value, spread(powers[h][s]), mixed[h][i]);
        }
    for (int h = 0; h < HEADS; h++)
        for (int i = 0; i < WIDTH / 16; i++) store(out + h * c + 16 * i, mixed[h][i]);
}

// HEADS queries at a time share what is read of the keys and values that they all look at. Parts of the
// entries are attended to by themselves and then joined (as in Flash-Decoding).
template <int HEADS, class T>
static void attend_heads(const float *turned, const T *keys, const T *values, const int64_t *positions, T *out,
                         long batch, long num_heads, long num_kv_heads, long c, long num_entries, float scale) {
    long num_parts = (num_entries + PART - 1) / PART, num_groups = batch * num_heads / HEADS;
    static thread_local std::vector<float> buffer;
    buffer.resize(num_groups * num_parts * HEADS * (c + 2));
    float *mixed = buffer.data(), *highest = mixed + num_groups * num_parts * HEADS * c;
    float *totals = highest + num_groups * num_parts * HEADS;
    auto num_seen = [&](long b) { return std::min<long>(positions[b] + 1, num_entries); };
#pragma omp parallel
    {
#pragma omp for schedule(dynamic, 1)
        for (long item = 0; item < num_groups * num_parts; item++) {
            long at = item / num_parts * HEADS, first = item % num_parts * PART;  // at: of batch * num_heads
            long b = at / num_heads, kv_head = at % num_heads / (num_heads / num_kv_heads);
            long from = ((b * num_kv_heads + kv_head) * num_entries + first) * c;
            long num = std::min(num_seen(b) - first, PART);
            if (num <= 0) continue;
            alignas(64) float powers[HEADS][PART];
            score<HEADS>(turned + at * c, keys + from, values + from, powers, highest + item * HEADS,
                         totals + item * HEADS, num, c, scale);
            float *to = mixed + item * HEADS * c;
            long i = 0;
            for (; i + 64 <= c; i += 64) mix<HEADS, 64>(powers, values + from + i, to + i, num, c);
            for (; i < c; i += 16) mix<HEADS, 16>(powers, values + from + i, to + i, num, c);
        }
#pragma omp for schedule(static)
        for (long at = 0; at < batch * num_heads; at++) {
            long end = (num_seen(at / num_heads) + PART - 1) / PART, first = at / HEADS * num_parts * HEADS + at % HEADS;
            float most = -INFINITY, total = 0;
            for (long part = 0; part < end; part++) most = std::max(most, highest[first + part * HEADS]);
            for (long part = 0; part < end; part++) {
                float &weight = highest[first + part * HEADS];
                weight = std::exp(weight - most);
                total += weight * totals[first + part * HEADS];
            }
            for (long i = 0; i < c; i += 16) {
                Float16 joined = {};
                for (long part = 0; part < end; part++) {
                    long place = first + part * HEADS;
                    joined = fma(load16(mixed + place * c + i), spread(highest[place] / total), joined);
                }
                store16(out + at * c + i, joined);
            }
        }
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
            norm_and_turn(q + h * c, q_gain, cos + b * c / 2, sin + b * c / 2, turned + (b * num_heads + h) * c, c, eps);
        for (long h = 0; h < num_kv_heads; h++) {
            const T *k = q + (num_heads + h) * c;
            long to = ((b * num_kv_heads + h) * num_entries + positions[b] % num_entries) * c;
            norm_and_turn(k, k_gain, cos + b * c / 2, sin + b * c / 2, turned_key, c, eps);
            for (long i = 0; i < c; i += 16) store16(keys + to + i, load16(turned_key + i));
            memcpy(values + to, k + num_kv_heads * c, c * sizeof(T));
        }
    }
#define ATTEND_HEADS(HEADS) \
    attend_heads<HEADS>(turned, keys, values, positions, out, batch, num_heads, num_kv_heads, c, num_entries, scale)
    long sharing = num_heads / num_kv_heads;
    if (sharing % 4 == 0) ATTEND_HEADS(4);
    else if (sharing % 2 == 0) ATTEND_HEADS(2);
    else ATTEND_HEADS(1);
#undef ATTEND_HEADS
}
