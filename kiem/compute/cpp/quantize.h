// Quantization as kiem/compute/quantize.py describes it, and back.

#pragma once

#include "linear.h"

static const int NUM_STEPS = 7;
static const float INT4_STEPS[16] = {-8.0f, -7.5f, -7.0f, -6.5f, 6.5f, 7.0f, 7.5f, 1, 1, 1, 1, 1, 1, 1, 1, 1};
static const float SMALLEST_NORMAL = 1.17549435e-38f;

static inline float inverse_of(float scale) { return std::fabs(scale) < SMALLEST_NORMAL ? 0.0f : 1.0f / scale; }

static inline Float16 numbers_of(Float16 weights, float inverse, float least, float most) {
    return min(max(round(weights * inverse), broadcast(least)), broadcast(most));
}

// 128 weights: numbers, and their scale.
static float quantize_group8(const float *weights, Float16 *numbers) {
    Float16 most = {};
    for (int i = 0; i < 8; i++) most = max(most, abs(load16(weights + 16 * i)));
    float scale = from_bf16(to_bf16(max_of(most) / 127.0f * 1.00390625f)), inverse = inverse_of(scale);
    for (int i = 0; i < 8; i++) numbers[i] = numbers_of(load16(weights + 16 * i), inverse, -127.0f, 127.0f);
    return scale;
}

// 64 weights: numbers, and the scale with the least squared error.
static float quantize_group4(const float *weights, Float16 *numbers) {
    float extreme = weights[0];
    for (int i = 1; i < 64; i++) extreme = std::fabs(weights[i]) > std::fabs(extreme) ? weights[i] : extreme;
    alignas(64) float scales[16], inverses[16];
    store(scales, to_bf16_and_back(broadcast(extreme) / load(INT4_STEPS)));
    for (int i = 0; i < NUM_STEPS; i++) inverses[i] = inverse_of(scales[i]);
    float errors[NUM_STEPS];
    for (int i = 0; i < NUM_STEPS; i++) {
        Float16 squares[4];
        for (int j = 0; j < 4; j++) {
            Float16 part = load16(weights + 16 * j), error = numbers_of(part, inverses[i], -8.0f, 7.0f) * scales[i] - part;
            squares[j] = error * error;
        }
        errors[i] = sum((squares[0] + squares[2]) + (squares[1] + squares[3]));
    }
    int best = int(std::min_element(errors, errors + NUM_STEPS) - errors);
    if (!(errors[best] < INFINITY)) {  // weights whose squares are beyond fp32: as in torch
        for (int j = 0; j < 4; j++) numbers[j] = Float16{};
        return 0;
    }
    for (int j = 0; j < 4; j++) numbers[j] = numbers_of(load16(weights + 16 * j), inverses[best], -8.0f, 7.0f);
    return scales[best];
}

template <int BITS, class T>
static void quantize(const T *weights, uint32_t *packed, uint16_t *scales, long num_rows, long k) {
    typedef Packed<BITS> Format;
    const long words_of_row = k * BITS / 32, scaled = Format::SCALED;
#pragma omp parallel for schedule(dynamic, 4)
    for (long block = 0; block < (num_rows + 15) / 16; block++)
        for (long lane = 0; lane < 16; lane++) {
            uint32_t *to = packed + block * words_of_row * 16 + lane;
            uint16_t *scale = scales + block * (k / scaled) * 16 + lane;
            for (long at = 0; at < k; at += scaled, scale += 16) {
                float group[Format::SCALED];
                Float16 numbers[Format::SCALED / 16] = {};
                bool is_there = 16 * block + lane < num_rows;
                for (long i = 0; i < scaled; i += 16)
                    store(group + i, is_there ? load16(weights + (16 * block + lane) * k + at + i) : (Float16){});
                *scale = to_bf16(BITS == 8 ? quantize_group8(group, numbers) : quantize_group4(group, numbers));
                uint8_t bytes[Format::SCALED];
                for (long i = 0; i < scaled; i++) bytes[i] = uint8_t(int(((float *)numbers)[i]) + Format::OFFSET);
                for (long i = 0; i < scaled; i += 128 / BITS / 4, to += 16) {
                    uint32_t word, upper;
                    memcpy(&word, bytes + i, sizeof word);
                    if (BITS == 4) {
                        memcpy(&upper, bytes + i + 4, sizeof upper);
                        word |= upper << 4;
                    }
                    *to = word;
                }
            }
        }
}

// Chosen rows of a matrix, or the first ones where `ids` is null, as fp32 or bf16 [num_ids, k].
template <class Format, class Y>
static void dequantize(const Format &format, const int64_t *ids, Y *out, long num_ids, long k) {
#pragma omp parallel
    {
        std::vector<float> row(k);
#pragma omp for schedule(static)
        for (long i = 0; i < num_ids; i++) {
            format.dequantize_row(ids ? ids[i] : i, row.data());
            for (long at = 0; at < k; at += 16) store16(out + i * k + at, load16(&row[at]));
        }
    }
}
