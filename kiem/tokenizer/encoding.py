"""Encoding many documents: fast where that is proven exact, with the reference elsewhere.

The reference is the `tokenizers` library. gigatoken is some ten times faster, since it encodes each
word once and looks it up after that. Cutting a text before its spaces changes nothing if no
vocabulary entry has a space after another character: no merge can then cross the cut. Documents
that contain one of the few entries for which this does not hold are left to the reference.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec
import numpy as np
import psutil
from msgspec.structs import replace
from tokenizers import Regex, pre_tokenizers

from kiem.core.errors import ExitCode, UserError
from kiem.tokenizer.reference import Reference, reference_process
from kiem.tokenizer.tokenizer import BYTE_TOKENS, WORD_PIECES, Tokenizer
from kiem.tokenizer.tokenizer_json import TokenizerJson

# More entries than this with a space inside, and most documents would go to the reference anyway.
_MAX_CROSSING_ENTRIES = 64
# Of the documents in a batch, one in so many is compared with the reference.
_COMPARED_SHARE = 200
# The reference takes some 100 bytes a character, so it gets long documents in parts.
_PART_CHARACTERS = 100_000
# gigatoken remembers every word that it has seen, for good.
_MAX_REMEMBERED_BYTES = 400_000_000


class Encoded(NamedTuple):
    """Ids of several documents, without control tokens.

    Attributes:
        ids: int32, one document after the other.
        lengths: int64 [documents], tokens of each.
    """

    ids: np.ndarray
    lengths: np.ndarray


@dataclass(frozen=True)
class FastPath:
    """How gigatoken encodes with a tokenizer for which that is proven exact.

    Attributes:
        json_bytes: the tokenizer.json for gigatoken, to which control strings in text are text.
        crossing: finds the entries that a cut before spaces would split; None if there are none.
    """

    json_bytes: bytes
    crossing: re.Pattern[str] | None


class Encoder:
    """Encodes batches of documents.

    Args:
        tokenizer: the tokenizer.
        fast: the fast path, or why there is none.
        reference: what the fast path is compared with; by default the tokenizer in this process.

    Attributes:
        reason: why the reference does all the work; None when it need not.
    """

    def __init__(
        self, tokenizer: Tokenizer, fast: FastPath | str, reference: Reference | None = None
    ):
        self._fast = fast if isinstance(fast, FastPath) else None
        self._reference = reference or tokenizer.encode_batch
        self.reason = fast if isinstance(fast, str) else None
        self._origin = tokenizer.origin
        self._load()

    def asking(self, reference: Reference) -> Encoder:
        """Returns an encoder that shares all that is loaded, but is checked by `reference`."""
        other = copy.copy(self)
        other._reference = reference
        return other

    def encode(self, texts: Sequence[str], place: Callable[[int], str]) -> Encoded:
        """Returns the ids of documents.

        Args:
            texts: the documents.
            place: says where the document of this number comes from, for the message.

        Raises:
            UserError: the fast path gave other ids than the reference; names the document.
        """
        if self._fast is None:
            return _join(self._reference(texts))
        # One by one: in batches gigatoken begins with an empty memory of words each time.
        documents: list[np.ndarray] = [self._encode_one(text) for text in texts]
        self._check(documents, texts, place)
        if _used_bytes() > self._loaded_bytes + _MAX_REMEMBERED_BYTES:
            self._load()
        return _join(documents)

    def _load(self) -> None:
        if self._fast is not None:
            import gigatoken

            try:
                fast = gigatoken.Tokenizer.from_json(self._fast.json_bytes)
            except (RuntimeError, ValueError) as error:
                raise UserError(
                    f"gigatoken cannot read it ({str(error).splitlines()[0]})",
                    where=self._origin,
                    fix="Use --encoder reference, or another --tokenizer.",
                    exit_code=ExitCode.TOKENIZER_MISMATCH,
                ) from error
            self._encode_one: Any = fast.encode
        self._loaded_bytes = _used_bytes()

    def _check(
        self, documents: list[np.ndarray], texts: Sequence[str], place: Callable[[int], str]
    ) -> None:
        """Compares with the reference every document with a "<", where added tokens and the
        crossing entries are, and the beginning of some others; replaces those with a crossing
        entry."""
        assert self._fast is not None
        crossing = self._fast.crossing
        is_crossed = [crossing is not None and bool(crossing.search(text)) for text in texts]
        parts: list[tuple[int, str]] = []
        for number, text in enumerate(texts):
            if is_crossed[number]:
                parts.append((number, text))
            elif "<" in text:
                parts += [(number, part) for part in cut_long(text, _PART_CHARACTERS)]
            elif number % _COMPARED_SHARE == 0:
                parts.append((number, next(cut_long(text, _PART_CHARACTERS))))
        expected: dict[int, list[np.ndarray]] = {}
        for request in _requests(parts):
            answers = self._reference([part for _, part in request])
            for (number, _), ids in zip(request, answers, strict=True):
                expected.setdefault(number, []).append(np.array(ids, np.uint32))
        for number, ids_of_parts in expected.items():
            right = np.concatenate(ids_of_parts)
            if is_crossed[number]:
                documents[number] = right
                continue
            is_whole = "<" in texts[number]
            found = documents[number] if is_whole else documents[number][: len(right)]
            if not np.array_equal(found, right):
                raise UserError(
                    "gigatoken and tokenizers encode this document differently",
                    where=place(number),
                    fix="Use --encoder reference, and please report the document.",
                    exit_code=ExitCode.TOKENIZER_MISMATCH,
                )


def _requests(parts: list[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    """Yields the parts in groups that the reference answers in bounded memory."""
    request: list[tuple[int, str]] = []
    num_characters = 0
    for part in parts:
        if request and num_characters + len(part[1]) > _PART_CHARACTERS:
            yield request
            request, num_characters = [], 0
        request.append(part)
        num_characters += len(part[1])
    if request:
        yield request


@contextlib.contextmanager
def load_encoders(
    tokenizer: Tokenizer, fast: FastPath | str, num_workers: int
) -> Iterator[list[Encoder]]:
    """Gives as many encoders as there are workers, which are to be forked from this process.

    They share what is loaded; the reference that checks the fast path is loaded beside it.
    """
    if isinstance(fast, str):
        tokenizer.encode_batch([])  # loads it, once for all
        yield [Encoder(tokenizer, fast)] * num_workers
        return
    with reference_process(tokenizer, num_workers) as references:
        encoder = Encoder(tokenizer, fast)
        yield [encoder.asking(reference) for reference in references]


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


def _used_bytes() -> int:
    return int(psutil.Process().memory_info().rss)


def _join(documents: Sequence[Sequence[int] | np.ndarray]) -> Encoded:
    lengths = np.array([len(ids) for ids in documents], dtype=np.int64)
    arrays = [np.asarray(ids, dtype=np.uint32) for ids in documents]
    return Encoded(np.concatenate([np.empty(0, np.uint32), *arrays]).view(np.int32), lengths)


def fast_path(tokenizer: Tokenizer, choice: str) -> FastPath | str:
    """Returns the fast path, or why there is none, for `--encoder` "auto" or "reference"."""
    if choice == "reference":
        return "as asked for with --encoder reference"
    return prepare_fast_path(tokenizer.content)


def prepare_fast_path(content: TokenizerJson | None) -> FastPath | str:
    """Returns the fast path for a tokenizer, or the reason why there is none."""
    try:
        import gigatoken  # noqa: F401
    except ImportError:
        return "gigatoken is not installed"
    if content is None:
        return "the tokenizer is not a BPE"
    description, vocabulary = content.description, content.vocabulary
    model = description.model
    if not content.is_gemma_style or model.dropout:
        return "the tokenizer is not a byte-fallback BPE over text with its spaces replaced"
    added = [token for token in content.added_tokens.values() if not token.special]
    if not _never_cuts(description.pre_tokenizer, content):
        return "the pre-tokenizer may cut where an entry of the vocabulary would go across"
    entries = [*vocabulary, *(token.content.replace(" ", "▁") for token in added)]
    inner = [entry for entry in entries if "▁" in entry[1:]]
    crossing = sorted({entry for entry in inner if re.search("[^▁]▁", entry)})
    # Documents with a "<" are compared with the reference, so a crossing entry must have one.
    if len(crossing) > _MAX_CROSSING_ENTRIES or not all("<" in entry for entry in crossing):
        return f"{len(crossing)} entries of the vocabulary have a space inside"
    texts = [re.escape(entry.replace("▁", " ")) for entry in crossing]
    merges = msgspec.Raw(msgspec.json.format(bytes(model.merges), indent=-1))
    reduced = replace(
        description,
        added_tokens=added,
        pre_tokenizer=None,
        model=replace(model, merges=merges),
    )
    return FastPath(msgspec.json.encode(reduced), re.compile("|".join(texts)) if texts else None)


def _never_cuts(pre_tokenizer: dict[str, Any] | None, content: TokenizerJson) -> bool:
    """Says whether the pre-tokenizer cuts nowhere that an entry of the vocabulary goes across."""
    if pre_tokenizer is None:
        return True
    if pre_tokenizer.get("type") != "Split" or pre_tokenizer.get("invert"):
        return False
    if pre_tokenizer.get("pattern") == {"String": " "}:
        return True  # Gemma's: there are no spaces left when it runs
    if pre_tokenizer.get("pattern") != {"Regex": WORD_PIECES}:
        return False
    cut = pre_tokenizers.Split(Regex(WORD_PIECES), "isolated").pre_tokenize_str
    reserved = {*content.added_tokens, *BYTE_TOKENS}
    return all(len(cut(entry)) == 1 for entry in content.vocabulary if entry not in reserved)
