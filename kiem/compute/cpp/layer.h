// All layers for one new token in each of several sequences: four products and the attention of each.

#pragma once

#include "attention.h"
#include "linear.h"

// kernels.py has its twin.
struct Layer {
    Linear qkv, o_proj, gate_up, down;
    const void *q_norm, *k_norm;
    long num_heads, num_kv_heads, head_dim;
    float scale;
};

// Keys and values of a layer, [slots, num_kv_heads, num_entries, head_dim] each. kernels.py has its twin.
struct LayerCache {
    void *keys, *values;
    long num_entries, is_sliding;
};

// All layers and the last norm. kernels.py has its twin.
struct TextModel {
    const Layer *layers;
    const void *norm;  // weights of the last one
    long num_layers;
    float eps;
};

// One layer; y may be x.
template <class T>
static void run_layer(const Layer &layer, const LayerCache &cache, const T *x, const float *cos, const float *sin,
                      const int64_t *positions, T *y, long batch, long first_slot) {
    static thread_local std::vector<T> qkv, attended, residual, hidden;
    long queries = layer.num_heads * layer.head_dim, keys = layer.num_kv_heads * layer.head_dim;
    long skipped = first_slot * cache.num_entries * keys;
    qkv.resize(batch * (queries + 2 * keys));
    attended.resize(batch * queries);
    residual.resize(batch * layer.qkv.k);
    hidden.resize(batch * layer.down.k);
    linear<T>(layer.qkv, x, nullptr, qkv.data(), batch);
    attend(qkv.data(), (const T *)layer.q_norm, (const T *)layer.k_norm, cos, sin, (T *)cache.keys + skipped,
           (T *)cache.values + skipped, positions, attended.data(), batch, layer.num_heads, layer.num_kv_heads,
           layer.head_dim, cache.num_entries, layer.qkv.eps, layer.scale);
    linear<T>(layer.o_proj, attended.data(), x, residual.data(), batch);
    linear<T>(layer.gate_up, residual.data(), nullptr, hidden.data(), batch);
    linear<T>(layer.down, hidden.data(), residual.data(), y, batch);
}

// All layers and the last norm, in place; cos, sin: [2, batch, head_dim / 2], of full layers and of sliding ones.
template <class T>
static void run_layers(const TextModel &model, const LayerCache *cache, T *x, const float *cos, const float *sin,
                       const int64_t *positions, long batch, long first_slot) {
    long width = model.layers[0].qkv.k, angles = batch * model.layers[0].head_dim / 2;
    for (long i = 0; i < model.num_layers; i++) {
        long skipped = cache[i].is_sliding ? angles : 0;
        run_layer(model.layers[i], cache[i], x, cos + skipped, sin + skipped, positions, x, batch, first_slot);
    }
    std::vector<float> normed(width);
    for (long b = 0; b < batch; b++) {
        norm(x + b * width, (const T *)model.norm, normed.data(), width, model.eps);
        for (long i = 0; i < width; i += 16) store16(x + b * width + i, load16(&normed[i]));
    }
}
