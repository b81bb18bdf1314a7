"""Tokenizers: load or train one, pin it by its hash, encode documents, write its files.

A tokenizer here is always a `tokenizer.json` that the `tokenizers` library reads, with the control
tokens <pad>, <eos>, <bos>. Text never becomes a control token: the literal string "<eos>" in a
document is encoded as ordinary characters.
"""

from __future__ import annotations

import hashlib
import json
import re
import reprlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as TokenizersTokenizer

from kiem.core.errors import ExitCode, UserError
from kiem.core.files import write_bytes, write_json
from kiem.hub import download_tokenizer, looks_like_hub_id
from kiem.tokenizer.tokenizer_json import (
    MAX_ROWS,
    TokenizerJson,
    read_tokenizer_json,
    shorten_merges,
)

TOKENIZER_FILE = "tokenizer.json"
_CONFIG_FILE = "tokenizer_config.json"
_SPECIAL_NAMES = ("pad", "eos", "bos")
_CONTROL_TOKENS = (*(f"<{name}>" for name in _SPECIAL_NAMES), "<unk>")
BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))
_MIN_TRAINED_VOCABULARY = 512
_MAX_TRAINED_VOCABULARY = 2**20
# How texts are cut before a vocabulary is trained on them. Letters, digits and signs are disjoint,
# and spaces only begin a piece: no entry can span two pieces, so cutting here is exact, and merging
# over the whole text gives the same ids.
WORD_PIECES = r"▁*[\p{L}\p{M}]+|▁*\p{N}|▁*[^\s▁\p{L}\p{M}\p{N}]+|▁+|\n+|\t+"
# Training takes time by the square of the length of a piece: its runs are no longer than this. Of
# 52 MB of Dutch text the longest is a line of 1994 "─".
_MAX_PIECE_CHARACTERS = 2048
# The same with bounded runs, of white space that is in none of the others as well.
_SHORT_PIECES = re.sub(
    r"[*+]",
    lambda sign: f"{{{'*+'.index(sign[0])},{_MAX_PIECE_CHARACTERS}}}",
    rf"{WORD_PIECES}|[^\S\n\t]+",
)
_BLOCK_CHARACTERS = 4_000_000


@dataclass(frozen=True)
class Tokenizer:
    """A loaded tokenizer.

    Attributes:
        json_bytes: the exact content of tokenizer.json.
        content: what that says; None if it is not a BPE.
        sha256: the hash of those bytes, by which chunk directories and models pin it.
        origin: where it came from, for the manifest.
        num_rows: rows that an embedding needs for every id that text can become.
    """

    json_bytes: bytes = field(repr=False)
    content: TokenizerJson | None = field(repr=False)
    sha256: str
    origin: str

    @cached_property
    def implementation(self) -> TokenizersTokenizer:
        """The `tokenizers` object; encodes control strings in text as text.

        Made when it is first needed, since Gemma's takes most of a second.
        """
        given = self.json_bytes
        if self.content is not None:
            given = shorten_merges(self.content, self.json_bytes)
        try:
            implementation = TokenizersTokenizer.from_buffer(given)
        except BaseException as error:  # a panic of its Rust code is no Exception
            if isinstance(error, KeyboardInterrupt):
                raise
            raise _bad_tokenizer(self.origin, f"not a tokenizer.json ({error})") from error
        implementation.encode_special_tokens = True
        implementation.no_padding()
        implementation.no_truncation()
        return implementation

    @cached_property
    def num_rows(self) -> int:
        # Gemma's <image_soft_token> = 262144 is an added token beyond the model's vocabulary: text
        # never becomes it, and the 1B model has no row for it.
        if self.content is not None:
            vocabulary, added = self.content.vocabulary, self.content.added_tokens
            text_ids = [token.id for token in added.values() if not token.special]
        else:
            vocabulary = self.implementation.get_vocab(with_added_tokens=False)
            decoder = self.implementation.get_added_tokens_decoder()
            text_ids = [token_id for token_id, token in decoder.items() if not token.special]
        return max([*self.special_ids.values(), *vocabulary.values(), *text_ids]) + 1

    @property
    def pad_id(self) -> int:
        return self.special_ids["pad"]

    @property
    def eos_id(self) -> int:
        return self.special_ids["eos"]

    @property
    def bos_id(self) -> int:
        return self.special_ids["bos"]

    @cached_property
    def special_ids(self) -> dict[str, int]:
        """The ids of the control tokens, under "pad", "eos" and "bos"."""
        found = {name: self.token_id(f"<{name}>") for name in _SPECIAL_NAMES}
        return {name: token_id for name, token_id in found.items() if token_id is not None}

    def token_id(self, token: str) -> int | None:
        """Returns the id of an entry of the vocabulary or an added token, if there is one."""
        if self.content is not None:
            return self.content.token_id(token)
        return self.implementation.token_to_id(token)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of each text, without control tokens."""
        encodings = self.implementation.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def encode(self, text: str) -> list[int]:
        """Returns the ids of one text, without control tokens."""
        return self.encode_batch([text])[0]

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids; control tokens are left out."""
        text: str = self.implementation.decode(list(ids), skip_special_tokens=True)
        return text


