"""Encoding many documents: fast where that is proven exact, with the reference elsewhere.

The reference is the `tokenizers` library. gigatoken is some ten times faster, since it encodes each
word once and looks it up after that. Cutting a text before its spaces changes nothing if no
vocabulary entry has a space after another character: no merge can then cross the cut. Documents
that contain one of the few entries for which this does not hold are left to the reference.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec
import numpy as np
from tokenizers import Regex, pre_tokenizers

from kiem.data.tokenizer import BYTE_TOKENS, WORD_PIECES, Tokenizer
from kiem.errors import ExitCode, UserError

# More entries than this with a space inside, and most documents would go to the reference anyway.
_MAX_CROSSING_ENTRIES = 64
# Of the documents in a batch, one in so many is compared with the reference.
_COMPARED_SHARE = 200


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
    """gigatoken's encoder for a tokenizer for which it is proven exact.

    Attributes:
        backend: the encoder; control strings in text are text to it.
        crossing: finds the entries that a cut before spaces would split; None if there are none.
    """

    backend: Any
    crossing: re.Pattern[str] | None


class Encoder:
    """Encodes batches of documents.

    Args:
        tokenizer: the tokenizer, whose own implementation is the reference.
        fast: the fast path, or why there is none.

    Attributes:
        reason: why the reference does all the work; None when it need not.
    """

    def __init__(self, tokenizer: Tokenizer, fast: FastPath | str):
        self._tokenizer = tokenizer
        self._fast = fast if isinstance(fast, FastPath) else None
        self.reason = fast if isinstance(fast, str) else None

    def encode(self, texts: Sequence[str], place: Callable[[int], str]) -> Encoded:
        """Returns the ids of documents.

        Args:
            texts: the documents.
            place: says where the document of this number comes from, for the message.

        Raises:
            UserError: the fast path gave other ids than the reference; names the document.
        """
        if self._fast is None:
            return _join(self._tokenizer.encode_batch(texts))
        layout = self._fast.backend.encode_batch(list(texts)).layout
        ids = np.asarray(layout.content.data).astype(np.int32)
        ends = np.asarray(layout.offsets.data)
        encoded = Encoded(ids, np.diff(ends))
        return self._checked(encoded, ends, texts, place)

    def _checked(
        self, encoded: Encoded, ends: np.ndarray, texts: Sequence[str], place: Callable[[int], str]
    ) -> Encoded:
        """Compares with the reference every document with a "<", where added tokens and the
        crossing entries are, and a sample of the others; replaces those with a crossing entry."""
        chosen = [
            number
            for number, text in enumerate(texts)
            if number % _COMPARED_SHARE == 0 or "<" in text
        ]
        expected = self._tokenizer.encode_batch([texts[number] for number in chosen])
        assert self._fast is not None
        crossing = self._fast.crossing
        replaced = {}
        for number, ids in zip(chosen, expected, strict=True):
            if crossing is not None and crossing.search(texts[number]):
                replaced[number] = ids
            elif not np.array_equal(encoded.ids[ends[number] : ends[number + 1]], ids):
                raise UserError(
                    "gigatoken and tokenizers encode this document differently",
                    where=place(number),
                    fix="Use --encoder reference, and please report the document.",
                    exit_code=ExitCode.TOKENIZER_MISMATCH,
                )
        if not replaced:
            return encoded
        documents = np.split(encoded.ids, ends[1:-1])
        return _join([replaced.get(n, ids) for n, ids in enumerate(documents)])


def _join(documents: Sequence[Sequence[int] | np.ndarray]) -> Encoded:
    lengths = np.array([len(ids) for ids in documents], dtype=np.int64)
    arrays = [np.asarray(ids, dtype=np.int32) for ids in documents]
    return Encoded(np.concatenate(arrays) if arrays else np.empty(0, np.int32), lengths)


def make_encoder(tokenizer: Tokenizer, choice: str) -> Encoder:
    """Returns the encoder that `--encoder` asks for: "auto" or "reference"."""
    if choice == "reference":
        return Encoder(tokenizer, "as asked for with --encoder reference")
    return Encoder(tokenizer, prepare_fast_path(tokenizer.json_bytes))


class _Model(msgspec.Struct, omit_defaults=True):
    """What the proof needs of a tokenizer's model; the merges stay bytes, unread."""

    type: str
    vocab: msgspec.Raw
    merges: msgspec.Raw
    byte_fallback: bool = False
    dropout: float | None = None
    ignore_merges: bool = False
    unk_token: str | None = None
    fuse_unk: bool = False
    continuing_subword_prefix: str | None = None
    end_of_word_suffix: str | None = None


class _Description(msgspec.Struct):
    """A tokenizer.json."""

    added_tokens: list[dict[str, Any]]
    normalizer: Any
    pre_tokenizer: Any
    model: _Model
    post_processor: Any = None
    decoder: Any = None
    version: str = "1.0"


def prepare_fast_path(json_bytes: bytes) -> FastPath | str:
    """Returns the fast path for a tokenizer.json, or the reason why there is none."""
    try:
        import gigatoken
    except ImportError:
        return "gigatoken is not installed"
    try:
        description = msgspec.json.decode(json_bytes, type=_Description)
    except msgspec.ValidationError:
        return "the tokenizer is not a BPE"
    model = description.model
    is_plain = model.type == "BPE" and model.byte_fallback and not model.dropout
    replaces_spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    if not is_plain or model.ignore_merges or description.normalizer != replaces_spaces:
        return "the tokenizer is not a byte-fallback BPE over text with its spaces replaced"
    vocabulary = msgspec.json.decode(model.vocab, type=dict[str, int])
    added = description.added_tokens
    if not _never_cuts(description.pre_tokenizer, vocabulary, added):
        return "the pre-tokenizer may cut where an entry of the vocabulary would go across"
    inner = [entry for entry in vocabulary if "▁" in entry[1:]]
    crossing = [entry for entry in inner if re.search("[^▁]▁", entry)]
    # Documents with a "<" are compared with the reference, so a crossing entry must have one.
    if len(crossing) > _MAX_CROSSING_ENTRIES or not all("<" in entry for entry in crossing):
        return f"{len(crossing)} entries of the vocabulary have a space inside"
    texts = [re.escape(entry.replace("▁", " ")) for entry in crossing]
    description.added_tokens = [token for token in added if not token["special"]]
    description.pre_tokenizer = None
    backend = gigatoken.Tokenizer.from_json(msgspec.json.encode(description))
    return FastPath(backend, re.compile("|".join(texts)) if texts else None)


def _never_cuts(
    pre_tokenizer: dict[str, Any] | None, vocabulary: dict[str, int], added: list[dict[str, Any]]
) -> bool:
    """Says whether the pre-tokenizer cuts nowhere that an entry of the vocabulary goes across."""
    if pre_tokenizer is None:
        return True
    if pre_tokenizer["type"] != "Split" or pre_tokenizer["invert"]:
        return False
    if pre_tokenizer["pattern"] == {"String": " "}:
        return True  # Gemma's: there are no spaces left when it runs
    if pre_tokenizer["pattern"] != {"Regex": WORD_PIECES}:
        return False
    cut = pre_tokenizers.Split(Regex(WORD_PIECES), "isolated").pre_tokenize_str
    reserved = {token["content"] for token in added} | set(BYTE_TOKENS)
    return all(len(cut(entry)) == 1 for entry in vocabulary if entry not in reserved)
