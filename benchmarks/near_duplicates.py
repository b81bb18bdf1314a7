"""Near duplicates at scale: memory of the decisions, time, and which of known ones are found.

    python benchmarks/near_duplicates.py --documents 10000000
    python benchmarks/near_duplicates.py --text FOLDER --tokenizer tokenizer.json

The first makes unit files of so many documents, with random keys, and measures the memory that the
decisions about them take in the main process (numpy and Python, by tracemalloc; files are mapped).

The second makes text of which the near duplicates are known. Each version of the documents has
other words: a letter more at the end of each. Half of the documents are followed by a copy in which
some words are replaced, as many as give a Jaccard similarity from 0.5 to 1. preprocess.py runs on
it with and without --near-duplicates.
"""

from __future__ import annotations

import json
import os
import random
import re
import resource
import sys
import tempfile
import time
import tracemalloc
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
from peers import ROOT, machine
from preprocessing import megabytes, timed
from rich.console import Console
from rich.table import Table

from kiem import cli
from kiem.config import PreprocessOptions
from kiem.core.errors import bad_option
from kiem.core.files import sealed_file
from kiem.data.clean.cleaner import Cleaning
from kiem.data.clean.languages import find_language
from kiem.data.clean.near_duplicates import SHINGLE_WORDS, band_keys
from kiem.data.clean.ngrams import WordHashes, lowercase_words
from kiem.data.prepare.decisions import decide
from kiem.data.prepare.units import Job, Unit, UnitSummary
from kiem.data.read.readers import FilePart
from kiem.data.read.sources import resolve_source

_UNIT_DOCUMENTS = 2400  # of 1700 bytes in 4 MB
_MIN_WORDS = 100  # of a document that is copied
_LETTERS = "abcdefghijklmnop"


@dataclass(frozen=True)
class Options:
    """Measure near duplicates at scale."""

    documents: int = 0
    """Documents in made-up unit files."""
    text: Path | None = None
    """Folder with .jsonl files."""
    tokenizer: Path | None = None
    """A tokenizer.json."""
    versions: int = 9
    """Versions of the text; with their copies nine of 8 million words are 106 million."""
    pairs: int = 4000
    """Known near duplicates whose exact similarity is computed."""


def main(options: Options, console: Console) -> None:
    console.print(machine())
    if not options.documents and options.text is None:
        raise bad_option("--documents", "nothing to do", "Give --documents, or --text.")
    with tempfile.TemporaryDirectory() as folder:
        if options.documents:
            console.print(decisions_memory(options.documents, Path(folder)))
        if options.text is not None:
            for table in known_duplicates(options, Path(folder)):
                console.print(table)


def decisions_memory(num_documents: int, folder: Path) -> str:
    """Makes unit files and decides about their documents."""
    job = make_units(num_documents, folder)
    started = time.process_time()
    tracemalloc.start()
    decisions = decide(job)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    seconds = time.process_time() - started
    return (
        f"{num_documents:,} documents, {decisions.counts['rejected']}: {most / 1e6:,.0f} MB at "
        f"most, {most / num_documents:.1f} bytes per document; {seconds:.1f} s of processor time"
    )


