"""Vocabularies as llama.cpp reads them: entries with scores and types, and no list of merges.

llama.cpp encodes as SentencePiece does: of all neighbours that together are an entry it merges
those whose entry has the highest score, the leftmost first. A list of merges means the same if it
has every way to make each entry and keeps those that make the same entry together; the score is
then the place in the list. Both are checked here, for Gemma's own tokenizer as for one that kiem
trained. (The usual converter needs Gemma's tokenizer.model, and takes a wrong path without it:
llama.cpp#19152.)
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
from gguf import TokenType

from kiem.core.errors import ExitCode, UserError
from kiem.tokenizer.tokenizer import BYTE_TOKENS, AddedToken, Tokenizer
from kiem.tokenizer.train import SPLIT_REGEX

# Splits that change nothing: Gemma's finds no space any more, and no entry goes across kiem's.
_SPLITS = ({"String": " "}, {"Regex": SPLIT_REGEX})


@dataclass(frozen=True)
class Vocabulary:
    """Entries by id: their text, score and type."""

    tokens: list[str]
    scores: list[float]
    types: list[TokenType]


def make_vocabulary(tokenizer: Tokenizer, num_rows: int) -> Vocabulary:
    """Returns a tokenizer's vocabulary with scores.

    Args:
        tokenizer: the tokenizer.
        num_rows: rows of the model's embedding; entries beyond them, such as Gemma's
            <image_soft_token>, are left out, and rows without an entry get one that is unused.

    Raises:
        UserError: llama.cpp would encode text in another way than this tokenizer does.
    """
    split = tokenizer.description.pre_tokenizer or {"type": "Split", "pattern": _SPLITS[0]}
    never_cuts = split.get("type") == "Split" and split.get("pattern") in _SPLITS
    if not tokenizer.is_gemma_style or not never_cuts:
        raise _not_expressible("it is not a byte-fallback BPE over text with its spaces replaced")
    added = tokenizer.added_tokens
    ranks = _ranks(tokenizer)
    lowest = -float(len(ranks))
    tokens = [f"[PAD{number}]" for number in range(num_rows)]
    scores, types = [lowest] * num_rows, [TokenType.UNUSED] * num_rows
    ids = {**tokenizer.vocabulary, **{text: token.id for text, token in added.items()}}
    for text, number in ids.items():
        if number < num_rows:
            tokens[number] = text
            scores[number] = -float(ranks[text]) if text in ranks else lowest
            types[number] = _type_of(text, added.get(text))
    return Vocabulary(tokens, scores, types)


def _type_of(text: str, added: AddedToken | None) -> TokenType:
    if text == "<unk>":
        return TokenType.UNKNOWN
    if text in BYTE_TOKENS:
        return TokenType.BYTE
    if added is None or not text.strip("▁"):
        # Runs of spaces are added tokens in Gemma's file, but are reached by merging: an added
        # token is looked for before spaces become "▁", and would be written as "▁" too.
        return TokenType.NORMAL
    return TokenType.CONTROL if added.special else TokenType.USER_DEFINED


def _ranks(tokenizer: Tokenizer) -> dict[str, int]:
    """Returns entry -> its place among all that merging can make, the first being made first."""
    try:
        kind = list[tuple[str, str] | str]
        merges = msgspec.json.decode(tokenizer.description.model.merges, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise _not_expressible("its merges are not pairs of entries") from error
    ranks: dict[str, int] = {}
    previous = ""
    for merge in merges:
        left, right = merge if isinstance(merge, tuple) else merge.partition(" ")[::2]
        made = left + right
        # Gemma's runs of spaces are listed by their left part. Merging goes from left to right and
        # keeps the longer runs left, so the longest left part also makes the longest run.
        is_run = len(set(made)) == 1
        if made != previous and made in ranks and not is_run:
            raise _not_expressible(f"the merges that make {made!r} are not together")
        ranks.setdefault(made, len(ranks))
        previous = made
    entries, reserved = tokenizer.vocabulary, {*BYTE_TOKENS, *tokenizer.added_tokens}
    num_possible = sum(
        entry[:cut] in entries and entry[cut:] in entries
        for entry in entries
        if entry not in reserved or entry in ranks
        for cut in range(1, len(entry))
    )
    if num_possible != len(merges):
        raise _not_expressible("not every pair of entries that make an entry may merge")
    return ranks


def _not_expressible(why: str) -> UserError:
    return UserError(
        f"llama.cpp would encode text differently: {why}",
        where="tokenizer.json",
        fix="GGUF takes Gemma's tokenizer or one that preprocess.py trained (train:N).",
        exit_code=ExitCode.TOKENIZER_MISMATCH,
    )
