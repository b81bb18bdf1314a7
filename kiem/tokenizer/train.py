"""Training of a byte-fallback BPE vocabulary in Gemma's style."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as TokenizersTokenizer

from kiem.core.errors import ExitCode, UserError, bad_option
from kiem.tokenizer.tokenizer import BYTE_TOKENS, Tokenizer, parse_tokenizer

_CONTROL_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>")
_MIN_VOCABULARY, _MAX_VOCABULARY = 512, 2**20
# Letters, digits and signs are disjoint, and spaces only begin a match: no entry of the vocabulary
# spans two matches, so splitting is exact. Merging over the whole text gives the same ids.
SPLIT_REGEX = r"▁*[\p{L}\p{M}]+|▁*\p{N}|▁*[^\s▁\p{L}\p{M}\p{N}]+|▁+|\n+|\t+"
# Training takes time by the square of the length of a match, so its runs are no longer than this.
# Of 52 MB of Dutch text the longest is a line of 1994 "─".
_MAX_RUN = 2048
# The same with bounded runs, and for white space that SPLIT_REGEX leaves alone.
_TRAINING_REGEX = (
    (SPLIT_REGEX + r"|[^\S\n\t]+")
    .replace("*", f"{{0,{_MAX_RUN}}}")
    .replace("+", f"{{1,{_MAX_RUN}}}")
)
_BLOCK_CHARACTERS = 4_000_000  # at once, to bound memory


def vocabulary_size_to_train(option: str) -> int | None:
    """Returns N of the option train:N, or None when the option names a tokenizer.

    Raises:
        UserError: N is not a number, too small for the bytes and control tokens, or too large.
    """
    if not option.startswith("train:"):
        return None
    digits = option.removeprefix("train:")
    is_number = digits.isdecimal() and len(digits) < 10  # int() refuses thousands of digits
    if not is_number or not _MIN_VOCABULARY <= int(digits) <= _MAX_VOCABULARY:
        what = f"{reprlib.repr(option)} is not a vocabulary to train"
        limits = f"from {_MIN_VOCABULARY} to {_MAX_VOCABULARY}"
        raise bad_option("--tokenizer", what, f"Give train:N with N {limits}, such as train:16384.")
    return int(digits)


def train_tokenizer(texts: Iterable[str], vocabulary_size: int, left_out: str = "") -> Tokenizer:
    """Trains a vocabulary.

    Ids 0 to 3 are <pad>, <eos>, <bos>, <unk> as in Gemma, then the 256 bytes, then characters and
    pairs by frequency. A token is a part of one word with the spaces before it, a single digit, or
    a run of line ends, of at most 2048 characters. As in Gemma, any two neighbours that together
    are in the vocabulary may merge, the entry that was learned first going first. So the vocabulary
    alone determines the encoding, and SentencePiece and llama.cpp can reproduce it.

    Args:
        texts: the training documents; they are read twice, so not an iterator.
        vocabulary_size: entries of the vocabulary.
        left_out: what the error adds, such as why there is so little text.

    Raises:
        UserError: the texts are too little for so many entries.
    """
    assert not isinstance(texts, Iterator)
    # Learn the entries
    alphabet = _most_frequent_characters(texts, max(128, vocabulary_size // 16))
    implementation = TokenizersTokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    implementation.normalizer = normalizers.Replace(" ", "▁")
    implementation.pre_tokenizer = pre_tokenizers.Split(Regex(_TRAINING_REGEX), "isolated")
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[*_CONTROL_TOKENS, *BYTE_TOKENS],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    implementation.train_from_iterator(texts, trainer)
    vocabulary: dict[str, int] = implementation.get_vocab(with_added_tokens=False)
    if len(vocabulary) < vocabulary_size:
        what = f"the training documents give only {len(vocabulary)} of {vocabulary_size} entries"
        raise UserError(
            what + left_out,
            where="--tokenizer",
            fix="Use more text, a smaller train:N, or a trained tokenizer.",
            exit_code=ExitCode.DATASET_TOO_SMALL,
        )
    # Describe how they encode and decode
    implementation.pre_tokenizer = pre_tokenizers.Split(Regex(SPLIT_REGEX), "isolated")
    implementation.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    implementation.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", 2)]
    )
    description: dict[str, Any] = json.loads(implementation.to_str())
    description["added_tokens"] = [
        token for token in description["added_tokens"] if token["content"] in _CONTROL_TOKENS
    ]
    description["model"]["merges"] = _all_merges(vocabulary)
    json_bytes = json.dumps(description, ensure_ascii=False, indent=1).encode()
    return parse_tokenizer(json_bytes, f"train:{vocabulary_size}")


def _most_frequent_characters(texts: Iterable[str], most: int) -> list[str]:
    """Returns the most frequent characters, of equally frequent ones the first in Unicode.

    The trainer's own choice among equally frequent ones differs each time.
    """
    counts = np.zeros(0x110000, np.int64)
    for text in texts:
        for start in range(0, len(text), _BLOCK_CHARACTERS):
            block = text[start : start + _BLOCK_CHARACTERS].encode("utf-32-le")
            found = np.bincount(np.frombuffer(block, np.uint32))
            counts[: len(found)] += found
    counts[ord("▁")] += counts[ord(" ")]
    counts[ord(" ")] = 0
    order = np.argsort(-counts, kind="stable")[:most]
    return [chr(code) for code in order[counts[order] > 0]]


def _all_merges(vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Returns every way to make an entry of two others, in the order the entries were learned."""
    reserved = {*_CONTROL_TOKENS, *BYTE_TOKENS}
    merges = []
    for token in sorted(vocabulary.keys() - reserved, key=vocabulary.__getitem__):
        halves = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = [(a, b) for a, b in halves if a in vocabulary and b in vocabulary]
        merges += sorted(known, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
    return merges
