"""Cleaning of Dutch documents: what is mended in a text, and why a document is left out.

The filters and thresholds are FineWeb-2's for Dutch: configs/nld_Latn.yml and
fineweb-2-pipeline.py of the repository huggingface/fineweb-2, described in arXiv:2506.20920. They
are those of Gopher (arXiv:2112.11446, appendix A1) and FineWeb, tuned per language. What differs
here: the language is told by stop words instead of GlotLID, a top n-gram has to occur twice, words
are cut by a regular expression, not by spaCy, and books are not too long.

All but the lines is done for many documents at once with numpy.
D = documents, T = tokens (words and punctuation) of all documents, V = different tokens.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from itertools import count, groupby
from typing import Any

import numpy as np

from kiem.data.clean.words import came_before, group_equal, hash_ngrams

# Gopher's, which FineWeb-2 keeps.
MIN_WORDS = 50
MAX_SYMBOLS_PER_WORD = 0.1
MAX_BULLET_LINES = 0.9
MAX_ELLIPSIS_LINES = 0.3
MIN_STOP_WORDS = 2
# FineWeb-2's pipeline, the same for all languages.
MAX_DUPLICATE_LINE_CHARACTERS = 0.1
# FineWeb-2's for Dutch.
MAX_DUPLICATE_LINES = 0.333
MIN_LINES_WITH_PUNCTUATION = 0.238
MAX_LINE_ENDS_PER_WORD = 0.194
MIN_MEAN_WORD_LENGTH, MAX_MEAN_WORD_LENGTH = 3, 16
MIN_WORDS_WITH_LETTERS = 0.828
MAX_TOP_NGRAM = {2: 0.093, 3: 0.117, 4: 0.14}
MAX_DUPLICATE_NGRAMS = {5: 0.177, 6: 0.16, 7: 0.145, 8: 0.133, 9: 0.123, 10: 0.112}
_FINEWEB_STOP_WORDS = "de van in het een en is op voor met door zijn werd hij uit"
STOP_WORDS = tuple(_FINEWEB_STOP_WORDS.split())

# Frequent words that tell Dutch from its neighbours; chosen here, docs/decisions.md has figures.
MIN_DUTCH_WORDS = 0.06
_DUTCH = "de het een zijn dat niet ik hij je wordt deze door ook aan bij naar voor uit of te"
_OTHER_LANGUAGES = (
    "the and of to that it with for as was on are by this from be not you",
    "der die und den das von zu mit sich des auf für ist nicht ein eine dem im",
    "le la les et des du un une est dans que qui pour pas au sur il ne",
    "el la los las que y del se por con un una es su para como lo",
    "il la di che e un una per non sono del della con si le dei",
    "o a os as que e do da em um uma para com não por no na",
    "die nie 'n sy hy deur hulle ek om wat dit ons sal kan moet",
    "it fan yn foar oan troch ek wie wurdt har dy mei út hat jo kin kinne wurde dizze binne sil",
)

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff]")
_MANY_MARKS = re.compile(r"(?<![^\w\s\x00-\u02ff])[^\w\s\x00-\u02ff]{100,}")
_TOKENS = re.compile(r"'n\b|\w+(?:['’.-]\w+)*|[^\w\s]+")
_LINE_ENDS = tuple(".!?…:;\"'”’»)")


def mend(text: str) -> str:
    """Returns a text in Unicode NFC, with LF line ends and without control characters.

    A byte order mark inside the text is left out like a control character. mend(mend(text)) is
    mend(text).
    """
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = _CONTROL.sub("", text)
    # Python puts the marks of a letter in order one by one, by the square of their number.
    text = _MANY_MARKS.sub(_order_marks, text)
    return unicodedata.normalize("NFC", text)


def _order_marks(found: re.Match[str]) -> str:
    """Returns characters with the marks among them in canonical order, which NFC keeps."""
    runs = groupby(found[0], key=lambda character: unicodedata.combining(character) > 0)
    ordered = (sorted(run, key=unicodedata.combining) if marks else run for marks, run in runs)
    return "".join(map("".join, ordered))


def reject(texts: Sequence[str]) -> list[str | None]:
    """Says of mended documents why they are left out, in a few words; None: they are not.

    Args:
        texts: the documents, none of them empty.
    """
    tokens = _Tokens(texts)
    failed = {**_fail_by_words(tokens), **_fail_by_lines(texts, tokens), **_fail_by_ngrams(tokens)}
    reasons: list[str | None] = [None] * len(texts)
    for reason, is_failed in reversed(failed.items()):
        for number in np.flatnonzero(is_failed):
            reasons[number] = reason
    return reasons


class _Tokens:
    """The words and punctuation marks of some documents, numbered.

    Attributes:
        vocabulary: the different tokens, in the order of their ids.
        ids: int64 [T].
        ends: one past each document's last token, int64 [D].
        document: which document a token is in, int64 [T].
        length: characters of each token, int64 [T].
        num_tokens: int64 [D].
        num_characters: of the text, int64 [D].
    """

    def __init__(self, texts: Sequence[str]):
        numbers: defaultdict[str, int] = defaultdict(count().__next__)
        parts = []
        for text in texts:
            found = _TOKENS.findall(text)
            parts.append(np.fromiter(map(numbers.__getitem__, found), np.int64, len(found)))
        self.vocabulary = list(numbers)
        self.ids = np.concatenate(parts) if parts else np.empty(0, np.int64)
        self.num_tokens = np.array([len(part) for part in parts], np.int64)
        self.ends = np.cumsum(self.num_tokens)
        self.document = np.repeat(np.arange(len(texts)), self.num_tokens)
        self.length = np.array([len(token) for token in self.vocabulary], np.int64)[self.ids]
        self.num_characters = np.array([len(text) for text in texts], np.int64)

    def count(self, of_vocabulary: list[Any]) -> np.ndarray:
        """Returns sums over each document's tokens of a value [V] that tokens have: int64 [D]."""
        return self.total(np.array(of_vocabulary, np.int32)[self.ids])

    def total(self, values: np.ndarray) -> np.ndarray:
        """Returns sums over each document's tokens: values [T] -> int64 [D]."""
        sums = np.concatenate([np.zeros(1, np.int64), np.cumsum(values, dtype=np.int64)])
        return sums[self.ends] - sums[self.ends - self.num_tokens]


