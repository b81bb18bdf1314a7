"""Where text comes from: the Hub dataset, local files or the built-in sample, as Documents."""

from __future__ import annotations

import glob
import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from kiem.config import DATASET_SIZES, HUB_DATASET
from kiem.data.hub import download_dataset_files
from kiem.errors import ExitCode, UserError
from kiem.files import sha256_file

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".parquet")
DEFAULT_HUB_SIZE = "10k"
_PARQUET_BATCH_ROWS = 1024


@dataclass(frozen=True)
class Document:
    """One input text.

    Attributes:
        text: the text, valid Unicode without lone surrogates, not empty.
        source: which source it is counted under.
        place: file and line or row, for messages.
    """

    text: str
    source: str
    place: str


@dataclass(frozen=True)
class Source:
    """A resolved source: files in the order they are read, and what identifies them.

    Attributes:
        name: short name, used for the chunk directory.
        paths: the files.
        names: what each file is called in messages and in the manifest.
        description: what the manifest records: kind, revision or the sha256 of every file.
    """

    name: str
    paths: list[Path]
    names: list[str]
    description: dict[str, Any] = field(default_factory=dict)


def resolve_source(source: tuple[str, ...], dataset_size: str | None) -> Source:
    """Finds (and for the Hub, downloads) the files that the `--source` option names.

    Args:
        source: ("hub",), ("sample",), or files, folders and globs.
        dataset_size: the Hub dataset's config; not looked at for other sources.

    Raises:
        UserError: unknown size, no such file, a type of file that cannot be read, or trouble with
            the Hub.
    """
    if source == ("hub",):
        return _resolve_hub(dataset_size or DEFAULT_HUB_SIZE)
    if source == ("sample",):
        path = Path(str(resources.files("kiem.data") / "sample" / "dutch.jsonl"))
        return Source(
            "sample",
            [path],
            ["sample"],
            {"kind": "sample", "sha256": {"sample": sha256_file(path)}},
        )
    if "hub" in source or "sample" in source:
        raise UserError(
            "'hub' and 'sample' stand alone",
            where="--source",
            fix="Give either one of them, or files.",
            exit_code=ExitCode.BAD_OPTION,
        )
    paths = [path for pattern in source for path in _expand(pattern)]
    repeated = sorted({str(path) for path in paths if paths.count(path) > 1})
    if repeated:
        raise UserError(
            f"named twice: {', '.join(repeated)}",
            where="--source",
            fix="Name each file once, so that its text does not count double.",
            exit_code=ExitCode.BAD_OPTION,
        )
    names = [str(path) for path in paths]
    hashes = {name: sha256_file(path) for name, path in zip(names, paths, strict=True)}
    first = Path(source[0])
    name = first.name if first.is_dir() else paths[0].name.split(".")[0]
    return Source(name, paths, names, {"kind": "files", "sha256": hashes})


def read_documents(source: Source, text_column: str) -> Iterator[Document]:
    """Yields every document of a source, in a fixed order.

    Args:
        source: what `resolve_source` returned.
        text_column: the column or key that holds the text.

    Raises:
        UserError: a file cannot be read, or a document is not text; names file and line.
    """
    for path, name in zip(source.paths, source.names, strict=True):
        if path.stat().st_size == 0:
            raise _bad_input(name, "the file is empty", "Remove it from --source.")
        try:
            if path.suffix == ".txt":
                yield _text_file(path, name)
            elif path.suffix == ".parquet":
                yield from _parquet_rows(path, name, text_column)
            else:
                yield from _json_lines(path, name, text_column)
        except OSError as error:
            raise _bad_input(
                name, f"cannot be read ({error.strerror or error})", "Check the file."
            ) from error


def word_limit(dataset_size: str | None) -> int | None:
    """Returns the number of white-space words that `--dataset-size` stands for: 10k is 10 000."""
    if dataset_size is None:
        return None
    factor = {"k": 10**3, "M": 10**6, "B": 10**9}.get(dataset_size[-1:], 1)
    digits = dataset_size if factor == 1 else dataset_size[:-1]
    if not digits.isdecimal() or int(digits) == 0:
        raise UserError(
            f"{dataset_size!r} is not a number of words",
            where="--dataset-size",
            fix="Give a number such as 50000, 10k, 1M or 1B.",
            exit_code=ExitCode.UNKNOWN_SIZE,
        )
    return int(digits) * factor


def take_words(documents: Iterator[Document], limit: int | None) -> Iterator[Document]:
    """Yields documents for as long as they together stay within `limit` white-space words."""
    num_words = 0
    for document in documents:
        if limit is not None:
            num_words += len(document.text.split())
            if num_words > limit:
                return
        yield document


