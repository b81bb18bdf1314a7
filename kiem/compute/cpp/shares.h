// Work shared out among threads.

#pragma once

#include <algorithm>
#include <atomic>
#include <omp.h>
#include <vector>

// Asks for a line of memory, into the second cache: the first one is too small for what comes after the next.
static inline void fetch(const char *line) { __builtin_prefetch(line, 0, 2); }

struct Share {
    alignas(64) std::atomic<long> next;
    long end;
};

// Calls run(item, the item that comes next) for all items, on all threads. Each has a share of consecutive
// items, so that it goes on where it is in memory; then it helps the others, since another program may
// hold up one of them. The last item of a share is its own next one.
template <class Run> static void share_out(long num_items, const Run &run) {
    long num_shares = omp_get_max_threads(), piece = std::max(1L, num_items / (16 * num_shares));
    std::vector<Share> shares(num_shares);
    for (long i = 0; i < num_shares; i++) {
        shares[i].next = num_items * i / num_shares;
        shares[i].end = num_items * (i + 1) / num_shares;
    }
#pragma omp parallel
    for (long turn = 0; turn < num_shares; turn++) {
        Share &share = shares[(omp_get_thread_num() + turn) % num_shares];
        for (;;) {
            long item = share.next.fetch_add(piece, std::memory_order_relaxed), end = std::min(item + piece, share.end);
            if (item >= end) break;
            for (; item < end; item++) run(item, std::min(item + 1, share.end - 1));
        }
    }
}