def _fail_by_words(tokens: _Tokens) -> dict[str, np.ndarray]:
    """Returns which documents [D] fail, for every reason that is about single words."""
    words = tokens.vocabulary
    is_word = [any(map(str.isalnum, word)) for word in words]
    num_words = tokens.count(is_word)
    num_characters = tokens.count([len(w) * is_w for w, is_w in zip(words, is_word, strict=True)])
    mean_length = num_characters / np.maximum(num_words, 1)
    num_with_letter = tokens.count([any(map(str.isalpha, word)) for word in words])
    num_hashes = tokens.count([word.count("#") for word in words])
    num_ellipses = tokens.count([word.count("...") + word.count("…") for word in words])
    num_symbols = np.maximum(num_hashes, num_ellipses)
    num_stop_words, dutch, other = _count_known_words(tokens)
    return {
        "too short": num_words < MIN_WORDS,
        "not Dutch": (other > dutch) | (dutch < MIN_DUTCH_WORDS * num_words),
        "few stop words": num_stop_words < MIN_STOP_WORDS,
        "word length": (mean_length < MIN_MEAN_WORD_LENGTH) | (mean_length > MAX_MEAN_WORD_LENGTH),
        "few letters": num_with_letter < MIN_WORDS_WITH_LETTERS * num_words,
        "many symbols": num_symbols > MAX_SYMBOLS_PER_WORD * tokens.num_tokens,
    }


