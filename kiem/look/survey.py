"""What is in a chunk directory, as sections that the terminal and the page show alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from kiem.core.errors import damaged
from kiem.core.files import format_bytes
from kiem.core.manifest import MANIFEST_FILE
from kiem.data.chunks import MAKE_AGAIN, read_manifest, read_tokenizer
from kiem.data.clean.frequent_words import identify_languages
from kiem.data.clean.ngrams import duplicated, hash_ngrams
from kiem.data.source_record import describe_source, list_sources, show_licence
from kiem.look.frequent import frequent_ngrams, tokens_that_cover
from kiem.look.rejected import read_rejected
from kiem.look.sample import Sampled, SampledDocuments, sample_chunks, sample_documents
from kiem.tokenizer.tokenizer import Tokenizer

_MOST_ROWS = 25
_NGRAMS = (2, 4, 8)
_DUPLICATE_TOKENS = 32


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        title: what it is about.
        heads, rows: a table; the first column has names, the others figures.
        notes: sentences below the title.
        chart: for bars, the column of `rows` with the figures, as numbers; none if empty.
        unit: of the bars.
        texts: texts of documents, each with what it is.
    """

    title: str
    heads: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    notes: Sequence[str] = ()
    chart: Sequence[float] = ()
    unit: str = ""
    texts: Sequence[tuple[str, str]] = field(default_factory=tuple)


def survey(path: Path, num_samples: int, seed: int) -> list[Section]:
    """Looks at a chunk directory; of a large one at parts, chosen by the seed.

    Args:
        path: the chunk directory.
        num_samples: documents to show at random, and rejected ones for each reason.
        seed: of what is chosen.

    Raises:
        UserError: it is no chunk directory, or it is damaged.
    """
    manifest = read_manifest(path)
    try:
        return _sections(path, manifest, num_samples, seed)
    except KeyError as error:  # of a manifest that is not sealed
        raise damaged(str(path / MANIFEST_FILE), f"has no {error}", MAKE_AGAIN) from error


def _sections(path: Path, manifest: dict[str, Any], num_samples: int, seed: int) -> list[Section]:
    tokenizer = read_tokenizer(path, manifest)
    sampled = sample_chunks(path, manifest, seed)
    if not 0 <= sampled.chunks.min() <= sampled.chunks.max() < tokenizer.num_rows:
        raise damaged(str(path), "has tokens that its tokenizer does not have", MAKE_AGAIN)
    sections = [_overview(manifest), _sources(manifest)]
    if not manifest["splits"]["train"].get("document_shards"):
        notes = [
            "Not shown: an earlier version made this directory, without a record of its documents.",
            "preprocess.py --overwrite makes it again with one.",
        ]
        sections.append(Section("Documents", notes=notes))
    else:
        documents = sample_documents(path, manifest, seed)
        texts = [_decode(tokenizer, ids) for ids in documents.begins]
        sections += [
            _lengths(documents),
            _languages(texts),
            _duplicates(manifest, documents),
            _at_random(manifest, documents, texts[:num_samples]),
        ]
    counts = np.bincount(sampled.chunks.reshape(-1), minlength=tokenizer.num_rows)
    counts[list(tokenizer.special_ids.values())] = 0
    sections.append(_vocabulary(manifest, sampled, counts))
    sections += _frequent(tokenizer, sampled, counts)
    sections.append(_rejected(path, manifest, num_samples, seed))
    return sections


def _overview(manifest: dict[str, Any]) -> Section:
    options, splits = manifest["options"], manifest["splits"]
    rows = [
        ("text", f"{describe_source(entry)}; licence: {show_licence(entry.get('licence'))}")
        for entry in list_sources(manifest["source"])
    ]
    cleaning = [options.get("clean", "none").split()[0]]  # of a file without its hash
    cleaning += ["near duplicates"] if options.get("near_duplicates") else []
    cleaning += ["decontaminated"] if options.get("decontaminate") else []
    replaced = manifest.get("personal_data_replaced", {})
    rows += [
        ("tokenizer", f"{manifest['tokenizer']['origin']}"),
        ("chunks", f"{splits['train']['chunks']:,} of {options['chunk_size']:,} tokens"),
        ("packing", options.get("packing", "concat")),
        ("cleaning", ", ".join(cleaning)),
        *((f"{kind} replaced", f"{number:,}") for kind, number in replaced.items()),
        ("documents read", f"{manifest['documents_read']:,}"),
        ("for training", f"{splits['train']['documents']:,}"),
        ("for testing", f"{splits['test']['documents']:,}"),
        ("rejected", f"{sum(manifest['rejected'].values()):,}"),
        ("padding", f"{splits['train']['padding_tokens']:,} tokens"),
    ]
    return Section("What it is", rows=rows)


