// Products of all formats against plain sums, for a processor that is emulated: prints the largest differences.
#include "kernels.cpp"

#include <cstdio>
#include <random>

int main() {
    const long N = 131, K = 384, BATCH = 9, BLOCK = (N + 15) / 16 * 16;
    std::mt19937 random(0);
    std::normal_distribution<float> normal;
    std::vector<float> w(N * K), x(BATCH * K), y(BATCH * N), one(N), back(N * K);
    for (float &v : w) v = normal(random);
    for (float &v : x) v = normal(random);
    std::vector<uint16_t> w16(N * K), scales(BLOCK * (K / 64));
    for (long i = 0; i < N * K; i++) w16[i] = to_bf16(w[i]);
    std::vector<uint32_t> packed(BLOCK * K / 4 + 16);
    uint32_t *aligned = (uint32_t *)(((uintptr_t)packed.data() + 63) & ~(uintptr_t)63);
    int wrong = 0;
    for (long format = 0; format < 4; format++) {
        long bits = format == 2 ? 8 : 4;
        if (format >= 2) kiem_quantize(w.data(), aligned, scales.data(), N, K, bits, 0);
        const void *data = format == 0 ? (const void *)w.data() : format == 1 ? (const void *)w16.data() : aligned;
        Weight matrix = {data, scales.data(), N};
        if (format < 2) for (long i = 0; i < N * K; i++) back[i] = format ? from_bf16(w16[i]) : w[i];
        else kiem_dequantize(&matrix, nullptr, back.data(), N, K, bits, 0);
        double rounding = 0, difference = 0;
        for (long i = 0; i < N * K; i++) rounding = std::max(rounding, std::fabs(double(back[i]) - w[i]));
        Linear layer = {{matrix, {}, {}}, nullptr, nullptr, 1, K, format, 0, 0, 1, 0.0f};
        kiem_linear(&layer, x.data(), y.data(), BATCH);
        bool is_same = true;
        for (long b = 0; b < BATCH; b++) {
            kiem_linear(&layer, &x[b * K], one.data(), 1);
            is_same = is_same && !memcmp(one.data(), &y[b * N], N * sizeof(float));
            for (long n = 0; n < N; n++) {
                double sum = 0;
                for (long group = 0; group < K; group += GROUP) {  // int8 and int4 take x as whole numbers
                    float most = 0;
                    for (long i = 0; i < GROUP; i++) most = std::max(most, std::fabs(x[b * K + group + i]));
                    for (long i = 0; i < GROUP; i++) {
                        float v = x[b * K + group + i];
                        double taken = format < 2 ? v : std::nearbyint(v * (127 / most)) * double(most / 127);
                        sum += taken * back[n * K + group + i];
                    }
                }
                difference = std::max(difference, std::fabs(sum - y[b * N + n]));
            }
        }
        const char *names[] = {"fp32", "bf16", "int8", "int4"};
        const double limits[] = {0, 0.02, 0.02, 0.4};
        bool is_right = is_same && difference < 1e-4 && rounding <= limits[format];
        wrong += !is_right;
        printf("%s: products differ by %.1e, weights by %.4f, rows alone are %s: %s\n", names[format], difference,
               rounding, is_same ? "the same" : "DIFFERENT", is_right ? "right" : "WRONG");
    }
    return wrong;
}
