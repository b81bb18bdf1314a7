"""Packing conserves tokens, whatever the documents."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from kiem.config import PreprocessOptions
from kiem.data.chunks import NO_SOURCE, open_split, read_manifest
from kiem.data.documents import make_pieces
from kiem.data.prepare import packing
from kiem.data.prepare.packing import BestFitPacker, make_packer
from kiem.data.prepare.preprocess import preprocess
from kiem.data.prepare.verify import verify_directory

BOS, EOS, PAD = 2, 1, 0
documents_of_tokens = st.lists(st.lists(st.integers(3, 99), max_size=60), max_size=40)


def pieces_of(num_documents: int, first: int = 0) -> np.ndarray:
    """Returns pieces for documents whose rows are their numbers."""
    rows = np.arange(first, first + num_documents)
    return make_pieces(position=np.zeros(num_documents), start=0, file=0, row=rows, source=0)


def check_pieces(chunks: np.ndarray, documents: list[np.ndarray], pieces: np.ndarray) -> None:
    """Checks that pieces say of every token in chunks which of a document it is, or padding."""
    flat = chunks.reshape(-1)
    bounds = [*pieces["position"].tolist(), len(flat)]
    assert bounds[0] == 0
    for piece, end in zip(pieces, bounds[1:], strict=True):
        length = end - piece["position"]
        assert length > 0
        tokens = flat[piece["position"] : end]
        if piece["file"] == NO_SOURCE:
            assert (tokens == PAD).all()
        else:
            document = documents[piece["row"]]
            assert (tokens == document[piece["start"] : piece["start"] + length]).all()


def pack(
    documents: list[list[int]],
    chunk_size: int,
    flush_after: list[bool],
    method: Literal["concat", "best-fit"],
) -> np.ndarray:
    """Packs `<bos> document <eos>` and returns the chunks in the order they were handed back."""
    packer = make_packer(method, chunk_size, PAD)
    chunks = [np.empty((0, chunk_size), np.int32)]
    for document, flush in zip(documents, flush_after, strict=False):
        ids = np.array([BOS, *document, EOS], dtype=np.int32)
        packer.add(ids, np.array([len(ids)]), pieces_of(1))
        if flush:
            chunks.append(packer.full_chunks())
    chunks.append(packer.last_chunks())
    packed = np.concatenate(chunks)
    assert packed.shape[1] == chunk_size
    assert packer.num_padding_tokens == (packed == PAD).sum()
    return packed


@given(documents_of_tokens, st.integers(2, 17), st.lists(st.booleans(), min_size=40, max_size=40))
def test_concat_keeps_every_token_in_its_place(
    documents: list[list[int]], chunk_size: int, flush_after: list[bool]
) -> None:
    flat = pack(documents, chunk_size, flush_after, "concat").reshape(-1)
    tokens = [token for document in documents for token in (BOS, *document, EOS)]
    assert flat[: len(tokens)].tolist() == tokens
    assert not flat[len(tokens) :].any()
    assert len(flat) - len(tokens) < chunk_size


@given(
    st.lists(st.integers(2, 70), max_size=200),
    st.integers(2, 40),
    st.lists(st.booleans(), min_size=200, max_size=200),
)
def test_best_fit_keeps_every_token(
    lengths: list[int], chunk_size: int, flush_after: list[bool]
) -> None:
    """All tokens differ here, so each can be followed."""
    ends = np.cumsum(lengths, dtype=np.int64) + 1
    documents = [np.arange(e - n, e, dtype=np.int32) for e, n in zip(ends, lengths, strict=True)]
    beginnings = {int(document[0]) for document in documents}
    packer = make_packer("best-fit", chunk_size, PAD)
    chunks = []
    pieces = []
    for number, (document, flush) in enumerate(zip(documents, flush_after, strict=False)):
        packer.add(document, np.array([len(document)]), pieces_of(1, first=number))
        if flush:
            chunks += packer.full_chunks().tolist()
            pieces.append(packer.take_pieces())
    chunks += packer.last_chunks().tolist()
    check_pieces(np.array(chunks), documents, np.concatenate([*pieces, packer.take_pieces()]))
    found = [token for chunk in chunks for token in chunk if token != PAD]
    assert sorted(found) == list(range(1, sum(lengths) + 1))
    for chunk in chunks:
        assert len(chunk) == chunk_size
        end = chunk.index(PAD) if PAD in chunk else chunk_size
        assert not any(chunk[end:]), "padding stands at the end only"
        for before, token in pairwise(chunk[:end]):
            assert token == before + 1 or token in beginnings
    assert packer.num_padding_tokens == len(chunks) * chunk_size - len(found)
    assert packer.num_padding_tokens < 0.005 * len(found) + chunk_size


def test_best_fit_cuts_nothing_that_fits() -> None:
    lengths = [60, 40, 75, 25, 50, 30, 20, 100, 150, 50]
    tokens = np.arange(1, sum(lengths) + 1, dtype=np.int32)
    packer = make_packer("best-fit", 100, PAD)
    packer.add(tokens, np.array(lengths), pieces_of(len(lengths)))
    chunks = packer.last_chunks()
    beginnings = np.cumsum([0, *lengths[:-1]]) + 1
    assert len(chunks) == 6
    assert packer.num_padding_tokens == 0
    # All but the second half of the 150 begin where a chunk begins or inside of one.
    assert np.isin(beginnings, chunks).all()
    assert (~np.isin(chunks[:, 0], beginnings)).sum() == 1


def test_best_fit_packs_within_bounded_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "_WINDOW_TOKENS", 4096)
    generator = np.random.default_rng(0)
    packer = BestFitPacker(128, PAD)
    num_tokens = num_chunks = 0
    for _ in range(200):
        lengths = generator.integers(2, 400, size=20)
        packer.add(np.full(lengths.sum(), 7, np.int32), lengths, pieces_of(len(lengths)))
        num_tokens += int(lengths.sum())
        num_chunks += len(packer.full_chunks())
        assert packer._num_waiting < 4096
    num_chunks += len(packer.last_chunks())
    assert num_chunks * 128 == num_tokens + packer.num_padding_tokens


def test_best_fit_chunk_directory(tmp_path: Path, sample_texts: list[str]) -> None:
    """Verified, with less than 1 % of padding on real text, and every document is there."""
    lines = [json.dumps({"text": f"{text} {n}"}) for n in range(12) for text in sample_texts]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    options = PreprocessOptions(
        source=(str(tmp_path / "in.jsonl"),),
        tokenizer="train:600",
        chunk_size=1024,
        packing="best-fit",
        output_dir=tmp_path,
    )
    folder = preprocess(options, Console(quiet=True))
    manifest = verify_directory(folder)
    assert manifest == read_manifest(folder)
    train = manifest["splits"]["train"]
    assert train["padding_tokens"] < 0.01 * train["tokens"]
    chunks = open_split(folder, manifest, "train")
    ids = chunks.read(np.arange(chunks.num_chunks))
    assert (ids == manifest["special_ids"]["bos"]).sum() == train["documents"]
