// All layers for one new token in each of several sequences: four products and the attention of each.

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

// What a layer remembers: keys and values, [slots, num_kv_heads, num_entries, c] each. kernels.py has its twin.
struct Held {
    void *keys, *values;
    long num_entries, is_sliding;
};

// What stays the same from token to token. kernels.py has its twin.
struct Body {
    const Layer *const *layers;
    const void *gain;  // of the last norm
    long num_layers;
    float eps;
};

// One layer; y may be x.
template <class T>
static void run_layer(const Layer &layer, const Held &held, const T *x, const float *cos, const float *sin,
                      const int64_t *positions, T *y, long batch, long first_slot) {
    static thread_local std::vector<T> projected, mixed, middle, wide;
    long queries = layer.num_heads * layer.c, skipped = first_slot * layer.num_kv_heads * held.num_entries * layer.c;
    projected.resize(batch * (queries + 2 * layer.num_kv_heads * layer.c));
    mixed.resize(batch * queries);
    middle.resize(batch * layer.project.k);
    wide.resize(batch * layer.narrow.k);
    linear<T>(layer.project, x, nullptr, projected.data(), batch);
    attend(projected.data(), (const T *)layer.q_gain, (const T *)layer.k_gain, cos, sin, (T *)held.keys + skipped,
           (T *)held.values + skipped, positions, mixed.data(), batch, layer.num_heads, layer.num_kv_heads, layer.c,
           held.num_entries, layer.project.eps, layer.scale);
    linear<T>(layer.join, mixed.data(), x, middle.data(), batch);
    linear<T>(layer.widen, middle.data(), nullptr, wide.data(), batch);
    linear<T>(layer.narrow, wide.data(), middle.data(), y, batch);
}

// All layers and the last norm, in place; cos, sin: [2, batch, c / 2], of full layers and of sliding ones.
template <class T>
static void run_layers(const Body &body, const Held *held, T *x, const float *cos, const float *sin,
                       const int64_t *positions, long batch, long first_slot) {
    long width = body.layers[0]->project.k, angles = batch * body.layers[0]->c / 2;
    for (long i = 0; i < body.num_layers; i++) {
        long skipped = held[i].is_sliding ? angles : 0;
        run_layer(*body.layers[i], held[i], x, cos + skipped, sin + skipped, positions, x, batch, first_slot);
    }
    std::vector<float> normed(width);
    for (long b = 0; b < batch; b++) {
        norm(x + b * width, (const T *)body.gain, normed.data(), width, body.eps);
        for (long i = 0; i < width; i += 16) store16(x + b * width + i, load16(&normed[i]));
    }
}
