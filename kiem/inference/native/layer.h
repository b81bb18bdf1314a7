// A whole layer for one new token in each of several sequences: four products and the attention.

#pragma once

#include "attend.h"
#include "linear.h"

// kernels.py has its twin.
struct Layer {
    Product project, join, widen, narrow;
    const void *q_gain, *k_gain;
    long num_heads, num_kv_heads, c;
    float scale;
};

template <class T>
static void run_layer(const Layer &layer, const T *x, const float *cos, const float *sin, T *keys, T *values,
                      const int64_t *positions, T *y, long batch, long first_slot, long num_entries) {
    static thread_local std::vector<T> projected, mixed, middle, wide;
    long queries = layer.num_heads * layer.c, skipped = first_slot * layer.num_kv_heads * num_entries * layer.c;
    projected.resize(batch * (queries + 2 * layer.num_kv_heads * layer.c));
    mixed.resize(batch * queries);
    middle.resize(batch * layer.project.k);
    wide.resize(batch * layer.narrow.k);
    linear<T>(layer.project, x, nullptr, projected.data(), batch);
    attend(projected.data(), (const T *)layer.q_gain, (const T *)layer.k_gain, cos, sin, keys + skipped,
           values + skipped, positions, mixed.data(), batch, layer.num_heads, layer.num_kv_heads, layer.c, num_entries,
           layer.project.eps, layer.scale);
    linear<T>(layer.join, mixed.data(), x, middle.data(), batch);
    linear<T>(layer.widen, middle.data(), nullptr, wide.data(), batch);
    linear<T>(layer.narrow, wide.data(), middle.data(), y, batch);
}