def _count_known_words(tokens: _Tokens) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns for each document [D] how many different stop words it has, how many of its words are
    frequent ones of Dutch, and of the other language that has most of them there."""
    languages = [frozenset(words.split()) for words in (_DUTCH, *_OTHER_LANGUAGES)]
    known = sorted(frozenset(STOP_WORDS).union(*languages))  # K words
    number = {word: n for n, word in enumerate(known)}
    numbers = [number.get(word.lower(), -1) for word in tokens.vocabulary]
    found = np.array(numbers, np.int64)[tokens.ids]
    is_known = found >= 0
    cells = tokens.document[is_known] * len(known) + found[is_known]
    num_documents = len(tokens.num_tokens)
    counts = np.bincount(cells, minlength=num_documents * len(known))
    counts = counts.reshape(num_documents, len(known))  # [D, K]
    num_stop_words = np.count_nonzero(counts[:, [number[word] for word in STOP_WORDS]], axis=1)
    dutch, *others = (counts[:, [number[w] for w in sorted(words)]].sum(1) for words in languages)
    return num_stop_words, dutch, np.max(others, axis=0)


def _fail_by_lines(texts: Sequence[str], tokens: _Tokens) -> dict[str, np.ndarray]:
    """Returns which documents [D] fail, for every reason that is about lines."""
    rows = [_line_shares(text) for text in texts]
    columns = np.array(rows, np.float64).reshape(len(texts), 6).T
    num_lines, duplicates, duplicate_characters, punctuation, bullets, ellipses = columns
    too_many = duplicate_characters > MAX_DUPLICATE_LINE_CHARACTERS
    return {
        "repeated lines": (duplicates > MAX_DUPLICATE_LINES) | too_many,
        "line ends": punctuation < MIN_LINES_WITH_PUNCTUATION,
        "short lines": num_lines - 1 > MAX_LINE_ENDS_PER_WORD * tokens.num_tokens,
        "bullets": bullets > MAX_BULLET_LINES,
        "cut-off lines": ellipses > MAX_ELLIPSIS_LINES,
    }


def _line_shares(text: str) -> tuple[float, ...]:
    """Returns the number of lines, and the shares of duplicate lines, characters in those,
    lines that end with punctuation, that begin with a bullet and that end with an ellipsis; empty
    lines do not count."""
    lines = [line for line in map(str.strip, text.split("\n")) if line]
    if not lines:
        return (0.0,) * 6
    num_characters = sum(map(len, lines))
    different = set(lines)
    num_different_characters = sum(map(len, different))
    return (
        len(lines),
        1 - len(different) / len(lines),
        1 - num_different_characters / num_characters,
        sum(line.endswith(_LINE_ENDS) for line in lines) / len(lines),
        sum(line.startswith(("•", "-", "*")) for line in lines) / len(lines),
        sum(line.endswith(("...", "…")) for line in lines) / len(lines),
    )


def _fail_by_ngrams(tokens: _Tokens) -> dict[str, np.ndarray]:
    """Returns which documents [D] fail because n consecutive words come again and again."""
    hashes = tokens.ids.astype(np.uint64)
    is_top = np.zeros(len(tokens.num_tokens), bool)
    for n, most in MAX_TOP_NGRAM.items():
        is_top |= _top_ngram_characters(tokens, hashes, n) > most * tokens.num_characters
    # The words of repeated longer n-grams are all in repeated 5-grams, so these say where to look.
    covered = tokens.total(tokens.length * _in_repeated(tokens, hashes, min(MAX_DUPLICATE_NGRAMS)))
    suspects = covered > min(MAX_DUPLICATE_NGRAMS.values()) * tokens.num_characters
    is_duplicate = np.zeros(len(tokens.num_tokens), bool)
    for number in np.flatnonzero(suspects):
        here = slice(tokens.ends[number] - tokens.num_tokens[number], tokens.ends[number])
        ends = np.concatenate([[0], np.cumsum(tokens.length[here])])
        is_duplicate[number] = any(
            _duplicate_characters(hashes[here], ends, n) > most * tokens.num_characters[number]
            for n, most in MAX_DUPLICATE_NGRAMS.items()
        )
    return {"repeated phrase": is_top, "repeated passages": is_duplicate}


def _ngrams(tokens: _Tokens, hashes: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns where the n-grams begin that are in one document, and a key of each.

    The number of the document is in a key's highest bits, its hash in the others.
    """
    ngrams = hash_ngrams(hashes, n)
    documents = tokens.document[: len(ngrams)]
    starts = np.flatnonzero(documents == tokens.document[len(hashes) - len(ngrams) :])
    bits = len(tokens.num_tokens).bit_length()
    documents = documents[starts].astype(np.uint64) << np.uint64(64 - bits)
    return starts, documents | ngrams[starts] >> np.uint64(bits)


def _top_ngram_characters(tokens: _Tokens, hashes: np.ndarray, n: int) -> np.ndarray:
    """Returns the characters in all occurrences of the most frequent n-gram, int64 [D]; 0 if none
    comes twice. Of several, the first in the text counts."""
    characters = np.zeros(len(tokens.num_tokens), np.int64)
    starts, keys = _ngrams(tokens, hashes, n)
    firsts, counts = group_equal(keys)
    firsts, counts = starts[firsts[counts > 1]], counts[counts > 1]
    if len(firsts) == 0:
        return characters
    documents = tokens.document[firsts]
    begins = np.flatnonzero(np.diff(documents, prepend=-1))
    rank = (counts << 32) - firsts - 1  # most occurrences, then the first place
    best = np.maximum.reduceat(rank, begins)
    counts = (best >> 32) + 1
    firsts = (counts << 32) - best - 1
    ends = np.concatenate([[0], np.cumsum(tokens.length)])
    with_spaces = ends[firsts + n] - ends[firsts] + n - 1
    characters[documents[begins]] = counts * with_spaces
    return characters


def _in_repeated(tokens: _Tokens, hashes: np.ndarray, n: int) -> np.ndarray:
    """Returns which tokens are in an n-gram that came before in the document, bool [T]."""
    starts, keys = _ngrams(tokens, hashes, n)
    changes = np.zeros(len(hashes) + 1, np.int64)
    again = starts[came_before(keys)]
    changes[again] += 1
    changes[again + n] -= 1
    return np.cumsum(changes[:-1]) > 0


def _duplicate_characters(hashes: np.ndarray, ends: np.ndarray, n: int) -> int:
    """Returns the characters in n-grams that came before, none overlapping, as Gopher counts."""
    ngrams = hash_ngrams(hashes, n)
    firsts, counts = group_equal(ngrams)
    is_single = np.zeros(len(ngrams), bool)
    is_single[firsts[counts == 1]] = True
    places = np.flatnonzero(~is_single)
    seen = set()
    num_characters = free_from = 0
    for place, ngram in zip(places.tolist(), ngrams[places].tolist(), strict=True):
        if place < free_from:
            continue
        if ngram in seen:
            num_characters += int(ends[place + n] - ends[place])
            free_from = place + n
        seen.add(ngram)
    return num_characters