def check_hub_size(dataset_size: str) -> None:
    """Checks that the Hub dataset has a config of this name.

    Raises:
        UserError: it has not; lists those it has.
    """
    if dataset_size not in DATASET_SIZES:
        raise UserError(
            f"{HUB_DATASET} has no size {dataset_size!r}",
            where="--dataset-size",
            fix=f"Choose one of: {', '.join(DATASET_SIZES)}.",
            exit_code=ExitCode.UNKNOWN_SIZE,
        )


def _resolve_hub(dataset_size: str) -> Source:
    check_hub_size(dataset_size)
    # Always the train split: a config's own test split can be in a larger config's train split.
    files = download_dataset_files(HUB_DATASET, dataset_size, "train")
    description = {
        "kind": "hub",
        "dataset": HUB_DATASET,
        "config": dataset_size,
        "revision": files.revision,
        "files": files.names,
    }
    return Source(dataset_size, files.paths, files.names, description)


def _expand(pattern: str) -> list[Path]:
    path = Path(pattern)
    if path.is_dir():
        found = [p for p in sorted(path.iterdir()) if p.is_file() and p.name.endswith(SUFFIXES)]
    elif path.is_file():
        found = [path]
    else:
        found = [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]
        found = [p for p in found if p.is_file()]
    if not found:
        raise UserError(
            "no such file",
            where=f"--source {pattern}",
            fix=f"Name existing files, or a folder with files that end in {', '.join(SUFFIXES)}.",
            exit_code=ExitCode.NOT_FOUND,
        )
    for path in found:
        if not path.name.endswith(SUFFIXES):
            raise _bad_input(
                str(path), "unknown type of file", f"Files must end in {', '.join(SUFFIXES)}."
            )
    return found


def _text_file(path: Path, name: str) -> Document:
    data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise _not_utf8(f"{name}:{line}") from error
    return _checked(text, Path(name).name, f"{name}:1")


def _json_lines(path: Path, name: str, text_column: str) -> Iterator[Document]:
    opened = gzip.open(path, "rb") if path.name.endswith(".gz") else path.open("rb")
    default_source = Path(name).name.split(".")[0]
    number = 0
    with opened as file:
        try:
            for number, raw_line in enumerate(file, start=1):
                line = raw_line.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw_line
                if line.strip():
                    place = f"{name}:{number}"
                    yield _json_document(line, place, text_column, default_source)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise _bad_input(
                f"{name}:{number + 1}", f"damaged gzip ({error})", "Fetch or make the file again."
            ) from error


def _json_document(line: bytes, place: str, text_column: str, default_source: str) -> Document:
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise _not_utf8(place) from error
    except (ValueError, RecursionError) as error:
        raise _bad_input(place, f"not JSON ({error})", "Mend or remove the line.") from error
    if not isinstance(row, dict):
        raise _bad_input(place, "not a JSON object", 'Each line must be like {"text": "..."}.')
    if text_column not in row:
        raise _no_column(place, text_column, list(row))
    text, source = row[text_column], row.get("source")
    return _checked(text, source if isinstance(source, str) else default_source, place)


def _parquet_rows(path: Path, name: str, text_column: str) -> Iterator[Document]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    default_source = Path(name).name.split(".")[0]
    try:
        with pq.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if text_column not in columns:
                raise _no_column(name, text_column, columns)
            wanted = [text_column, "source"] if "source" in columns else [text_column]
            row = 0
            for batch in file.iter_batches(batch_size=_PARQUET_BATCH_ROWS, columns=wanted):
                texts = batch.column(text_column).to_pylist()
                sources = (
                    batch.column("source").to_pylist() if len(wanted) == 2 else [None] * len(texts)
                )
                for text, source in zip(texts, sources, strict=True):
                    row += 1
                    label = source if isinstance(source, str) else default_source
                    yield _checked(text, label, f"{name}:{row}")
    except pa.ArrowException as error:
        raise _bad_input(
            name, f"damaged Parquet ({error})", "Fetch or make the file again."
        ) from error
    except UnicodeDecodeError as error:
        raise _not_utf8(name) from error


def _checked(text: Any, source: str, place: str) -> Document:
    if not isinstance(text, str):
        raise _bad_input(
            place,
            f"the text is {type(text).__name__}, not a string",
            "Mend or remove it, or name another column with --text-column.",
        )
    if not text.strip():
        raise _bad_input(place, "the text is empty", "Remove it.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _bad_input(
            place, f"half a surrogate pair at character {error.start}", "Mend or remove it."
        ) from error
    return Document(text, source, place)


def _not_utf8(place: str) -> UserError:
    return _bad_input(place, "not UTF-8", "Convert the file, such as with iconv -t utf-8.")


def _no_column(place: str, text_column: str, columns: list[str]) -> UserError:
    return _bad_input(
        place,
        f"no column {text_column!r}; there is {', '.join(map(repr, columns)) or 'nothing'}",
        "Name the column that holds the text with --text-column.",
    )


def _bad_input(where: str, what: str, fix: str) -> UserError:
    return UserError(what, where=where, fix=fix, exit_code=ExitCode.BAD_INPUT)
