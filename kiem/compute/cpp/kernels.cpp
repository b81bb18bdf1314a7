// The functions that kiem/compute/kernels.py calls: what decoding computes on a CPU.

#include "layer.h"
#include "linear.h"
#include "quantize.h"

// y [batch, rows of the weights] of x [batch, k].
extern "C" void kiem_linear(const Linear *layer, const void *x, void *y, long batch) {
    if (layer->is_bf16) linear<uint16_t>(*layer, (const uint16_t *)x, nullptr, y, batch);
    else linear<float>(*layer, (const float *)x, nullptr, y, batch);
}

// gelu(gate) times up, in place of gate; a multiple of 16 values.
extern "C" void kiem_gate(float *gate, const float *up, long num) {
#pragma omp parallel for
    for (long i = 0; i < num; i += 16) store(gate + i, gelu(load(gate + i)) * load(up + i));
}

// All layers and the last norm for one new token in each of `batch` slots, the first of them number
// `first_slot`. x: [batch, width], replaced by the result; cos, sin: fp32 [2, batch, head_dim / 2], of full
// layers and of sliding ones; the token at position p is entry p % num_entries of a layer's cache. All but
// cos and sin are bf16, or all are fp32.
extern "C" void kiem_layers(const TextModel *model, const LayerCache *cache, void *x, const float *cos,
                            const float *sin, const int64_t *positions, long batch, long first_slot) {
    if (model->layers[0].qkv.is_bf16) run_layers(*model, cache, (uint16_t *)x, cos, sin, positions, batch, first_slot);
    else run_layers(*model, cache, (float *)x, cos, sin, positions, batch, first_slot);
}

// Weights [num_rows, k] in fp32 or bf16 to 8 or 4 bits.
extern "C" void kiem_quantize(const void *weights, uint32_t *packed, uint16_t *scales, long num_rows, long k,
                              long bits, long is_bf16) {
#define QUANTIZE(BITS)                                                                   \
    is_bf16 ? quantize<BITS>((const uint16_t *)weights, packed, scales, num_rows, k)     \
            : quantize<BITS>((const float *)weights, packed, scales, num_rows, k)
    if (bits == 8) QUANTIZE(8);
    else QUANTIZE(4);
#undef QUANTIZE
}

// Rows of weights of 8 or 4 bits: those in `ids`, or the first `num_ids` where it is null.
extern "C" void kiem_dequantize(const Weight *matrix, const int64_t *ids, void *out, long num_ids, long k,
                                long bits, long out_is_bf16) {
#define DEQUANTIZE(BITS)                                                                     \
    out_is_bf16 ? dequantize(Packed<BITS>(*matrix, k), ids, (uint16_t *)out, num_ids, k)     \
                : dequantize(Packed<BITS>(*matrix, k), ids, (float *)out, num_ids, k)
    if (bits == 8) DEQUANTIZE(8);
    else DEQUANTIZE(4);
#undef DEQUANTIZE
}
