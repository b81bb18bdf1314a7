"""Encoding many documents: fast where that is proven exact, with the reference elsewhere.

The reference is the `tokenizers` library. gigatoken is some ten times faster, since it encodes each
word once and looks it up after that. Cutting a text before its spaces changes nothing if no
vocabulary entry has a space after another character: no merge can then cross the cut. Documents
that contain one of the few entries for which this does not hold are left to the reference.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from kiem.data.tokenizer import WORD_PIECES, Tokenizer
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


class Encoder:
    """Encodes batches of documents.

    Args:
        tokenizer: the tokenizer, whose own implementation is the reference.
        choice: "auto" for the fast path where it is proven exact; "reference" for the reference.

    Attributes:
        reason: why the reference does all the work, for a warning; None when it need not.
    """

    def __init__(self, tokenizer: Tokenizer, choice: Literal["auto", "reference"] = "auto"):
        self._tokenizer = tokenizer
        self._fast: Any = None
        self._crossing: re.Pattern[str] | None = None
        self.reason: str | None = None
        if choice == "auto":
            description = json.loads(tokenizer.json_bytes)
            crossing, self.reason = _proof(tokenizer, description)
            if self.reason is None:
                self._crossing = (
                    re.compile("|".join(map(re.escape, crossing))) if crossing else None
                )
                self._fast = _load_fast(description)

    def encode(self, texts: Sequence[str], places: Sequence[str]) -> Encoded:
        """Returns the ids of documents.

        Args:
            texts: the documents.
            places: where each comes from, for the message.

        Raises:
            UserError: the fast path gave other ids than the reference; names the document.
        """
        if self._fast is None:
            return _join(self._tokenizer.encode_batch(texts))
        layout = self._fast.encode_batch(list(texts)).layout
        ids = np.asarray(layout.content.data).astype(np.int32)
        ends = np.asarray(layout.offsets.data)
        encoded = Encoded(ids, np.diff(ends))
        return self._checked(encoded, ends, texts, places)

    def _checked(
        self, encoded: Encoded, ends: np.ndarray, texts: Sequence[str], places: Sequence[str]
    ) -> Encoded:
        """Compares with the reference every document with a "<", where added tokens and the
        crossing entries are, and a sample of the others; replaces those with a crossing entry."""
        chosen = [
            number
            for number, text in enumerate(texts)
            if number % _COMPARED_SHARE == 0 or "<" in text
        ]
        expected = self._tokenizer.encode_batch([texts[number] for number in chosen])
        replaced = {}
        for number, ids in zip(chosen, expected, strict=True):
            if self._crossing is not None and self._crossing.search(texts[number]):
                replaced[number] = ids
            elif not np.array_equal(encoded.ids[ends[number] : ends[number + 1]], ids):
                raise UserError(
                    "gigatoken and tokenizers encode this document differently",
                    where=places[number],
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


def _proof(tokenizer: Tokenizer, description: dict[str, Any]) -> tuple[list[str], str | None]:
    """Returns (texts of the entries that a cut before spaces would split, why it is not exact)."""
    try:
        import gigatoken  # noqa: F401
    except ImportError:
        return [], "gigatoken is not installed"
    model = description["model"]
    is_plain = model["type"] == "BPE" and model.get("byte_fallback") and not model.get("dropout")
    replaces_spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    if not is_plain or model.get("ignore_merges") or description["normalizer"] != replaces_spaces:
        return [], "it is not a byte-fallback BPE over text with its spaces replaced"
    if not _never_cuts(tokenizer, description):
        return [], "its pre-tokenizer may cut where an entry would go across"
    # "<" marks the documents to compare, so a crossing entry must have one.
    crossing = [entry for entry in model["vocab"] if re.search("[^▁]▁", entry)]
    if len(crossing) > _MAX_CROSSING_ENTRIES or not all("<" in entry for entry in crossing):
        return [], f"{len(crossing)} entries of its vocabulary have a space inside"
    return [entry.replace("▁", " ") for entry in crossing], None


def _never_cuts(tokenizer: Tokenizer, description: dict[str, Any]) -> bool:
    """Says whether the pre-tokenizer cuts nowhere that an entry of the vocabulary goes across."""
    pre_tokenizer = description["pre_tokenizer"]
    if pre_tokenizer is None:
        return True
    if pre_tokenizer["type"] != "Split" or pre_tokenizer["invert"]:
        return False
    if pre_tokenizer["pattern"] == {"String": " "}:
        return True  # Gemma's: there are no spaces left when it runs
    if pre_tokenizer["pattern"] != {"Regex": WORD_PIECES}:
        return False
    cut = tokenizer.implementation.pre_tokenizer.pre_tokenize_str
    added = {token["content"] for token in description["added_tokens"]}
    entries = [entry for entry in description["model"]["vocab"] if entry not in added]
    return all(len(cut(entry)) == 1 for entry in entries if not re.fullmatch("<0x..>", entry))


def _load_fast(description: dict[str, Any]) -> Any:
    """Returns gigatoken's encoder, to which control strings in text are text as well."""
    import gigatoken

    added = [token for token in description["added_tokens"] if not token["special"]]
    changed = {**description, "added_tokens": added, "pre_tokenizer": None}
    return gigatoken.Tokenizer.from_json(json.dumps(changed))
