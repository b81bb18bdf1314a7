"""Batch encoding: with gigatoken where it is proven exact, else with the tokenizers library.

gigatoken is some ten times as fast, since it cuts texts before their spaces, encodes each word once
and remembers it. The cuts are exact where no entry of the vocabulary goes across one. Gemma has one
that does, "> </". So words with a "<" and those before them are left to the tokenizers library,
which also checks a sample of the documents, in a process of its own.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import msgspec
import numpy as np
import psutil
from msgspec.structs import replace
from tokenizers import Regex, pre_tokenizers

from kiem.core.errors import ExitCode, UserError
from kiem.tokenizer.process import tokenizer_process
from kiem.tokenizer.tokenizer import BYTE_TOKENS, Tokenizer
from kiem.tokenizer.train import SPLIT_REGEX

# An entry that would go across a cut before a space and that has no "<" right after the space.
_CROSSING = re.compile("[^▁]▁+(?![▁<])")
# A place where no other entry goes across.
_CUT = re.compile("(?<=[^ ]) (?= *[^ <])")
# Of the documents in a batch, the beginning of one in so many is compared with the reference.
_COMPARED_SHARE = 200
# The reference takes some 100 bytes a character, so it gets long documents in parts.
_PART_CHARACTERS = 100_000
# gigatoken remembers every word for good, so it is loaded again when it has grown by this.
_MAX_REMEMBERED_BYTES = 400_000_000

# Texts to their ids, without control tokens.
Reference = Callable[[Sequence[str]], list[list[int]]]


class Encoded(NamedTuple):
    """Ids of several documents, without control tokens."""

    ids: np.ndarray  # int32, one document after the other
    lengths: np.ndarray  # int64 [documents], tokens of each


def fast_path(tokenizer: Tokenizer, choice: str) -> bytes | str:
    """Returns the tokenizer.json for gigatoken if it is proven exact, or why it is not used.

    Args:
        tokenizer: the tokenizer; for gigatoken it is without control tokens.
        choice: `--encoder`, "auto" or "reference".
    """
    if choice == "reference":
        return "as asked for with --encoder reference"
    if find_spec("gigatoken") is None:
        return "gigatoken is not installed"
    proven = tokenizer.keep("fast", lambda: _prove(tokenizer))
    return proven if proven.startswith(b"{") else proven.decode()


def _prove(tokenizer: Tokenizer) -> bytes:
    """Returns the tokenizer.json for gigatoken, or why there is none."""
    description, model = tokenizer.description, tokenizer.description.model
    if not tokenizer.is_gemma_style or model.dropout:
        return b"the tokenizer is not a byte-fallback BPE over text with its spaces replaced"
    if not _splits_are_exact(tokenizer):
        return b"the pre-tokenizer may split where an entry of the vocabulary would go across"
    added = [token for token in description.added_tokens if not token.special]
    entries = [*tokenizer.vocabulary, *(token.content.replace(" ", "▁") for token in added)]
    if any(map(_CROSSING.search, entries)):
        return b"an entry of the vocabulary has a space inside"
    needed = replace(description, added_tokens=added, pre_tokenizer=None)
    # Without the white space between values, of which half of a tokenizer.json consists.
    return msgspec.json.format(msgspec.json.encode(needed), indent=-1)


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
        fast: what `fast_path` returns for it.
        reference: what gigatoken is compared with; by default the tokenizer in this process.
    """

    def __init__(self, tokenizer: Tokenizer, fast: bytes | str, reference: Reference | None = None):
        self._tokenizer = tokenizer
        self._fast = fast if isinstance(fast, bytes) else None
        self._reference = reference or tokenizer.encode_batch
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
            UserError: gigatoken gave other ids than the reference; names the document.
        """
        if self._fast is None:
            return _join(map(_as_array, self._tokenizer.encode_batch(texts)))
        # The reference is asked at the end, since it may still be loading.
        asked: list[str] = []
        documents = [self._encode_parts(text, asked) for text in texts]
        # Of some documents, by number, the beginning in parts, and where in `asked` it is whole.
        compared: dict[int, tuple[list[np.ndarray | int], int]] = {}
        for number in range(0, len(texts), _COMPARED_SHARE):
            beginning = next(cut_long(texts[number], _PART_CHARACTERS))
            compared[number] = self._encode_parts(beginning, asked), len(asked)
            asked.append(beginning)
        answers = [_as_array(ids) for group in _groups(asked) for ids in self._reference(group)]
        for number, (parts, answer) in compared.items():
            if not np.array_equal(_whole(parts, answers), answers[answer]):
                what = "gigatoken and tokenizers encode this document differently"
                fix = "Use --encoder reference, and please report the document."
                raise _mismatch(place(number), what, fix)
        if _used_bytes() > self._loaded_bytes + _MAX_REMEMBERED_BYTES:
            self._load()
        return _join(_whole(parts, answers) for parts in documents)

    def _encode_parts(self, text: str, asked: list[str]) -> list[np.ndarray | int]:
        """Returns the ids of the parts of a text, or where in `asked` a part is left."""
        # One by one: for every batch gigatoken would start with an empty memory of words.
        if "<" not in text:
            return [self._encode_fast(text)]
        parts: list[np.ndarray | int] = []
        for part in set_apart(text):
            if "<" in part:
                parts.append(len(asked))
                asked.append(part)
            else:
                parts.append(self._encode_fast(part))
        return parts

    def _load(self) -> None:
        if self._fast is not None:
            import gigatoken

            try:
                fast = gigatoken.Tokenizer.from_json(self._fast)
            except (RuntimeError, ValueError) as error:
                what = f"gigatoken cannot read it ({str(error).splitlines()[0]})"
                fix = "Use --encoder reference, or another --tokenizer."
                raise _mismatch(self._tokenizer.origin, what, fix) from error
            self._encode_fast: Any = fast.encode
        self._loaded_bytes = _used_bytes()


@contextlib.contextmanager
def load_encoders(
    tokenizer: Tokenizer, fast: bytes | str, num_workers: int
) -> Iterator[list[Encoder]]:
    """Yields an encoder for each worker process that will be forked from this one.

    They share what is loaded; the reference that checks the fast path is loaded at the same time.
    """
    if isinstance(fast, str):
        tokenizer.encode_batch([])  # loads it, once for all
        yield [Encoder(tokenizer, fast)] * num_workers
        return
    ended = partial(ended_from_outside, "the process that checks the encoding")
    with tokenizer_process(tokenizer, num_workers, ended) as clients:
        encoder = Encoder(tokenizer, fast)
        yield [encoder.checked_by(client.encode_batch) for client in clients]


def cut_long(text: str, part_characters: int) -> Iterator[str]:
    """Yields a text in parts that are encoded as in the whole.

    Parts have `part_characters`, or more where no cut is exact.
    """
    start = 0
    while (cut := _CUT.search(text, start + part_characters)) is not None:
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]


def set_apart(text: str) -> Iterator[str]:
    """Yields a text in parts that are encoded as in the whole, so that few of them have a "<"."""
    start = 0
    while (sign := text.find("<", start)) >= 0:
        # The last cut is before the spaces before the last word that begins before the sign.
        before = text[start:sign].rstrip(" ")
        begin = start + len(before[: before.rfind(" ") + 1].rstrip(" "))
        cut = _CUT.search(text, sign)
        end = len(text) if cut is None else cut.start()
        yield text[start:begin]
        yield text[begin:end]
        start = end
    yield text[start:]


def _groups(texts: Sequence[str]) -> Iterator[list[str]]:
    """Yields texts in groups of some `_PART_CHARACTERS`, or of a single text."""
    group: list[str] = []
    num_characters = 0
    for text in texts:
        if group and num_characters + len(text) > _PART_CHARACTERS:
            yield group
            group, num_characters = [], 0
        group.append(text)
        num_characters += len(text)
    if group:
        yield group


def ended_from_outside(process: str) -> UserError:
    """Returns the error for a child process that was killed."""
    what = f"{process} was ended from outside"
    fix = "If memory ran out, use a lower number. Run the same command again: it goes on."
    return UserError(what, where="--num-proc", fix=fix, exit_code=ExitCode.OUT_OF_MEMORY)


def _mismatch(where: str, what: str, fix: str) -> UserError:
    return UserError(what, where=where, fix=fix, exit_code=ExitCode.TOKENIZER_MISMATCH)


def _used_bytes() -> int:
    return int(psutil.Process().memory_info().rss)


def _as_array(ids: Sequence[int]) -> np.ndarray:
    return np.array(ids, dtype=np.uint32)


def _whole(parts: Sequence[np.ndarray | int], answers: Sequence[np.ndarray]) -> np.ndarray:
    """Returns the ids of a text from those of its parts."""
    found = [answers[part] if isinstance(part, int) else part for part in parts]
    return found[0] if len(found) == 1 else np.concatenate(found)


def _join(documents: Iterable[np.ndarray]) -> Encoded:
    arrays = list(documents)
    lengths = np.array([len(ids) for ids in arrays], dtype=np.int64)
    return Encoded(np.concatenate([np.empty(0, np.uint32), *arrays]).view(np.int32), lengths)
