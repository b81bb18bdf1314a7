// What decoding does on the CPU, for kiem/compute/kernels.py: the functions that it calls.

#include "layer.h"
#include "linear.h"
#include "quantize.h"

// A product with what stands around it. x: [batch, k]; residual: as y, or null; y: [batch, rows of the
// matrices], of the first one if it is gated.
extern "C" void kiem_linear(const Product *product, const void *x, const void *residual, void *y, long batch) {
    if (product->is_bf16) linear(*product, (const uint16_t *)x, (const uint16_t *)residual, y, batch);
    else linear(*product, (const float *)x, (const float *)residual, y, batch);
}

// All layers and the last norm for one new token in each of `batch` slots, the first of them number
// `first_slot`. x: [batch, width], replaced by the result; cos, sin: fp32 [2, batch, c / 2], of full layers
// and of sliding ones; the token at position p is entry p % num_entries of what a layer holds. All but cos
// and sin are bf16 or all fp32.
extern "C" void kiem_layers(const Body *body, const Held *held, void *x, const float *cos, const float *sin,
                            const int64_t *positions, long batch, long first_slot) {
    if (body->layers[0]->project.is_bf16) run_layers(*body, held, (uint16_t *)x, cos, sin, positions, batch, first_slot);
    else run_layers(*body, held, (float *)x, cos, sin, positions, batch, first_slot);
}

// Weights [num_rows, k] in fp32 or bf16 to 8 or 4 bits.
extern "C" void kiem_quantize(const void *weights, uint32_t *stored, uint16_t *scales, long num_rows, long k,
                              long bits, long is_bf16) {
#define QUANTIZE(BITS)                                                                              \
    is_bf16 ? quantize<BITS>((const uint16_t *)weights, stored, scales, num_rows, k)                \
            : quantize<BITS>((const float *)weights, stored, scales, num_rows, k)
    if (bits == 8) QUANTIZE(8);
    else QUANTIZE(4);
#undef QUANTIZE
}

// Rows of weights of 8 or 4 bits: those in `ids`, or the first `num_ids` where it is null.
extern "C" void kiem_unpack(const Matrix *matrix, const int64_t *ids, void *out, long num_ids, long k, long bits,
                            long out_is_bf16) {
#define UNPACK(BITS)                                                                             \
    out_is_bf16 ? unpack(Packed<BITS>(*matrix, k), ids, (uint16_t *)out, num_ids, k)             \
                : unpack(Packed<BITS>(*matrix, k), ids, (float *)out, num_ids, k)
    if (bits == 8) UNPACK(8);
    else UNPACK(4);
#undef UNPACK
}