def _sources(manifest: dict[str, Any]) -> Section:
    """The sources, largest first, by their bytes for training."""
    train = manifest["splits"]["train"]
    num_bytes = Counter(train["bytes_per_source"])
    documents, tokens = (train.get(f"{n}_per_source", {}) for n in ("documents", "tokens"))
    total = max(1, num_bytes.total())
    rows = [
        (
            name,
            f"{documents.get(name, 0):,}",
            format_bytes(size),
            f"{size / total:.1%}",
            f"{size / max(1, tokens.get(name, 0)):.2f}",
        )
        for name, size in num_bytes.most_common(_MOST_ROWS)
    ]
    return Section(
        "Sources",
        ("source", "documents", "text", "share", "bytes/token"),
        rows,
        notes=_more(len(num_bytes), "sources"),
        chart=[100 * size / total for _, size in num_bytes.most_common(_MOST_ROWS)],
        unit="% of the training text",
    )


def _lengths(documents: SampledDocuments) -> Section:
    """The documents by their length in tokens, in classes that double."""
    lengths = documents.lengths
    classes = np.bincount(np.frexp(lengths)[1]) if len(lengths) else np.zeros(0, np.int64)
    first = int(np.flatnonzero(classes)[0]) if classes.any() else 0
    rows, shares = [], []
    for power, count in list(enumerate(classes.tolist()))[first:]:
        share = count / len(lengths)
        rows.append((f"{2 ** (power - 1):,} to {2**power - 1:,}", f"{count:,}", f"{share:.1%}"))
        shares.append(100 * share)
    notes = [] if documents.is_all else [f"Of {len(lengths):,} documents, by chance."]
    if len(lengths):
        marks = np.percentile(lengths, [5, 50, 95]).astype(int).tolist()
        notes.append(
            f"A document has {lengths.mean():,.0f} tokens on average; 5 % have fewer than "
            f"{marks[0]:,}, half fewer than {marks[1]:,}, 95 % fewer than {marks[2]:,}; the "
            f"longest has {lengths.max():,}."
        )
    heads = ("tokens", "documents", "share")
    return Section("Lengths of documents", heads, rows, notes, shares, "% of the documents")


def _languages(texts: list[str]) -> Section:
    counts = Counter(identify_languages(texts))
    rows = [(name, f"{n:,}", f"{n / len(texts):.1%}") for name, n in counts.most_common()]
    notes = [
        f"By the frequent words of 80 languages at the beginning of {len(texts):,} documents, "
        "chosen by chance. Lists and short texts are often unclear, and a small language may be "
        "taken for its neighbour."
    ]
    return Section("Languages", ("language", "documents", "share"), rows, notes)


def _duplicates(manifest: dict[str, Any], documents: SampledDocuments) -> Section:
    rejected, options = manifest["rejected"], manifest["options"]
    asked = {
        "duplicate": options.get("clean", "none") != "none",
        "near duplicate": bool(options.get("near_duplicates")),
    }
    rows = [
        (f"{name}s, removed", f"{rejected.get(name, 0):,}" if is_asked else "not looked for")
        for name, is_asked in asked.items()
    ]
    begins = [ids[:_DUPLICATE_TOKENS].astype(np.uint64) for ids in documents.begins]
    whole = [ids for ids in begins if len(ids) == _DUPLICATE_TOKENS]
    keys = np.concatenate(
        [np.empty(0, np.uint64), *(hash_ngrams(ids, _DUPLICATE_TOKENS) for ids in whole)]
    )
    rows.append((f"the same first {_DUPLICATE_TOKENS} tokens", f"{duplicated(keys).sum():,}"))
    notes = [
        f"The last line: so many of {len(whole):,} documents, chosen by chance, begin as another "
        "of them."
    ]
    return Section("Duplicates", rows=rows, notes=notes)