def make_units(num_documents: int, folder: Path) -> Job:
    """Writes unit files of empty texts with random keys, of which one of 20 came before."""
    (folder / "in.txt").write_text("tekst")
    source = resolve_source((str(folder / "in.txt"),), None)
    part = FilePart(0, 0, 1, 1)
    numbers = range(-(-num_documents // _UNIT_DOCUMENTS))
    units = [Unit(number, (part,), 1) for number in numbers]
    options = PreprocessOptions(source=(str(folder / "in.txt"),))
    cleaning = Cleaning(find_language("dutch"), near_duplicates=True)
    job = Job(options, source, units, cleaning, folder, "", None)
    schema = job.schema()
    draw = np.random.default_rng(0)
    for unit in units:
        size = min(_UNIT_DOCUMENTS, num_documents - unit.number * _UNIT_DOCUMENTS)
        columns = []
        for field in schema:
            if field.type == pa.uint64():
                keys = draw.integers(0, 2**64, size, np.uint64)
                is_early = draw.random(size) < 0.05 / 14
                keys[is_early] = draw.integers(0, 1000, int(is_early.sum()), np.uint64)
                columns.append(pa.array(keys))
            elif field.name == "ids":
                offsets = pa.array(np.zeros(size + 1, np.int64))
                empty = pa.array(np.empty(0, np.int32))
                columns.append(pa.LargeListArray.from_arrays(offsets, empty))
            else:
                value = -1 if field.name == "reason" else 1700 if field.name == "bytes" else 0
                columns.append(pa.array(np.full(size, value), field.type))
        summary = UnitSummary(job.key(unit), {"x": 0}, {}, size, size)
        with sealed_file(job.path(unit)) as file, pa.ipc.new_stream(file, schema) as writer:
            writer.write_batch(pa.record_batch(columns, schema=schema))
            last = pa.RecordBatch.from_pylist([], schema=schema)
            writer.write_batch(last, custom_metadata={"summary": msgspec.json.encode(summary)})
    return job


def known_duplicates(options: Options, folder: Path) -> Iterator[Table]:
    """Yields a table of time and memory, and one of what is found."""
    assert options.text is not None
    source = folder / "text"
    source.mkdir()
    pairs, num_words, num_documents = make_text(options, source)
    table = Table("", "seconds", "processor seconds", "peak memory", "rejected")
    for name, more in {"without": (), "with": ("--near-duplicates", "--keep-rejected")}.items():
        command = [sys.executable, str(ROOT / "preprocess.py"), "--source", str(source)]
        command += ["--tokenizer", str(options.tokenizer), "--output-dir", str(folder / name)]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        result = timed([*command, "--name", "out", *more], watch_memory=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        manifest = json.loads((folder / name / "out" / "manifest.json").read_bytes())
        cells = (f"{result.seconds:.0f}", f"{used:.0f}", megabytes(result))
        table.add_row(f"{name} --near-duplicates", *cells, f"{manifest['rejected']}")
    size = sum(file.stat().st_size for file in source.iterdir())
    table.title = f"{num_words:,} words, {num_documents:,} documents, {size / 1e6:.0f} MB of JSON"
    yield table
    with (folder / "with" / "out" / "rejected.jsonl").open(encoding="utf-8") as lines:
        found = {json.loads(line)["place"] for line in lines}
    yield of_similarity(random.Random(1).sample(pairs, min(options.pairs, len(pairs))), found)
    yield of_others(source / "0.jsonl", pairs, found)


def make_text(options: Options, folder: Path) -> tuple[list[tuple[str, str, str]], int, int]:
    """Writes the text; returns place, text and original of each copy, all words and documents."""
    assert options.text is not None
    draw = random.Random(0)
    files = sorted(options.text.glob("*.jsonl"))
    texts = [json.loads(line)["text"] for file in files for line in file.open("rb")]
    pairs = []
    num_words = num_documents = 0
    for version in range(options.versions):
        path = folder / f"{version}.jsonl"
        row = 0
        with path.open("w", encoding="utf-8") as file:
            for text in texts:
                ending = _LETTERS[version - 1] if version else ""
                words = re.sub(r"\w+", rf"\g<0>{ending}", text).split(" ")
                written = [words]
                if len(words) >= _MIN_WORDS and draw.random() < 0.5:
                    shared = draw.uniform(0.5, 1)
                    share = 1 - (2 * shared / (1 + shared)) ** (1 / SHINGLE_WORDS)
                    written.append([w if draw.random() > share else f"{w}zzz" for w in words])
                for number, each in enumerate(written):
                    row += 1
                    num_words += len(" ".join(each).split())
                    file.write(json.dumps({"text": " ".join(each)}) + "\n")
                    if number:
                        pairs.append((f"{path}:{row}", " ".join(each), " ".join(words)))
        num_documents += row
    return pairs, num_words, num_documents


def shingles(text: str) -> set[tuple[str, ...]]:
    """Returns the different runs of five words."""
    words = lowercase_words(text)
    return {tuple(words[n : n + SHINGLE_WORDS]) for n in range(len(words) - SHINGLE_WORDS + 1)}


def similarity(text: str, other: str) -> float:
    """Returns the Jaccard similarity of two texts' shingles."""
    a, b = shingles(text), shingles(other)
    return len(a & b) / max(1, len(a | b))


def of_similarity(pairs: list[tuple[str, str, str]], found: set[str]) -> Table:
    """Says how many of known copies are found, and how many should be."""
    groups: defaultdict[int, list[tuple[float, bool]]] = defaultdict(list)
    for place, text, original in pairs:
        exact = similarity(text, original)
        groups[min(19, int(exact * 20))].append((exact, place in found))
    table = Table("similarity", "copies", "found", "1 - (1 - s^8)^14")
    for number, group in sorted(groups.items()):
        share = sum(is_found for _, is_found in group) / len(group)
        expected = sum(1 - (1 - exact**8) ** 14 for exact, _ in group) / len(group)
        interval = f"{number / 20:.2f} to {(number + 1) / 20:.2f}"
        table.add_row(interval, f"{len(group):,}", f"{share:.1%}", f"{expected:.1%}")
    return table


def of_others(file: Path, pairs: list[tuple[str, str, str]], found: set[str]) -> Table:
    """Says how similar other documents that are found in a file are to an earlier one."""
    copies = {place for place, _, _ in pairs}
    texts = [json.loads(line)["text"] for line in file.open("rb")]
    earlier: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    counts = dict.fromkeys(("above 0.9", "0.8 to 0.9", "0.7 to 0.8", "0.5 to 0.7", "below 0.5"), 0)
    limits = (0.9, 0.8, 0.7, 0.5, -1)
    for number, keys in enumerate(band_keys(texts, WordHashes()).tolist()):
        place = f"{file}:{number + 1}"
        if place in found and place not in copies:
            others = {other for pair in enumerate(keys) for other in earlier[pair]}
            most = max(similarity(texts[number], texts[other]) for other in others)
            counts[next(n for n, low in zip(counts, limits, strict=True) if most > low)] += 1
        for pair in enumerate(keys):
            earlier[pair].append(number)
    table = Table(f"similarity of others in {file.name}", "found")
    for name, number in counts.items():
        table.add_row(name, f"{number:,}")
    return table


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(cli.run(Options, __file__, main))
