"""The most frequent tokens and n-grams of chunks."""

from __future__ import annotations

import numpy as np

from kiem.data.clean.ngrams import group_equal, hash_ngrams


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
    ids = chunks.reshape(-1)
    starts = np.arange(len(ids) - n + 1)
    num_special = np.cumsum(np.concatenate([[0], np.isin(ids, special_ids)]))
    is_whole = starts % chunks.shape[1] <= chunks.shape[1] - n
    starts = starts[is_whole & (num_special[starts + n] == num_special[starts])]
    firsts, counts = group_equal(hash_ngrams(ids.astype(np.uint64), n)[starts])
    found: list[tuple[np.ndarray, int]] = []
    shown: list[int] = []
    for place in np.lexsort((firsts, -counts)).tolist():
        start = int(starts[firsts[place]])
        if len(found) == most or counts[place] < 2:
            break
        if all(abs(start - other) >= n for other in shown):
            shown.append(start)
            found.append((ids[start : start + n], int(counts[place])))
    return found


def tokens_that_cover(counts: np.ndarray, share: float) -> int:
    """Returns how many different tokens, the most frequent ones, make up a share of a text."""
    ordered = np.cumsum(np.sort(counts)[::-1])
    return int(np.searchsorted(ordered, share * ordered[-1])) + 1