def load_tokenizer(name: str) -> Tokenizer:
    """Loads a tokenizer from a folder, a tokenizer.json or the Hub.

    Args:
        name: an existing path, or else a Hub id such as google/gemma-3-1b-pt.

    Raises:
        UserError: it is not there, is not a tokenizer, or lacks a control token.
    """
    path = Path(name)
    if path.is_dir():
        path = path / TOKENIZER_FILE
    elif not path.exists() and looks_like_hub_id(name):
        files = download_tokenizer(name)
        return parse_tokenizer(files.paths[0].read_bytes(), f"{name}@{files.revision}")
    try:
        json_bytes = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"no readable tokenizer here ({error.strerror})",
            where=str(path),
            fix="Give a Hub id, a folder that holds tokenizer.json, or a tokenizer.json.",
            exit_code=ExitCode.NOT_FOUND,
        ) from error
    return parse_tokenizer(json_bytes, str(path))


def parse_tokenizer(json_bytes: bytes, origin: str) -> Tokenizer:
    """Makes a Tokenizer of the content of a tokenizer.json.

    Raises:
        UserError: the content is not a tokenizer, lacks <pad>, <eos> or <bos>, or has huge ids.
    """
    content, sha256 = read_tokenizer_json(json_bytes), hashlib.sha256(json_bytes).hexdigest()
    tokenizer = Tokenizer(json_bytes, content, sha256, origin)
    for name in _SPECIAL_NAMES:
        if name not in tokenizer.special_ids:
            raise _bad_tokenizer(origin, f"it has no <{name}>")
    if tokenizer.num_rows > MAX_ROWS:
        what = f"its ids go up to {tokenizer.num_rows - 1}; supported are {MAX_ROWS} rows"
        raise _bad_tokenizer(origin, what)
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes tokenizer.json, byte for byte, and the configuration files that transformers reads."""
    write_bytes(folder / TOKENIZER_FILE, tokenizer.json_bytes)
    tokens = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    if tokenizer.token_id("<unk>") is not None:
        tokens["unk_token"] = "<unk>"
    config = {
        **tokens,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"],
    }
    write_json(folder / _CONFIG_FILE, config)
    write_json(folder / "special_tokens_map.json", tokens)


def vocabulary_size_to_train(option: str) -> int | None:
    """Returns N of the option train:N, or None when the option names a tokenizer.

    Raises:
        UserError: N is not a number, too small for the bytes and control tokens, or too large.
    """
    if not option.startswith("train:"):
        return None
    digits = option.removeprefix("train:")
    is_number = digits.isdecimal() and len(digits) < 10  # int() refuses thousands of digits
    smallest, largest = _MIN_TRAINED_VOCABULARY, _MAX_TRAINED_VOCABULARY
    if not is_number or not smallest <= int(digits) <= largest:
        raise UserError(
            f"{reprlib.repr(option)} is not a vocabulary to train",
            where="--tokenizer",
            fix=f"Give train:N with N from {smallest} to {largest}, such as train:16384.",
            exit_code=ExitCode.BAD_OPTION,
        )
    return int(digits)


def train_tokenizer(texts: Iterable[str], vocabulary_size: int, left_out: str = "") -> Tokenizer:
    """Trains a byte-fallback BPE vocabulary in Gemma's style.

    Ids 0 to 3 are <pad>, <eos>, <bos>, <unk> as in Gemma, then the 256 bytes, then characters and
    pairs by frequency. A token is a piece of a word with the space before it, a single digit, or a
    run of line ends; never two words. As in Gemma, any two neighbours that together are in the
    vocabulary may merge, the entry that was learned first going first (what SentencePiece does), so
    the vocabulary alone determines the encoding and other programs can reproduce it. No entry is
    longer than 2048 characters.

    Args:
        texts: the training documents; they are gone through twice, so not an iterator.
        vocabulary_size: entries of the vocabulary.
        left_out: what the error adds, such as why there is so little text.

    Raises:
        UserError: the texts are too little for so many entries.
    """
    assert not isinstance(texts, Iterator)
    alphabet = _most_frequent_characters(texts, max(128, vocabulary_size // 16))
    implementation = TokenizersTokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    implementation.normalizer = normalizers.Replace(" ", "▁")
    implementation.pre_tokenizer = pre_tokenizers.Split(Regex(_SHORT_PIECES), "isolated")
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
        raise UserError(
            f"the training documents give only {len(vocabulary)} of {vocabulary_size} entries"
            f"{left_out}",
            where="--tokenizer",
            fix=f"Use more text, or train:{len(vocabulary)} or fewer."
            if len(vocabulary) >= _MIN_TRAINED_VOCABULARY
            else "Use more text, or a tokenizer that is trained already.",
            exit_code=ExitCode.DATASET_TOO_SMALL,
        )
    implementation.pre_tokenizer = pre_tokenizers.Split(Regex(WORD_PIECES), "isolated")
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

    The trainer can choose them, too, but of equally frequent ones it takes others each time.
    """
    counts = np.zeros(0x110000, np.int64)

    def count(block: list[str]) -> None:
        found = np.bincount(np.frombuffer("".join(block).encode("utf-32-le"), np.uint32))
        counts[: len(found)] += found

    block: list[str] = []  # one by one, short texts with emoji would take long
    num_characters = 0
    for text in texts:
        for start in range(0, len(text), _BLOCK_CHARACTERS):
            part = text[start : start + _BLOCK_CHARACTERS]
            block.append(part)
            num_characters += len(part)
            if num_characters >= _BLOCK_CHARACTERS:
                count(block)
                block, num_characters = [], 0
    count(block)
    counts[ord("▁")] += counts[ord(" ")]
    counts[ord(" ")] = 0
    order = np.argsort(-counts, kind="stable")[:most]
    return [chr(code) for code in order[counts[order] > 0]]


def _all_merges(vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Returns every way to make an entry of two others, in the order the entries were learned."""
    reserved = {*_CONTROL_TOKENS, *BYTE_TOKENS}
    merges = []
    for token in sorted(vocabulary, key=lambda entry: vocabulary[entry]):
        if token in reserved:
            continue
        halves = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = [(a, b) for a, b in halves if a in vocabulary and b in vocabulary]
        merges += sorted(known, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
    return merges


def _bad_tokenizer(where: str, what: str) -> UserError:
    return UserError(
        what,
        where=where,
        fix="Use a tokenizer.json with <pad>, <eos> and <bos>, such as Gemma's, or train:16384.",
        exit_code=ExitCode.TOKENIZER_MISMATCH,
    )
