"""Which document each token is of: what is read at the recorded place encodes to those tokens."""

from __future__ import annotations

import gzip
import itertools
import json
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from kiem.config import PreprocessOptions
from kiem.core.errors import ExitCode, UserError
from kiem.core.files import write_json
from kiem.data import documents
from kiem.data.chunks import open_split, read_manifest, read_tokenizer
from kiem.data.clean.cleaner import normalize
from kiem.data.documents import DocumentWriter, make_pieces, open_documents
from kiem.data.prepare import packing, units
from kiem.data.prepare.preprocess import preprocess
from kiem.data.prepare.verify import verify_directory
from kiem.tokenizer.tokenizer import Tokenizer

QUIET = Console(quiet=True)
PARTS = ("a.jsonl", "b.parquet", "c.jsonl.gz", "d.txt", "e.json")


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many units, of several parts of files; windows and batches that are full several times."""
    monkeypatch.setattr(units, "UNIT_BYTES", 3_000)
    monkeypatch.setattr(packing, "_WINDOW_TOKENS", 4_000)
    monkeypatch.setattr(documents, "_BATCH_ROWS", 16)


@pytest.fixture
def options(tmp_path: Path, sample_texts: list[str], trained: Tokenizer) -> PreprocessOptions:
    """Of files of several kinds, with lines that are no documents, duplicates and bad rows."""
    folder = tmp_path / "in"
    folder.mkdir()
    (tmp_path / "tokenizer.json").write_bytes(trained.json_bytes)
    texts = [sample_texts[n::5] for n in range(5)]
    lines = [json.dumps({"text": f"{text}\r\n\x07Slot.", "source": "web"}) for text in texts[0]]
    lines[3:3] = ["", "", lines[1], '{"text": 3}']
    (folder / "a.jsonl").write_text("\n".join(lines) + "\n\n")
    rows = [*texts[1], texts[0][0], None, *texts[1][:2]]
    sources = [("web", "wiki", None)[n % 3] for n in range(len(rows))]
    table = pa.table({"text": rows, "source": sources})
    pq.write_table(table, folder / "b.parquet", row_group_size=2)
    packed = [json.dumps({"text": text}) for text in texts[2]]
    (folder / "c.jsonl.gz").write_bytes(gzip.compress("\n\n".join(packed).encode()))
    (folder / "d.txt").write_text("\n%%\n\n".join(texts[3]))
    (folder / "e.json").write_text(json.dumps([{"text": text} for text in texts[4]], indent=1))
    return PreprocessOptions(
        source=(str(folder),),
        document_separator="%%",
        tokenizer=str(tmp_path / "tokenizer.json"),
        chunk_size=48,
        test_split=0.2,
        on_bad_document="skip",
        output_dir=tmp_path / "out",
        num_proc=1,
    )


def read_text(file: str, row: int) -> str:
    """Returns the document at a line or row, read without kiem."""
    path = Path(file)
    if path.suffix == ".parquet":
        return pq.read_table(path)["text"][row - 1].as_py()
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if path.suffix == ".json":
        return json.loads(data)[row - 1]["text"]
    lines = data.decode().split("\n")[row - 1 :]
    if path.suffix == ".txt":
        return "\n".join(itertools.takewhile(lambda line: line != "%%", lines))
    return json.loads(lines[0])["text"]


def check(folder: Path, numbers: dict[str, list[int]] | None = None) -> set[str]:
    """Compares each token of chunks with the text at its place; returns the names of the files."""
    manifest = verify_directory(folder)
    tokenizer = read_tokenizer(folder, manifest)
    files, cut = list(manifest["documents_per_file"]), manifest.get("cut_for_test", {})
    found = set()
    for split in ("train", "test"):
        counts, chunks = manifest["splits"][split], open_split(folder, manifest, split)
        pieces = open_documents(folder, manifest, split)
        for number in (numbers or {}).get(split, range(chunks.num_chunks)):
            ids = chunks.read(np.array([number]))[0]
            end = 0
            for piece in pieces.in_chunk(number):
                assert piece.chunk == number and piece.offset == end
                end += piece.length
                text = read_text(files[piece.file], piece.row)
                if manifest["options"]["clean"] == "dutch":
                    text = normalize(text)
                if f"{files[piece.file]}:{piece.row}" in cut.get("places", ()):
                    place = len(text.encode()[: cut["train_bytes"]].decode())
                    text = text[:place] if split == "train" else text[place:]
                tokens = [tokenizer.bos_id, *tokenizer.encode_batch([text])[0], tokenizer.eos_id]
                assert (
                    ids[piece.offset : end].tolist()
                    == (tokens[piece.start : piece.start + piece.length])
                )
                assert counts["source_names"][piece.source] in counts["documents_per_source"]
                found.add(Path(files[piece.file]).name)
            assert (ids[end:] == tokenizer.pad_id).all()
    return found


@pytest.mark.parametrize("method", ["concat", "best-fit"])
@pytest.mark.parametrize("clean", ["none", "dutch"])
def test_text_at_the_recorded_place_encodes_to_the_tokens(
    method: str, clean: str, options: PreprocessOptions
) -> None:
    changes = {"packing": method, "clean": clean, "near_duplicates": clean == "dutch"}
    made = replace(options, **changes)
    folder = preprocess(made, QUIET)
    assert check(folder) == {*PARTS}
    # The record is the same whoever made it.
    other = preprocess(replace(made, name="other", num_proc=3), QUIET)
    for file in sorted((folder / "documents").iterdir()):
        assert file.read_bytes() == (other / "documents" / file.name).read_bytes()


@pytest.mark.parametrize("method", ["concat", "best-fit"])
def test_documents_that_are_cut_for_the_test_split(
    method: str, options: PreprocessOptions, tmp_path: Path, sample_texts: list[str]
) -> None:
    lines = [json.dumps({"text": "\n\n".join(sample_texts[:8])})] * 2
    (tmp_path / "two.jsonl").write_text("\n\n".join(lines))
    source = (str(tmp_path / "two.jsonl"),)
    made = replace(options, source=source, document_separator=None, packing=method)
    folder = preprocess(made, QUIET)
    assert read_manifest(folder)["cut_for_test"]["places"] == [f"{source[0]}:{n}" for n in (1, 3)]
    assert check(folder) == {"two.jsonl"}


@pytest.mark.parametrize("method", ["concat", "best-fit"])
def test_sources_with_weights_that_begin_chunks(method: str, options: PreprocessOptions) -> None:
    source = tuple(f"{options.source[0]}/{name}" for name in PARTS[:3])
    given = {"source": source, "weights": (1.0, 2.0, 3.0), "document_separator": None}
    assert check(preprocess(replace(options, packing=method, **given), QUIET)) == {*PARTS[:3]}


def test_a_word_limit_ends_the_record(options: PreprocessOptions) -> None:
    folder = preprocess(replace(options, dataset_size="1k"), QUIET)
    assert check(folder) == {"a.jsonl"}


@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(2, 20))
def test_pieces_of_any_lengths_are_found(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], chunk_size: int
) -> None:
    """In every chunk, wherever pieces begin in batches of the file; the last one is padding."""
    lengths.append(-sum(lengths) % chunk_size or chunk_size)
    ends = np.cumsum(lengths)
    folder = tmp_path_factory.mktemp("pieces")
    writer = DocumentWriter(folder / "documents" / "train.arrow", ExitStack())
    files = np.array([0] * (len(lengths) - 1) + [-1])
    rows = np.arange(len(lengths))
    columns = {"position": ends - lengths, "start": 0, "file": files, "row": rows, "source": 0}
    writer.write(make_pieces(**columns))
    num_chunks = int(ends[-1]) // chunk_size
    counts = {"document_shards": [writer.close()], "chunks": num_chunks}
    manifest = {"options": {"chunk_size": chunk_size}, "splits": {"train": counts}}
    pieces = open_documents(folder, manifest, "train")
    expected = [(row, start) for row in rows[:-1] for start in range(lengths[row])]
    found = [
        (piece.row, piece.start + token)
        for number in range(num_chunks)
        for piece in pieces.in_chunk(number)
        for token in range(piece.length)
    ]
    assert found == expected


def test_damage_to_the_record_is_found(options: PreprocessOptions) -> None:
    folder = preprocess(options, QUIET)
    file = folder / "documents" / "train.arrow"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="damaged") as caught:
        verify_directory(folder)
    assert caught.value.where == str(file)
    file.unlink()
    with pytest.raises(UserError, match="cannot be read") as caught:
        open_documents(folder, read_manifest(folder), "train")
    assert caught.value.exit_code == ExitCode.DAMAGED


def test_earlier_chunk_directories_say_that_they_have_no_record(options: PreprocessOptions) -> None:
    folder = preprocess(options, QUIET)
    manifest = read_manifest(folder)
    del manifest["sha256"]
    for counts in manifest["splits"].values():
        del counts["document_shards"]
    write_json(folder / "manifest.json", manifest)
    with pytest.raises(UserError, match=r"does not record its documents.*\n.*--dataset-path"):
        open_documents(folder, read_manifest(folder), "train")
