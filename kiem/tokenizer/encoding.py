"""Batch encoding: with gigatoken where it is proven exact, else with the tokenizers library.

gigatoken is some ten times as fast, since it encodes each word once and remembers it. Cutting a
text before its spaces is exact if no vocabulary entry has a space after another character: no merge
can then cross the cut. Documents that contain one of the few entries for which this does not hold
are left to the tokenizers library, which also checks a sample of the others.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import islice
from typing import Any, NamedTuple

import msgspec
import numpy as np
import psutil
from msgspec.structs import replace
from tokenizers import Regex, pre_tokenizers

from kiem.core.errors import ExitCode, UserError
from kiem.tokenizer.reference_process import Reference, reference_process
from kiem.tokenizer.tokenizer import BYTE_TOKENS, Tokenizer
from kiem.tokenizer.train import SPLIT_REGEX

# With more entries that have a space inside, most documents would go to the reference anyway.
_MAX_CROSSING_ENTRIES = 64
# Of the documents in a batch, one in so many is compared with the reference.
_COMPARED_SHARE = 200
# The reference takes some 100 bytes a character, so it gets long documents in parts.
_PART_CHARACTERS = 100_000
# gigatoken remembers every word for good, so it is loaded again when it has grown by this.
_MAX_REMEMBERED_BYTES = 400_000_000


class Encoded(NamedTuple):
    """Ids of several documents, without control tokens."""

    ids: np.ndarray  # int32, one document after the other
    lengths: np.ndarray  # int64 [documents], tokens of each


@dataclass(frozen=True)
class FastPath:
    """A tokenizer for which gigatoken is proven exact."""

    json_bytes: bytes  # the tokenizer.json for gigatoken, without control tokens
    crossing: re.Pattern[str] | None  # finds entries that a cut before spaces would split


def fast_path(tokenizer: Tokenizer, choice: str) -> FastPath | str:
    """Returns the fast path, or why there is none, for `--encoder` "auto" or "reference"."""
    description, model = tokenizer.description, tokenizer.description.model
    if choice == "reference":
        return "as asked for with --encoder reference"
    if find_spec("gigatoken") is None:
        return "gigatoken is not installed"
    if not tokenizer.is_gemma_style or model.dropout:
        return "the tokenizer is not a byte-fallback BPE over text with its spaces replaced"
    if not _splits_are_exact(tokenizer):
        return "the pre-tokenizer may split where an entry of the vocabulary would go across"
    added = [token for token in description.added_tokens if not token.special]
    entries = [*tokenizer.vocabulary, *(token.content.replace(" ", "▁") for token in added)]
    crossing = sorted({entry for entry in entries if re.search("[^▁]▁", entry)})
    # Documents with a "<" are compared with the reference, so a crossing entry must have one.
    if len(crossing) > _MAX_CROSSING_ENTRIES or not all("<" in entry for entry in crossing):
        return f"{len(crossing)} entries of the vocabulary have a space inside"
    pattern = "|".join(re.escape(entry.replace("▁", " ")) for entry in crossing)
    reduced = replace(description, added_tokens=added, pre_tokenizer=None)
    return FastPath(msgspec.json.encode(reduced), re.compile(pattern) if pattern else None)


def _splits_are_exact(tokenizer: Tokenizer) -> bool:
    """Says whether the pre-tokenizer splits nowhere that an entry of the vocabulary goes across."""
    pre_tokenizer = tokenizer.description.pre_tokenizer
    if pre_tokenizer is None:
        return True
    if pre_tokenizer.get("type") != "Split" or pre_tokenizer.get("invert"):
        return False
    if pre_tokenizer.get("pattern") == {"String": " "}:
        return True  # Gemma's: there are no spaces left when it runs
    if pre_tokenizer.get("pattern") != {"Regex": SPLIT_REGEX}:
        return False
    split = pre_tokenizers.Split(Regex(SPLIT_REGEX), "isolated").pre_tokenize_str
    reserved = {*tokenizer.added_tokens, *BYTE_TOKENS}
    return all(len(split(entry)) == 1 for entry in tokenizer.vocabulary if entry not in reserved)


class Encoder:
    """Encoder of batches of documents.

    Args:
        tokenizer: the tokenizer.
        fast: the fast path, or why there is none.
        reference: what the fast path is compared with; by default the tokenizer in this process.
    """

    def __init__(
        self, tokenizer: Tokenizer, fast: FastPath | str, reference: Reference | None = None
    ):
        self._tokenizer = tokenizer
        self._fast = fast if isinstance(fast, FastPath) else None
        self._reference = reference or tokenizer.encode
        self._load()

    def checked_by(self, reference: Reference) -> Encoder:
        """Returns an encoder that shares all that is loaded, but is compared with `reference`."""
        other = copy.copy(self)
        other._reference = reference
        return other

    def encode(self, texts: Sequence[str], place: Callable[[int], str]) -> Encoded:
        """Returns the ids of documents.

        Args:
            texts: the documents.
            place: returns where the document of this number comes from, for the message.

        Raises:
            UserError: the fast path gave other ids than the reference; names the document.
        """
        if self._fast is None:
            return _join(self._tokenizer.encode_batch(texts))
        # One by one: for every batch gigatoken would start with an empty memory of words.
        documents: list[np.ndarray] = [self._encode_fast(text) for text in texts]
        for number, text in enumerate(texts):
            # All added tokens and crossing entries have a "<".
            if "<" in text or number % _COMPARED_SHARE == 0:
                documents[number] = self._check(documents[number], text, partial(place, number))
        if _used_bytes() > self._loaded_bytes + _MAX_REMEMBERED_BYTES:
            self._load()
        return _join(documents)

    def _load(self) -> None:
        if self._fast is not None:
            import gigatoken

            try:
                fast = gigatoken.Tokenizer.from_json(self._fast.json_bytes)
            except (RuntimeError, ValueError) as error:
                what = f"gigatoken cannot read it ({str(error).splitlines()[0]})"
                fix = "Use --encoder reference, or another --tokenizer."
                raise _mismatch(self._tokenizer.origin, what, fix) from error
            self._encode_fast: Any = fast.encode
        self._loaded_bytes = _used_bytes()

    def _check(self, ids: np.ndarray, text: str, place: Callable[[], str]) -> np.ndarray:
        """Returns the ids of a document if the reference gives the same.

        For a document with a crossing entry it returns the reference's ids. Of one without "<" only
        the beginning is compared.
        """
        assert self._fast is not None
        is_crossed = self._fast.crossing is not None and self._fast.crossing.search(text)
        parts = iter([text]) if is_crossed else cut_long(text, _PART_CHARACTERS)
        expected = [self._reference(part) for part in islice(parts, None if "<" in text else 1)]
        right = np.concatenate([np.array(part, np.uint32) for part in expected])
        if not is_crossed and not np.array_equal(ids if "<" in text else ids[: len(right)], right):
            what = "gigatoken and tokenizers encode this document differently"
            fix = "Use --encoder reference, and please report the document."
            raise _mismatch(place(), what, fix)
        return right if is_crossed else ids


@contextlib.contextmanager
def load_encoders(
    tokenizer: Tokenizer, fast: FastPath | str, num_workers: int
) -> Iterator[list[Encoder]]:
    """Yields an encoder for each worker process that will be forked from this one.

    They share what is loaded; the reference that checks the fast path is loaded at the same time.
    """
    if isinstance(fast, str):
        tokenizer.encode_batch([])  # loads it, once for all
        yield [Encoder(tokenizer, fast)] * num_workers
        return
    with reference_process(tokenizer, num_workers) as references:
        encoder = Encoder(tokenizer, fast)
        yield [encoder.checked_by(reference) for reference in references]


def cut_long(text: str, part_characters: int) -> Iterator[str]:
    """Yields a text in parts that are encoded as in the whole, if no entry crosses a cut.

    Every cut is before a space that follows another character. Parts have `part_characters`, or
    more where there is no such place.
    """
    start = 0
    while start + part_characters < len(text):
        cut = re.compile("(?<=[^ ]) ").search(text, start + part_characters)
        if cut is None:
            break
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]


def _mismatch(where: str, what: str, fix: str) -> UserError:
    return UserError(what, where=where, fix=fix, exit_code=ExitCode.TOKENIZER_MISMATCH)


def _used_bytes() -> int:
    return int(psutil.Process().memory_info().rss)


def _join(documents: Sequence[Sequence[int] | np.ndarray]) -> Encoded:
    lengths = np.array([len(ids) for ids in documents], dtype=np.int64)
    arrays = [np.asarray(ids, dtype=np.uint32) for ids in documents]
    return Encoded(np.concatenate([np.empty(0, np.uint32), *arrays]).view(np.int32), lengths)
