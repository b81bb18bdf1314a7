"""Attention within documents: where they begin in a batch, and who sees whom."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kiem.compute.attention import same_document
from kiem.optim.batch import document_starts

BOS = 2


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize(("rows", "length"), [(1, 1), (1, 9), (3, 5), (4, 300)])
def test_documents_are_those_between_bos(rows: int, length: int, share: float) -> None:
    """Also where a chunk goes on with a document of the one before, and where all are short."""
    generator = np.random.default_rng(rows)
    chunks = np.where(generator.random((rows, length)) < share, BOS, 7)
    starts = document_starts(chunks, BOS)
    assert starts.dtype == np.int32
    assert starts[0] == 0 and starts[-1] == chunks.size
    assert (np.diff(starts) >= 0).all()
    document = (torch.from_numpy(chunks) == BOS).cumsum(1)
    found = same_document(torch.from_numpy(starts), rows, length)
    assert torch.equal(found, document[:, :, None] == document[:, None, :])


def test_batches_of_one_size_have_starts_of_one_size() -> None:
    """For another one torch.compile would compile the layers again."""
    chunks = np.full((4, 128), 7)
    sizes = set()
    for num_documents in range(512):
        sizes.add(len(document_starts(chunks, BOS)))
        chunks.flat[num_documents] = BOS
    assert sizes == {33, 129, 513}