def _at_random(manifest: dict[str, Any], documents: SampledDocuments, texts: list[str]) -> Section:
    files = list(manifest["documents_per_file"])
    names = manifest["splits"]["train"]["source_names"]
    shown = [
        (f"{names[label]}, {files[file]}:{row}", text)
        for (file, row), label, text in zip(documents.places, documents.labels, texts, strict=False)
    ]
    return Section("Documents at random", notes=["Their beginnings."], texts=shown)


def _vocabulary(manifest: dict[str, Any], sampled: Sampled, counts: np.ndarray) -> Section:
    num_rows, num_unused = (manifest["tokenizer"][n] for n in ("num_rows", "num_unused_rows"))
    train = manifest["splits"]["train"]
    rows = [
        ("rows", f"{num_rows:,}"),
        ("used by the text", f"{num_rows - num_unused:,} ({1 - num_unused / num_rows:.1%})"),
        ("bytes per token", f"{train['bytes'] / max(1, train['tokens']):.2f}"),
        ("tokens per word", f"{train['tokens'] / max(1, train['words']):.2f}"),
    ]
    if counts.any():
        rows += [
            (f"tokens for {share:.0%} of it", f"{tokens_that_cover(counts, share):,}")
            for share in (0.5, 0.9, 0.99)
        ]
    return Section("Vocabulary", rows=rows, notes=_of_sample(sampled, "the last three lines: "))


def _frequent(tokenizer: Tokenizer, sampled: Sampled, counts: np.ndarray) -> Iterator[Section]:
    """Yields the sections about frequent tokens and n-grams."""
    notes = _of_sample(sampled)
    total = max(1, int(counts.sum()))
    top = np.argsort(-counts, kind="stable")[:_MOST_ROWS]
    rows = [
        (
            _quoted(tokenizer, np.array([token])),
            f"{counts[token]:,}",
            f"{counts[token] / total:.2%}",
        )
        for token in top.tolist()
        if counts[token]
    ]
    yield Section("Most frequent tokens", ("token", "times", "share"), rows, notes)
    special = list(tokenizer.special_ids.values())
    for n in _NGRAMS:
        found = frequent_ngrams(sampled.chunks, n, special, _MOST_ROWS)
        pairs = [(_quoted(tokenizer, ids), f"{count:,}") for ids, count in found]
        yield Section(f"Most frequent {n} tokens in a row", ("tokens", "times"), pairs, notes)


def _rejected(path: Path, manifest: dict[str, Any], num_samples: int, seed: int) -> Section:
    rejected, num_read = Counter(manifest["rejected"]), max(1, manifest["documents_read"])
    rows = [(name, f"{n:,}", f"{n / num_read:.2%}") for name, n in rejected.most_common()]
    notes = ["None."] if not rows else []
    texts: list[tuple[str, str]] = []
    if rows and "rejected_file" not in manifest:
        notes.append("Examples are kept with preprocess.py --keep-rejected.")
    elif rows:
        texts, is_all = read_rejected(path, num_samples, seed)
        notes += [] if is_all else ["The examples are from parts of the file, chosen by chance."]
    heads = ("reason", "documents", "share of those read")
    return Section("Rejected documents", heads if rows else (), rows, notes, texts=texts)


def _of_sample(sampled: Sampled, what: str = "") -> list[str]:
    if sampled.is_all:
        return []
    share = len(sampled.chunks) / sampled.num_chunks
    text = f"{what}of {sampled.chunks.size:,} tokens ({share:.1%}), in chunks chosen by chance."
    return [text[0].upper() + text[1:]]


def _more(count: int, what: str) -> list[str]:
    return [f"The {_MOST_ROWS} largest of {count:,} {what}."] if count > _MOST_ROWS else []


def _decode(tokenizer: Tokenizer, ids: np.ndarray) -> str:
    return tokenizer.decode(ids.tolist())


def _quoted(tokenizer: Tokenizer, ids: np.ndarray) -> str:
    """Returns tokens as text in which spaces and line ends can be seen."""
    text = "".join(map(partial(_entry, tokenizer), ids.tolist()))
    return text.replace("\n", "⏎").replace("\t", "⇥")


def _entry(tokenizer: Tokenizer, token: int) -> str:
    return (tokenizer.implementation.id_to_token(token) or "").replace("▁", "·")
