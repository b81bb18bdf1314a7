"""Quality filters for Dutch documents, with the thresholds of FineWeb-2.

FineWeb-2's are in configs/nld_Latn.yml and fineweb-2-pipeline.py of huggingface/fineweb-2
(arXiv:2506.20920): the filters of Gopher (arXiv:2112.11446, appendix A1) and FineWeb, tuned per
language. What differs: frequent words identify the language instead of GlotLID, a top n-gram has to
occur twice, words are matched by a regular expression, not by spaCy, and no document is too long.

Many documents are filtered at once with numpy. D = documents, T = tokens (words and punctuation) of
all documents, V = different tokens.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import chain, count

import numpy as np

from kiem.data.clean.ngrams import hash_ngrams, mix_hashes, repeated

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
LANGUAGES = {
    "Dutch": "de het een zijn dat niet ik hij je wordt deze door ook aan bij naar voor uit of te",
    "English": "the and of to that it with for as was on are by this from be not you",
    "German": "der die und den das von zu mit sich des auf für ist nicht ein eine dem im",
    "French": "le la les et des du un une est dans que qui pour pas au sur il ne",
    "Spanish": "el la los las que y del se por con un una es su para como lo",
    "Italian": "il la di che e un una per non sono del della con si le dei",
    "Portuguese": "o a os as que e do da em um uma para com não por no na",
    "Afrikaans": "die nie 'n sy hy deur hulle ek om wat dit ons sal kan moet",
    "Frisian": "it fan yn foar oan troch ek wie wurdt har dy mei út hat jo kin kinne wurde dizze "
    "binne sil",
}

_TOKENS = re.compile(r"'n\b|\w+(?:['’.-]\w+)*|[^\w\s]+")
_LINE_ENDS = ".!?…:;\"'”’»)"


def reject_reasons(texts: Sequence[str]) -> list[str | None]:
    """Returns why each normalized document is rejected, in a few words; None if it is kept."""
    tokens = _Tokens(texts)
    rejected = {"empty": tokens.num_tokens == 0}
    rejected |= _check_words(tokens) | _check_lines(texts, tokens) | _check_ngrams(tokens)
    reasons: list[str | None] = [None] * len(texts)
    for reason, is_rejected in reversed(rejected.items()):  # the first reason counts
        for number in np.flatnonzero(is_rejected):
            reasons[number] = reason
    return reasons


def identify_languages(texts: Sequence[str]) -> list[str]:
    """Returns the language of each text of which most frequent words are in it; "unclear" if those
    are too few."""
    tokens = _Tokens(texts)
    _, counts = _count_known_words(tokens)
    is_clear = counts.max(0) >= MIN_DUTCH_WORDS * np.maximum(tokens.num_tokens, 1)
    names = [*LANGUAGES]
    return [
        names[place] if clear else "unclear"
        for place, clear in zip(counts.argmax(0).tolist(), is_clear.tolist(), strict=True)
    ]


class _Tokens:
    """The words and punctuation marks of some documents, numbered.

    Attributes:
        vocabulary: the different tokens, in the order of their ids.
        ids: int64 [T].
        document: which document a token is in, int64 [T].
        starts: each document's first token, then T, int64 [D + 1].
        offsets: characters in the tokens before each one, then in all, int64 [T + 1].
        num_tokens, num_characters: of each document, int64 [D].
    """

    def __init__(self, texts: Sequence[str]):
        # No token goes across white space: what is between it is numbered, and each different one
        # is cut into tokens once.
        words: defaultdict[str, int] = defaultdict(count().__next__)
        parts = [np.empty(0, np.int64)]
        for text in texts:
            found = text.split()
            parts.append(np.fromiter(map(words.__getitem__, found), np.int64, len(found)))
        word_ids = np.concatenate(parts)
        numbers: defaultdict[str, int] = defaultdict(count().__next__)
        cut = [[word] if word.isalnum() else _TOKENS.findall(word) for word in words]
        lengths = np.fromiter(map(len, cut), np.int64, len(cut))  # tokens of each different word
        flat = np.fromiter(map(numbers.__getitem__, chain.from_iterable(cut)), np.int64)
        # Put the tokens of each word where it occurs.
        num_tokens = lengths[word_ids]
        ends = np.concatenate([[0], np.cumsum(num_tokens)])
        shifts = (np.cumsum(lengths) - lengths)[word_ids] - ends[:-1]
        self.ids = flat[np.repeat(shifts, num_tokens) + np.arange(ends[-1])]
        self.vocabulary = list(numbers)
        self.starts = ends[np.cumsum([len(part) for part in parts])]
        self.num_tokens = np.diff(self.starts)
        self.document = np.repeat(np.arange(len(texts)), self.num_tokens)
        sizes = np.fromiter(map(len, self.vocabulary), np.int64)[self.ids]
        self.offsets = np.concatenate([[0], np.cumsum(sizes)])
        self.num_characters = np.array([len(text) for text in texts], np.int64)

    def count(self, of_vocabulary: np.ndarray) -> np.ndarray:
        """Returns the sum over each document's tokens of a value that tokens have: [V] -> [D]."""
        return self.total(of_vocabulary[self.ids])

    def total(self, values: np.ndarray) -> np.ndarray:
        """Returns the sum over each document's tokens: [T] -> int64 [D]."""
        sums = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
        return np.diff(sums[self.starts])


