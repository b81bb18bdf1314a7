"""The most frequent tokens and n-grams of chunks."""

from __future__ import annotations

import numpy as np

from kiem.data.clean.ngrams import group_equal, hash_ngrams

_MOST_CANDIDATES = 10_000


def frequent_ngrams(
    chunks: np.ndarray, n: int, special_ids: list[int], most: int
) -> list[tuple[np.ndarray, int]]:
    """Returns the most frequent n-grams of tokens, each with how often it occurs.

    Of n-grams that overlap where they first occur, such as the parts of a longer phrase, only the
    most frequent is returned.

    Args:
        chunks: int32 [chunks, chunk_size].
        n: tokens in an n-gram; none goes beyond a chunk.
        special_ids: those of <bos>, <eos> and <pad>, which are in no n-gram.
        most: how many to return at most.
    """
    num_chunks, chunk_size = chunks.shape
    ids = chunks.reshape(-1)
    is_special = np.logical_or.reduce([ids == token for token in special_ids])
    num_special = np.concatenate([[0], np.cumsum(is_special, dtype=np.int64)])
    # Where n-grams begin: in every chunk, as far as they fit into it.
    firsts_of_chunks = np.arange(num_chunks)[:, None] * chunk_size
    starts = (firsts_of_chunks + np.arange(chunk_size - n + 1)).ravel()
    starts = starts[num_special[starts + n] == num_special[starts]]
    firsts, counts = group_equal(hash_ngrams(ids.astype(np.uint64), n)[starts])
    # Only so many are looked at: sorting millions would take longer than counting them.
    lowest = 2
    if len(counts) > _MOST_CANDIDATES:
        lowest = max(lowest, int(np.partition(counts, -_MOST_CANDIDATES)[-_MOST_CANDIDATES]))
    is_frequent = counts >= lowest
    firsts, counts = starts[firsts[is_frequent]], counts[is_frequent]
    found: list[tuple[np.ndarray, int]] = []
    shown: list[int] = []
    for place in np.lexsort((firsts, -counts)).tolist():
        if len(found) == most:
            break
        start = int(firsts[place])
        if all(abs(start - other) >= n for other in shown):
            shown.append(start)
            found.append((ids[start : start + n], int(counts[place])))
    return found


def tokens_that_cover(counts: np.ndarray, share: float) -> int:
    """Returns how many different tokens, the most frequent ones, make up a share of a text."""
    ordered = np.cumsum(np.sort(counts)[::-1])
    return int(np.searchsorted(ordered, share * ordered[-1])) + 1
