// Matrix products of fp32 on the matrix units that x86 processors have for bf16 (AMX).
//
// c[i, j] = sum_k a[i, k] b[k, j]. Each factor is split into three numbers of bf16 that add up to it,
// high + mid + low: 8 bits of the fraction each, all 24. Of their nine products six are added up in fp32;
// the other three are below 2^-24 of the whole, what fp32 itself rounds away. So the result is as good as
// that of fp32 units, which take longer: a matrix unit does 16 times as much at once
// (arXiv:1904.06376). Infinities become NaN, and values below 2^-110 lose digits.
//
// The factors are packed into tiles as the units load them. The one with fewer lines (rows of a, columns of
// b) is packed whole, as far as KEPT_BYTES allow; of the other a block of lines at a time, by the thread
// that multiplies it. Sums are made in one order, whatever the number of threads or lines.
//
//     tile: 16 lines x 32 k of bf16    step: 32 k    panel: 32 lines, step after step

#include <immintrin.h>
#include <omp.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>

static const long TILE = 16, STEP = 32, PANEL = 32, PARTS = 3;
static const long TILE_BYTES = 1024, PART_BYTES = 2 * TILE_BYTES, STEP_BYTES = PARTS * PART_BYTES;
// A block of k for BLOCK_LINES lines, 885 KB, stays in a core's second cache, with a panel it is multiplied by.
static const long BLOCK_K = 576, BLOCK_LINES = 256;
static const long KEPT_BYTES = 16L << 20;

// A factor: `num_lines` lines, `line` and `k` floats apart from one line and one k to the next; one is 1.
struct Factor {
    const float *values;
    long num_lines, line, k;
    bool by_pairs;  // of k, as the units want b: [k / 2, line, 2] in a tile; else [line, k], as they want a

    const float *at(long line_number, long k_number) const { return values + line_number * line + k_number * k; }
};

static long ceil_div(long a, long b) { return (a + b - 1) / b; }

// The first `num` of 16 lanes, none for negative ones.
static __mmask16 first(long num) { return num >= 16 ? 0xFFFF : num > 0 ? (1u << num) - 1 : 0; }

struct Buffer {
    char *bytes = nullptr;
    long size = 0;

    ~Buffer() { free(bytes); }

    char *of(long wanted) {
        if (wanted > size) {
            const long huge_page = 1 << 21;
            free(bytes);
            size = ceil_div(wanted, huge_page) * huge_page;
            bytes = (char *)aligned_alloc(huge_page, size);
            if (!bytes) abort();
            madvise(bytes, size, MADV_HUGEPAGE);  // a system that has none ignores it
        }
        return bytes;
    }
};

// Each thread keeps its own: the kept factor of the calls it makes, and the blocks it packs.
static thread_local Buffer kept_buffer, block_buffer;

static __m512 rounded_to_bf16(__m512 x) {
    __m512i bits = _mm512_add_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(0x8000));
    return _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(0xFFFF0000)));
}

// Splits 32 floats into high, mid and low, each 32 of bf16 in the order that `order` says.
static void split(__m512 a, __m512 b, __m512i order, __m512i parts[PARTS]) {
    for (int part = 0; part < PARTS; part++) {
        bool is_last = part == PARTS - 1;  // 8 bits or fewer are left, or NaN, which rounding may lose
        __m512 of_a = is_last ? a : rounded_to_bf16(a), of_b = is_last ? b : rounded_to_bf16(b);
        parts[part] = _mm512_permutex2var_epi16(_mm512_castps_si512(of_a), order, _mm512_castps_si512(of_b));
        a = _mm512_sub_ps(a, of_a);
        b = _mm512_sub_ps(b, of_b);
    }
}

// Which of the 64 halves of two registers of floats hold bf16: those of a, then those of b; or by turns.
static __m512i order_of(bool by_turns) {
    alignas(64) uint16_t order[32];
    for (int i = 0; i < 16; i++) {
        order[by_turns ? 2 * i : i] = 2 * i + 1;
        order[by_turns ? 2 * i + 1 : 16 + i] = 32 + 2 * i + 1;
    }
    return _mm512_load_si512(order);
}

