"""Block sizes for work on large matrices of logits."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

# Entries of the vocabulary whose weights are cast at a time.
VOCABULARY_SLICE = 8192
# Fewer rows make the matrix products slow (80 GFLOP/s at 64 rows, 290 at 512, on two CPU cores),
# and each block adds to the weight's gradient once more; more take memory.
_MAX_ROWS, _MIN_ROWS = 1024, 256
_MAX_BLOCK_BYTES = 1 << 30
_ELEMENTS_IN_CACHE = 1 << 20


def rows_per_block(vocab_size: int, element_bytes: int) -> int:
    """Returns for how many tokens there are logits at a time, whose elements have so many bytes."""
    return min(_MAX_ROWS, max(_MIN_ROWS, _MAX_BLOCK_BYTES // (vocab_size * element_bytes)))


def rows_in_cache(matrix: Tensor) -> Iterator[slice]:
    """Yields the rows that elementwise operations go over together.

    On a CPU these are so few that they stay in its cache meanwhile; elsewhere, and for fake tensors
    without data (planning/dry_run.py), all rows.
    """
    num_rows = max(1, len(matrix))
    if matrix.device.type == "cpu" and type(matrix) in (Tensor, nn.Parameter):
        num_rows = max(1, _ELEMENTS_IN_CACHE // matrix.shape[1])
    for start in range(0, len(matrix), num_rows):
        yield slice(start, start + num_rows)