def _check_words(tokens: _Tokens) -> dict[str, np.ndarray]:
    """Returns reason -> rejected documents, bool [D], for reasons about single words."""
    words = tokens.vocabulary
    is_word = np.fromiter(map(str.isalpha, words), bool, len(words))
    has_letter = is_word.copy()
    hashes, ellipses = np.zeros((2, len(words)), np.int64)
    for number in np.flatnonzero(~is_word).tolist():
        word = words[number]
        is_word[number] = any(map(str.isalnum, word))
        has_letter[number] = any(map(str.isalpha, word))
        hashes[number] = word.count("#")
        ellipses[number] = word.count("...") + word.count("…")
    num_words = tokens.count(is_word)
    num_characters = tokens.total(np.diff(tokens.offsets) * is_word[tokens.ids])
    mean_length = num_characters / np.maximum(num_words, 1)
    num_with_letter = tokens.count(has_letter)
    num_hashes, num_ellipses = tokens.count(hashes), tokens.count(ellipses)
    num_symbols = np.maximum(num_hashes, num_ellipses)
    num_stop_words, (dutch, *others) = _count_known_words(tokens)
    other = np.max(others, axis=0)
    return {
        "too short": num_words < MIN_WORDS,
        "not Dutch": (other > dutch) | (dutch < MIN_DUTCH_WORDS * num_words),
        "few stop words": num_stop_words < MIN_STOP_WORDS,
        "word length": (mean_length < MIN_MEAN_WORD_LENGTH) | (mean_length > MAX_MEAN_WORD_LENGTH),
        "few letters": num_with_letter < MIN_WORDS_WITH_LETTERS * num_words,
        "many symbols": num_symbols > MAX_SYMBOLS_PER_WORD * tokens.num_tokens,
    }


def _count_known_words(tokens: _Tokens) -> tuple[np.ndarray, np.ndarray]:
    """Returns for each document how many different stop words it has [D], and the frequent words of
    each language in it [languages, D]."""
    languages = [frozenset(words.split()) for words in LANGUAGES.values()]
    known = sorted(frozenset(STOP_WORDS).union(*languages))  # K words
    number = {word: n for n, word in enumerate(known)}
    longest = max(map(len, known))  # in lower case no word is shorter
    get = number.get
    of_vocabulary = [get(w.lower(), -1) if len(w) <= longest else -1 for w in tokens.vocabulary]
    found = np.array(of_vocabulary, np.int64)[tokens.ids]
    is_known = found >= 0
    cells = tokens.document[is_known] * len(known) + found[is_known]
    num_documents = len(tokens.num_tokens)
    counts = np.bincount(cells, minlength=num_documents * len(known))
    counts = counts.reshape(num_documents, len(known))  # [D, K]
    num_stop_words = np.count_nonzero(counts[:, [number[word] for word in STOP_WORDS]], axis=1)
    of_languages = [counts[:, [number[word] for word in words]].sum(1) for words in languages]
    return num_stop_words, np.array(of_languages)


def _check_lines(texts: Sequence[str], tokens: _Tokens) -> dict[str, np.ndarray]:
    """Returns reason -> rejected documents, bool [D], for reasons about lines."""
    columns = np.array([_line_shares(text) for text in texts]).reshape(len(texts), 6).T
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
    """Returns the number of lines that are not empty, and the shares of: duplicate lines, their
    characters, lines ending with punctuation, with a bullet, and ending with an ellipsis."""
    lines = [line for line in map(str.strip, text.split("\n")) if line]
    if not lines:
        return (0.0,) * 6
    different = set(lines)
    return (
        len(lines),
        1 - len(different) / len(lines),
        1 - sum(map(len, different)) / sum(map(len, lines)),
        sum([line[-1] in _LINE_ENDS for line in lines]) / len(lines),
        sum([line[0] in "•-*" for line in lines]) / len(lines),
        sum([line.endswith(("...", "…")) for line in lines]) / len(lines),
    )