static void transpose(__m512i rows[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            rows[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
            rows[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
        }
    for (int half = 0; half < 16; half += 8)
        for (int i = half; i < half + 4; i++) {
            t[i] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0x88);
            t[i + 4] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0xdd);
        }
    for (int i = 0; i < 8; i++) {
        rows[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        rows[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    }
}

// Packs a tile of each part. Lines and k that do not exist are zeros.
template <bool BY_PAIRS, bool K_IS_DENSE>
static void pack_tiles(const float *from, long stride, long num_lines, long num_k, char *to) {
    const __m512i order = order_of(!K_IS_DENSE);
    __m512i tiles[PARTS][16];
    for (long i = 0; i < 16; i++) {  // a line; or a pair of k for all lines
        __m512 a = _mm512_setzero_ps(), b = a;
        if (K_IS_DENSE && i < num_lines) {
            a = _mm512_maskz_loadu_ps(first(num_k), from + i * stride);
            b = _mm512_maskz_loadu_ps(first(num_k - 16), from + i * stride + 16);
        }
        if (!K_IS_DENSE && 2 * i < num_k) a = _mm512_maskz_loadu_ps(first(num_lines), from + 2 * i * stride);
        if (!K_IS_DENSE && 2 * i + 1 < num_k) b = _mm512_maskz_loadu_ps(first(num_lines), from + (2 * i + 1) * stride);
        __m512i parts[PARTS];
        split(a, b, order, parts);
        for (int part = 0; part < PARTS; part++) tiles[part][i] = parts[part];
    }
    for (int part = 0; part < PARTS; part++) {
        if (BY_PAIRS == K_IS_DENSE) transpose(tiles[part]);
        for (int i = 0; i < 16; i++) _mm512_store_si512(to + part * PART_BYTES + i * 64, tiles[part][i]);
    }
}

// Packs 32 lines, from `line` on, and k from `k` to `end`.
static void pack_panel(const Factor &factor, long line, long k, long end, char *to) {
    for (; k < end; k += STEP, to += STEP_BYTES)
        for (long half = 0; half < 2; half++) {
            long at = line + half * TILE, num_lines = std::min(factor.num_lines - at, TILE), num_k = std::min(end - k, STEP);
            if (num_lines < 0) at = line, num_lines = 0;
            bool is_dense = factor.k == 1;
            auto pack = factor.by_pairs ? (is_dense ? pack_tiles<true, true> : pack_tiles<true, false>)
                                        : (is_dense ? pack_tiles<false, true> : pack_tiles<false, false>);
            pack(factor.at(at, k), is_dense ? factor.line : factor.k, num_lines, num_k, to + half * TILE_BYTES);
        }
}

// out[32, 32] = the product of two panels. Fetches `num_next` lines of the caches from `next` on meanwhile.
// A tile is loaded as soon as the one in its register has met both tiles of the other factor, so loads take
// place during products; the last ones are of the step that follows a panel in memory, and not used.
static void multiply_panels(const char *a, const char *b, long num_steps, const char *next, long num_next, float *out) {
    const long num_fetched = ceil_div(num_next, num_steps);
    // Registers 0 to 3 hold sums, 4 and 5 the upper and lower tile of a, 6 and 7 the left and right one of b.
    auto load_upper = [&](long part) { _tile_loadd(4, a + part * PART_BYTES, 64); };
    auto load_lower = [&](long part) { _tile_loadd(5, a + part * PART_BYTES + TILE_BYTES, 64); };
    auto load_left = [&](long part) { _tile_loadd(6, b + part * PART_BYTES, 64); };
    auto load_right = [&](long part) { _tile_loadd(7, b + part * PART_BYTES + TILE_BYTES, 64); };
    auto upper_left = [] { _tile_dpbf16ps(0, 4, 6); };
    auto upper_right = [] { _tile_dpbf16ps(1, 4, 7); };
    auto lower_left = [] { _tile_dpbf16ps(2, 5, 6); };
    auto lower_right = [] { _tile_dpbf16ps(3, 5, 7); };
    // Multiply what is loaded, and load another part of one factor.
    auto next_a = [&](long part) {
        upper_left(), upper_right(), load_upper(part);
        lower_left(), lower_right(), load_lower(part);
    };
    auto next_b = [&](long part) {
        upper_left(), lower_left(), load_left(part);
        upper_right(), lower_right(), load_right(part);
    };
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    load_upper(0), load_left(2), load_right(2), load_lower(0);
    for (long step = 0; step < num_steps; step++) {
        for (long i = 0; i < num_fetched; i++, next += 64) _mm_prefetch(next, _MM_HINT_T1);
        // Parts 0, 1, 2 are high, mid, low; in an order that changes one factor at a time.
        next_b(1), next_a(1), next_b(0), next_a(0), next_a(2);
        a += STEP_BYTES, b += STEP_BYTES;
        upper_left(), lower_left(), load_left(2);
        upper_right(), load_upper(0), lower_right(), load_right(2), load_lower(0);
    }
    _tile_stored(0, out, 4 * PANEL);
    _tile_stored(1, out + TILE, 4 * PANEL);
    _tile_stored(2, out + TILE * PANEL, 4 * PANEL);
    _tile_stored(3, out + TILE * PANEL + TILE, 4 * PANEL);
}

static void fetch_block(const float *c, long c_row, long num_rows) {
    for (long i = 0; i < std::min(num_rows, PANEL); i++)
        for (long j = 0; j < PANEL; j += TILE) _mm_prefetch(c + i * c_row + j, _MM_HINT_T0);
}

// Writes what exists of [32, 32] to c, or adds it.
static void put_block(const float *from, float *c, long c_row, long num_rows, long num_columns, bool adds) {
    for (long i = 0; i < std::min(num_rows, PANEL); i++)
        for (long j = 0; j < PANEL; j += TILE) {
            const __mmask16 exist = first(num_columns - j);
            __m512 values = _mm512_load_ps(from + i * PANEL + j);
            if (adds) values = _mm512_add_ps(values, _mm512_maskz_loadu_ps(exist, c + i * c_row + j));
            _mm512_mask_storeu_ps(c + i * c_row + j, exist, values);
        }
}

// Asks the system for the matrix units, and says whether this process may use them.
extern "C" void kiem_may_multiply(long *may) {
    const long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    *may = syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}

// c[m, n] = a[m, k] b[k, n], or added to c, whose rows are c_row floats apart; the others' strides likewise.
extern "C" void kiem_multiply(const float *a, long a_row, long a_column, const float *b, long b_row, long b_column, float *c,
                              long c_row, long m, long n, long k, long adds, long num_threads) {
    const Factor lines_a = {a, m, a_row, a_column, false}, lines_b = {b, n, b_column, b_row, true};
    const bool keeps_a = m <= n;
    const Factor kept = keeps_a ? lines_a : lines_b, other = keeps_a ? lines_b : lines_a;
    const long num_kept = ceil_div(kept.num_lines, PANEL);
    const long most_k = KEPT_BYTES / (num_kept * PANEL * PARTS * 2);
    const long kept_k = std::min(ceil_div(k, STEP) * STEP, std::max(BLOCK_K, most_k / BLOCK_K * BLOCK_K));
    const long num_blocks = ceil_div(ceil_div(other.num_lines, BLOCK_LINES), num_threads) * num_threads;
    const long block_lines = ceil_div(ceil_div(other.num_lines, num_blocks), PANEL) * PANEL;
    // One step more in each buffer: multiply_panels loads what follows a panel.
    char *const kept_panels = kept_buffer.of((num_kept * (kept_k / STEP) + 1) * STEP_BYTES);
#pragma omp parallel num_threads(num_threads)
    {
        struct {
            uint8_t palette = 1, start = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } config;
        _tile_loadconfig(&config);
        alignas(64) float out[PANEL * PANEL];
        char *const block = block_buffer.of((block_lines / PANEL * (BLOCK_K / STEP) + 1) * STEP_BYTES);
        for (long k_begin = 0; k_begin < k; k_begin += kept_k) {
            const long k_end = std::min(k, k_begin + kept_k), kept_steps = ceil_div(k_end - k_begin, STEP);
#pragma omp for schedule(static)
            for (long i = 0; i < num_kept; i++)
                pack_panel(kept, i * PANEL, k_begin, k_end, kept_panels + i * kept_steps * STEP_BYTES);
            // As they come: one core may be slower than another for a while.
#pragma omp for schedule(dynamic)
            for (long number = 0; number < num_blocks; number++) {
                const long line_begin = number * block_lines;
                const long line_end = std::min(other.num_lines, line_begin + block_lines);
                const long num_panels = std::max(0L, ceil_div(line_end - line_begin, PANEL));
                for (long at = k_begin; at < k_end && num_panels > 0; at += BLOCK_K) {
                    const long end = std::min(k_end, at + BLOCK_K), num_steps = ceil_div(end - at, STEP);
                    const long panel_bytes = num_steps * STEP_BYTES;
                    for (long j = 0; j < num_panels; j++)
                        pack_panel(other, line_begin + j * PANEL, at, end, block + j * panel_bytes);
                    const bool adds_here = adds || at > 0;
                    const long num_next = ceil_div(panel_bytes / 64, num_panels);
                    for (long i = 0; i < num_kept; i++) {
                        const char *const panel = kept_panels + (i * kept_steps + (at - k_begin) / STEP) * STEP_BYTES;
                        const char *const next = panel + kept_steps * STEP_BYTES;
                        for (long j = 0; j < num_panels; j++) {
                            const char *const of_block = block + j * panel_bytes;
                            const long lines = line_begin + j * PANEL;
                            const long row = keeps_a ? i * PANEL : lines, column = keeps_a ? lines : i * PANEL;
                            float *const to = c + row * c_row + column;
                            fetch_block(to, c_row, m - row);
                            multiply_panels(keeps_a ? panel : of_block, keeps_a ? of_block : panel, num_steps,
                                            next + j * num_next * 64, num_next, out);
                            put_block(out, to, c_row, m - row, n - column, adds_here);
                        }
                    }
                }
            }
        }
        _tile_release();
    }
}
