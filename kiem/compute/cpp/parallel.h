// A parallel loop whose threads help each other.

#pragma once

#include <algorithm>
#include <atomic>
#include <omp.h>
#include <vector>

// Prefetches a cache line into the second-level cache: the first is too small for what comes after the next.
static inline void prefetch(const char *line) { __builtin_prefetch(line, 0, 2); }

struct Range {
    alignas(64) std::atomic<long> next;
    long end;
};

// Calls run(item, next item) for all items, on all threads. Each thread has a range of consecutive items, which
// lie side by side in memory. Then it helps the others, since another program may delay one of them. The
// last item of a range is its own next one.
template <class Run> static void parallel_for(long num_items, const Run &run) {
    long num_ranges = omp_get_max_threads(), step = std::max(1L, num_items / (16 * num_ranges));
    std::vector<Range> ranges(num_ranges);
    for (long i = 0; i < num_ranges; i++) {
        ranges[i].next = num_items * i / num_ranges;
        ranges[i].end = num_items * (i + 1) / num_ranges;
    }
#pragma omp parallel
    for (long turn = 0; turn < num_ranges; turn++) {
        Range &range = ranges[(omp_get_thread_num() + turn) % num_ranges];
        for (;;) {
            long item = range.next.fetch_add(step, std::memory_order_relaxed), end = std::min(item + step, range.end);
            if (item >= end) break;
            for (; item < end; item++) run(item, std::min(item + 1, range.end - 1));
        }
    }
}
