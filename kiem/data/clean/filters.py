"""Quality filters for documents, with the thresholds of FineWeb-2 for their language.

What they are used for is in fineweb-2-pipeline.py of huggingface/fineweb-2 (arXiv:2506.20920): the
filters of Gopher (arXiv:2112.11446, appendix A1) and FineWeb, tuned per language. What differs:
frequent words or another model identify the language instead of GlotLID, a top n-gram has to occur
twice, words are matched by a regular expression, not by spaCy, and no document is too long.

Many documents are filtered at once with numpy. D = documents, T = tokens (words and punctuation) of
all documents, V = different tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from kiem.data.clean.frequent_words import compared_words, count_words, is_other_language
from kiem.data.clean.language_model import LanguageModel
from kiem.data.clean.languages import Language, Thresholds
from kiem.data.clean.ngrams import hash_ngrams, mix_hashes, repeated
from kiem.data.clean.tokens import Tokens

# Gopher's, which FineWeb-2 keeps.
MIN_WORDS = 50
MAX_SYMBOLS_PER_WORD = 0.1
MAX_BULLET_LINES = 0.9
MAX_ELLIPSIS_LINES = 0.3
MIN_STOP_WORDS = 2
# FineWeb-2's pipeline, the same for all languages.
MAX_DUPLICATE_LINE_CHARACTERS = 0.1

_TOO_SHORT = "too short"
# The second text has those of other scripts.
_LINE_ENDS = ".!?…:;\"'”’»)" + "।॥؟۔։"


def reject_reasons(
    texts: Sequence[str], language: Language, model: LanguageModel | None = None
) -> list[str | None]:
    """Returns why each normalized document is rejected, in a few words; None if it is kept.

    Args:
        texts: the documents.
        language: the one that they should be in.
        model: tells whether they are; None: frequent words do.
    """
    tokens, thresholds = Tokens(texts), language.thresholds
    rejected = {"empty": tokens.num_tokens == 0, **_check_words(tokens, language, model is None)}
    rejected |= _check_lines(texts, tokens, thresholds) | _check_ngrams(tokens, thresholds)
    reasons: list[str | None] = [None] * len(texts)
    for reason, is_rejected in reversed(rejected.items()):  # the first reason counts
        for number in np.flatnonzero(is_rejected):
            reasons[number] = reason
    if model is not None:
        reasons = [
            reason if reason in ("empty", _TOO_SHORT) else model.reject_reason(text) or reason
            for text, reason in zip(texts, reasons, strict=True)
        ]
    return reasons


def _check_words(tokens: Tokens, language: Language, identify: bool) -> dict[str, np.ndarray]:
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
    stop_words = [frozenset([word]) for word in language.stop_words]
    counts = count_words(tokens, [*stop_words, *(compared_words(language) if identify else [])])
    num_stop_words = np.count_nonzero(counts[: len(stop_words)], axis=0)
    limits = language.thresholds
    shortest, longest = limits.min_avg_word_length, limits.max_avg_word_length
    rejected = {_TOO_SHORT: num_words < MIN_WORDS}
    if identify:
        counts = counts[len(stop_words) :]
        rejected[f"not {language.title}"] = is_other_language(counts, num_words, language)
    return rejected | {
        "few stop words": num_stop_words < MIN_STOP_WORDS,
        "word length": (mean_length < shortest) | (mean_length > longest),
        "few letters": num_with_letter < limits.max_non_alpha_words_ratio * num_words,
        "many symbols": num_symbols > MAX_SYMBOLS_PER_WORD * tokens.num_tokens,
    }


def _check_lines(
    texts: Sequence[str], tokens: Tokens, thresholds: Thresholds
) -> dict[str, np.ndarray]:
    """Returns reason -> rejected documents, bool [D], for reasons about lines."""
    columns = np.array([_line_shares(text) for text in texts]).reshape(len(texts), 6).T
    num_lines, duplicates, duplicate_characters, punctuation, bullets, ellipses = columns
    too_many = duplicate_characters > MAX_DUPLICATE_LINE_CHARACTERS
    return {
        "repeated lines": (duplicates > thresholds.dup_line_frac) | too_many,
        "line ends": punctuation < thresholds.line_punct_thr,
        "short lines": num_lines - 1 > thresholds.new_line_ratio * tokens.num_tokens,
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


def _check_ngrams(tokens: Tokens, thresholds: Thresholds) -> dict[str, np.ndarray]:
    """Returns reason -> rejected documents, bool [D], for repeated n-grams."""
    is_top, is_duplicate = np.zeros((2, len(tokens.num_tokens)), bool)
    most_of_top, most_of_all = dict(thresholds.top_n_grams), dict(thresholds.dup_n_grams)
    for n, starts, groups in _repeated_ngrams(tokens, max([*most_of_top, *most_of_all], default=0)):
        firsts = np.empty(len(starts), np.int64)
        firsts[groups[::-1]] = starts[::-1]
        if n in most_of_top:
            is_top |= _top_ngram_characters(tokens, n, firsts, groups) > (
                most_of_top[n] * tokens.num_characters
            )
        if n in most_of_all:
            most = most_of_all[n] * tokens.num_characters
            # Not more than these characters can be in repetitions.
            covered = _covered_characters(tokens, n, starts[starts != firsts[groups]])
            for number in np.flatnonzero((covered > most) & ~is_duplicate):
                here = slice(*np.searchsorted(starts, tokens.starts[number : number + 2]))
                characters = _duplicate_characters(starts[here], groups[here], tokens.offsets, n)
                is_duplicate[number] = characters > most[number]
    return {"repeated phrase": is_top, "repeated passages": is_duplicate}


def _repeated_ngrams(tokens: Tokens, longest: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
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
    tokens: Tokens, n: int, firsts: np.ndarray, groups: np.ndarray
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


def _covered_characters(tokens: Tokens, n: int, starts: np.ndarray) -> np.ndarray:
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