def _check_ngrams(tokens: _Tokens) -> dict[str, np.ndarray]:
    """Returns reason -> rejected documents, bool [D], for repeated n-grams."""
    is_top, is_duplicate = np.zeros((2, len(tokens.num_tokens)), bool)
    for n, starts, groups in _repeated_ngrams(tokens, max(MAX_DUPLICATE_NGRAMS)):
        firsts = np.empty(len(starts), np.int64)
        firsts[groups[::-1]] = starts[::-1]
        if n in MAX_TOP_NGRAM:
            is_top |= _top_ngram_characters(tokens, n, firsts, groups) > (
                MAX_TOP_NGRAM[n] * tokens.num_characters
            )
        if n in MAX_DUPLICATE_NGRAMS:
            most = MAX_DUPLICATE_NGRAMS[n] * tokens.num_characters
            # Not more than these characters can be in repetitions.
            covered = _covered_characters(tokens, n, starts[starts != firsts[groups]])
            for number in np.flatnonzero((covered > most) & ~is_duplicate):
                here = slice(*np.searchsorted(starts, tokens.starts[number : number + 2]))
                characters = _duplicate_characters(starts[here], groups[here], tokens.offsets, n)
                is_duplicate[number] = characters > most[number]
    return {"repeated phrase": is_top, "repeated passages": is_duplicate}


def _repeated_ngrams(tokens: _Tokens, longest: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yields, for n = 2 to `longest`, the n-grams that occur more than once in their document.

    That is n, the token with which each of them starts, and a number that equal ones share. An
    n-gram is repeated only if the shorter one before its last token is, and the one after its
    first; so few of the longer ones are looked at.
    """
    ids = tokens.ids.astype(np.uint64)
    bits = len(tokens.num_tokens).bit_length()
    documents = tokens.document.astype(np.uint64) << np.uint64(64 - bits)
    starts, hashes = np.arange(len(ids)), hash_ngrams(ids, 1)
    longer = np.flatnonzero(documents[:-1] == documents[1:])
    for n in range(2, longest + 1):
        starts, hashes = starts[longer], hashes[longer]
        hashes = mix_hashes(hashes, ids[starts + n - 1])
        # The number of the document in the highest bits, the n-gram's hash in the others.
        places, groups = repeated(documents[starts] | hashes >> np.uint64(bits))
        starts, hashes = starts[places], hashes[places]
        yield n, starts, groups
        longer = np.flatnonzero(np.diff(starts) == 1)


def _top_ngram_characters(
    tokens: _Tokens, n: int, firsts: np.ndarray, groups: np.ndarray
) -> np.ndarray:
    """Returns the characters in all occurrences of the most frequent n-gram, int64 [D]; 0 if none
    occurs twice. Of equally frequent ones the first in the text counts."""
    counts = np.bincount(groups)
    firsts = firsts[: len(counts)]
    order = np.lexsort((firsts, -counts, tokens.document[firsts]))
    documents, best = np.unique(tokens.document[firsts[order]], return_index=True)
    firsts, counts = firsts[order[best]], counts[order[best]]
    with_spaces = tokens.offsets[firsts + n] - tokens.offsets[firsts] + n - 1
    characters = np.zeros(len(tokens.num_tokens), np.int64)
    characters[documents] = counts * with_spaces
    return characters


def _covered_characters(tokens: _Tokens, n: int, starts: np.ndarray) -> np.ndarray:
    """Returns the characters in the tokens of the n-grams that start here, int64 [D]."""
    changes = np.zeros(len(tokens.ids) + 1, np.int64)
    changes[starts] += 1
    changes[starts + n] -= 1
    is_covered = np.cumsum(changes[:-1]) > 0
    return tokens.total(np.diff(tokens.offsets) * is_covered)


def _duplicate_characters(
    starts: np.ndarray, groups: np.ndarray, offsets: np.ndarray, n: int
) -> int:
    """Returns the characters in repetitions of n-grams, none overlapping, as Gopher counts."""
    sizes = offsets[starts + n] - offsets[starts]
    seen = set()
    num_characters = next_start = 0
    for start, group, size in zip(starts.tolist(), groups.tolist(), sizes.tolist(), strict=True):
        if start < next_start:
            continue
        if group in seen:
            num_characters += size
            next_start = start + n
        seen.add(group)
    return num_characters
