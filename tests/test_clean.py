"""Cleaning of Dutch text: each filter at its threshold, and all against a plain reference."""

from __future__ import annotations

import random
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import partial

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kiem.data.clean import filters
from kiem.data.clean.cleaner import normalize
from kiem.data.clean.frequent_words import LANGUAGES, MIN_DUTCH_WORDS
from kiem.data.clean.languages import Language, find_language, list_languages
from kiem.data.clean.ngrams import repeated

DUTCH = next(language for language in list_languages() if language.name == "dutch")
DUTCH_WORDS = ("de", "het", "een", "van", "zijn", "dat", "niet", "ik")
MAX_TOP_NGRAM = dict(DUTCH.thresholds.top_n_grams)
MAX_DUPLICATE_NGRAMS = dict(DUTCH.thresholds.dup_n_grams)
reject_reasons = partial(filters.reject_reasons, language=DUTCH)

_CONSONANTS = "bcdfghklmnprstvw"
# Different words of five letters, none of them a frequent word of any language.
NEUTRAL = [f"{a}a{b}e{c}" for a in _CONSONANTS for b in _CONSONANTS for c in _CONSONANTS]


def sentence(num_words: int = 100, frequent: str = "de een", every: int = 8) -> str:
    """A document of one line that nothing is wrong with: different words, some frequent ones."""
    words = random.Random(num_words).sample(NEUTRAL, num_words)
    places = range(0, num_words, every)
    chosen = frequent.split()
    for number, place in enumerate(places):
        words[place] = chosen[number % len(chosen)]
    return " ".join(words) + "."


def lines(num_lines: int, num_words: int = 8, end: str = ".", start: str = "") -> list[str]:
    """Different lines of so many words, with some frequent ones."""
    words = sentence(num_lines * num_words, every=9).rstrip(".").split(" ")
    parts = [words[n : n + num_words] for n in range(0, len(words), num_words)]
    return [start + " ".join(part) + end for part in parts]


def of_lengths(num_short: int, num_long: int, long: int) -> str:
    """A document of words of two letters, some frequent, and of longer ones."""
    pairs = [a + b for a in _CONSONANTS for b in _CONSONANTS]
    shorts = [("en" if n % 7 == 6 else "de") if n % 3 == 0 else pairs[n] for n in range(num_short)]
    longs = [(word[::-1] * 4)[:long] for word in NEUTRAL[:num_long]]
    return " ".join(shorts + longs) + "."


def numbers(num_numbers: int) -> str:
    """A document of 100 words, so many of them numbers."""
    given = [str(number) for number in range(1000, 1000 + num_numbers)]
    return " ".join([*given, sentence(100 - num_numbers)])


# What is just inside and just outside of each threshold.
FILTERS = {
    # 50 and 49 words.
    "too short": (sentence(50), sentence(49)),
    # 7 and 5 of 100 words are frequent ones of Dutch.
    "not Dutch, few frequent words": (sentence(every=16), sentence(every=20)),
    # 10 frequent words of Dutch, 10 and 11 of English.
    "not Dutch, another language": (
        sentence(100, "de and het with", 5),
        sentence(105, "and de with het that", 5),
    ),
    "few stop words": (sentence(frequent="ik dat de ook een"), sentence(frequent="ik dat de ook")),
    # Mean lengths of 3 and 2.98, of 16 and 16.02.
    "word length, short": (of_lengths(50, 50, 4), of_lengths(51, 49, 4)),
    "word length, long": (of_lengths(40, 140, 20), of_lengths(40, 141, 20)),
    # 17 and 18 of 100 words have no letter.
    "few letters": (numbers(17), numbers(18)),
    # 11 of 112 words and marks (the last is the dot), 12 of 113.
    "many symbols, hashes": (
        sentence().replace(" ", " # ", 11),
        sentence().replace(" ", " # ", 12),
    ),
    "many symbols, ellipses": (
        sentence().replace(" ", " … ", 11),
        sentence().replace(" ", " ... ", 12),
    ),
    # 10 of 31 and 11 of 32 lines are duplicates, though with few characters.
    "repeated lines, number": (
        "\n".join([*lines(20, 12), *["Ja."] * 11]),
        "\n".join([*lines(20, 12), *["Ja."] * 12]),
    ),
    # One of 11 and one of 9 lines.
    "repeated lines, characters": (
        "\n".join([*lines(10), lines(10)[4]]),
        "\n".join([*lines(8), lines(8)[4]]),
    ),
    # 5 of 21 and 5 of 22 lines end with a mark.
    "line ends": (
        "\n".join([*lines(21, end="")[5:], *lines(21)[:5]]),
        "\n".join([*lines(22, end="")[5:], *lines(22)[:5]]),
    ),
    # Lines of 4 words and a dot: 32 line ends for 165 words and marks, 33 for 170.
    "short lines": ("\n".join(lines(33, 4)), "\n\n".join(lines(34, 4))),
    # 18 and 19 of 20 lines.
    "bullets": (
        "\n".join([*lines(20, start="- ")[2:], *lines(20)[:2]]),
        "\n".join([*lines(20, start="• ")[1:], *lines(20)[:1]]),
    ),
    # 3 and 4 of 10 lines.
    "cut-off lines": (
        "\n".join([*lines(10, end="...")[:3], *lines(10)[3:]]),
        "\n".join([*lines(10, end="…")[:4], *lines(10)[4:]]),
    ),
}


@pytest.mark.parametrize("name", FILTERS)
def test_filter_at_its_threshold(name: str) -> None:
    inside, outside = FILTERS[name]
    assert reject_reasons([inside]) == [None]
    assert all_reasons(outside) == [name.split(",")[0]]
    assert reject_reasons([outside]) == [name.split(",")[0]]


def document_with(passages: list[list[str]]) -> str:
    """A document of 400 words that has these passages, with different words between them."""
    used = {word for passage in passages for word in passage}
    filling = iter(random.Random(1).sample([w for w in NEUTRAL if w not in used], 400))
    words: list[str] = []
    for passage in passages:
        words += [*passage, next(filling), ("de", "een")[len(words) % 2], next(filling)]
    while len(words) < 400:
        words.append(("de", "het", "een")[len(words) % 3] if len(words) % 7 == 0 else next(filling))
    return " ".join(words) + "."


@pytest.mark.parametrize("n", MAX_TOP_NGRAM)
def test_frequent_ngram_at_its_threshold(n: int) -> None:
    documents = [document_with([NEUTRAL[:n]] * times) for times in range(1, 30)]
    shares = [top_ngram_share(tokenize(text), text, n) for text in documents]
    first = next(i for i, share in enumerate(shares) if share > MAX_TOP_NGRAM[n])
    assert reject_reasons(documents[first - 1 : first + 1]) == [None, "repeated phrase"]
    assert all_reasons(documents[first]) == ["repeated phrase"]


@pytest.mark.parametrize("n", MAX_DUPLICATE_NGRAMS)
def test_duplicate_ngrams_at_their_threshold(n: int) -> None:
    passages = [NEUTRAL[start : start + n] for start in range(0, 17 * n, n)]
    documents = [document_with(passages[:number] * 2) for number in range(1, 17)]
    shares = [duplicate_share(tokenize(text), text, n) for text in documents]
    first = next(i for i, share in enumerate(shares) if share > MAX_DUPLICATE_NGRAMS[n])
    assert reject_reasons(documents[first - 1 : first + 1]) == [None, "repeated passages"]
    assert all_reasons(documents[first]) == ["repeated passages"]


# A reference for the filters, in plain Python.


def tokenize(text: str) -> list[str]:
    return re.findall(r"'n\b|\w+(?:['’.-]\w+)*|[^\w\s]+", text)


def top_ngram_share(tokens: list[str], text: str, n: int) -> float:
    """Of datatrove's Gopher repetition filter, but an n-gram has to occur twice."""
    ngrams = Counter(" ".join(tokens[i : i + n]) for i in range(len(tokens) - n + 1))
    ngram, number = ngrams.most_common(1)[0] if ngrams else ("", 0)
    return len(ngram) * number / len(text) if number > 1 else 0.0


def duplicate_share(tokens: list[str], text: str, n: int) -> float:
    """Of the same filter: characters in n-grams that came before, none overlapping."""
    seen = set()
    num_characters = place = 0
    while place + n <= len(tokens):
        ngram = tuple(tokens[place : place + n])
        if ngram in seen:
            num_characters += len("".join(ngram))
            place += n
        else:
            seen.add(ngram)
            place += 1
    return num_characters / len(text)


def is_foreign(words: list[str], language: Language) -> bool:
    """Says whether the frequent words of a document are those of another language."""
    found = [word.lower() for word in words]
    if language == DUTCH:
        known = [sum(word in chosen.split() for word in found) for chosen in LANGUAGES.values()]
        return max(known[1:]) > known[0] or known[0] < MIN_DUTCH_WORDS * len(words)
    others = [other.stop_words for other in list_languages() if other != language]
    others.append(frozenset(LANGUAGES["English"].split()))
    own = sum(word in language.stop_words for word in found)
    return max(sum(word in other for word in found) for other in others) > 1.5 * own


def all_reasons(text: str, language: Language = DUTCH) -> list[str]:
    """Returns every reason against a document, in the order in which they are looked at."""
    limits = language.thresholds
    tokens = tokenize(text)
    words = [token for token in tokens if any(c.isalnum() for c in token)]
    mean_length = sum(map(len, words)) / max(1, len(words))
    with_letter = sum(any(c.isalpha() for c in word) for word in words)
    ellipses = text.count("...") + text.count("…")
    stripped = [line.strip() for line in text.split("\n") if line.strip()]
    total = len(stripped)
    duplicates = [line for i, line in enumerate(stripped) if line in stripped[:i]]
    duplicate_characters = sum(map(len, duplicates)) / sum(map(len, stripped))
    marked = sum(line[-1] in ".!?…:;\"'”’»)" for line in stripped)
    bullets = sum(line[0] in "•-*" for line in stripped)
    cut_off = sum(line.endswith(("...", "…")) for line in stripped)
    stop_words = {word.lower() for word in words} & language.stop_words
    top = [top_ngram_share(tokens, text, n) > most for n, most in limits.top_n_grams]
    passages = [duplicate_share(tokens, text, n) > most for n, most in limits.dup_n_grams]
    found = {
        "too short": len(words) < 50,
        f"not {language.title}": is_foreign(words, language),
        "few stop words": len(stop_words) < 2,
        "word length": not limits.min_avg_word_length <= mean_length <= limits.max_avg_word_length,
        "few letters": with_letter < limits.max_non_alpha_words_ratio * len(words),
        "many symbols": max(text.count("#"), ellipses) > 0.1 * len(tokens),
        "repeated lines": len(duplicates) / total > limits.dup_line_frac
        or duplicate_characters > 0.1,
        "line ends": marked / total < limits.line_punct_thr,
        "short lines": total - 1 > limits.new_line_ratio * len(tokens),
        "bullets": bullets / total > 0.9,
        "cut-off lines": cut_off / total > 0.3,
        "repeated phrase": any(top),
        "repeated passages": any(passages),
    }
    return [reason for reason, is_found in found.items() if is_found]


def random_document(seed: int, stop_words: Sequence[str] = DUTCH_WORDS) -> str:
    """A document that has, by chance, more or less of what the filters look at."""
    draw = random.Random(seed)
    vocabulary = draw.sample(NEUTRAL, draw.choice((5, 20, 200, 1000)))
    letters = draw.choice((1, 2, 5, 5, 5, 20))
    vocabulary = [(word * 4)[:letters] for word in vocabulary]
    oddities = draw.choice((0.01, 0.05, 0.5))
    frequent = [*stop_words, "and", "of", "der"]
    share = draw.choice((0.02, 0.1, 0.3))
    words: list[str] = []
    for _ in range(draw.randint(20, 400)):
        kind = draw.random()
        if kind < share:
            words.append(draw.choice(frequent[: draw.choice((1, 3, len(frequent)))]))
        elif kind < share + oddities:
            words.append(
                draw.choice(
                    (
                        "1",
                        "12",
                        "3.5",
                        "7",
                        "40",
                        "99",
                        "#",
                        "…",
                        "...",
                        "a'b",
                        "x-y",
                        "🚲",
                        "'n",
                        "é",
                    )
                )
            )
        elif kind > 0.95 and words:
            start = draw.randrange(len(words))
            words += words[start : start + draw.randint(2, 12)]
        else:
            words.append(draw.choice(vocabulary))
    long_line = draw.choice((3, 8, 40))
    text = ""
    while words:
        size = draw.randint(1, long_line)
        start = draw.choice(("", "", "- ", "  * "))
        end = draw.choice(("", ".", "!", "...", "\n", " ", '"'))
        text += start + " ".join(words[:size]) + end + "\n"
        words = words[size:]
    return text


@pytest.mark.parametrize(
    ("language", "stop_words"),
    [("dutch", DUTCH_WORDS), ("frisian", ["fan", "yn", "it", "mei"]), ("german", ["und", "im"])],
)
def test_filters_are_those_of_a_plain_reference(language: str, stop_words: list[str]) -> None:
    known = find_language(language)
    assert known is not None
    texts = [random_document(seed, stop_words) for seed in range(600)]
    expected = [all_reasons(text, known) for text in texts]
    found = filters.reject_reasons(texts, known)
    assert found == [reasons[0] if reasons else None for reasons in expected]
    # No filter was left out by chance.
    names = {name.split(",")[0].replace("Dutch", known.title) for name in FILTERS}
    names -= {"line ends"} if known.thresholds.line_punct_thr == 0 else set()  # not used
    assert {r for reasons in expected for r in reasons} >= names


def test_a_document_is_judged_alone_as_in_company() -> None:
    texts = [random_document(seed) for seed in range(60)]
    texts += [text for pair in FILTERS.values() for text in pair]
    together = reject_reasons(texts)
    assert together == [reject_reasons([text])[0] for text in texts]
    assert together[::-1] == reject_reasons(texts[::-1])
    assert reject_reasons([]) == []


@pytest.mark.parametrize(
    ("given", "normal"),
    [
        ("een cafe\u0301", "een café"),
        ("één\r\ntwee\rdrie\n\rvier", "één\ntwee\ndrie\n\nvier"),
        ("\ufeffeen \ufefftwee", "een twee"),
        ("a\x00b\x07c\x1bd\x7fe\x85f", "abcdef"),
        ("a\tb\nc", "a\tb\nc"),
        ("a\u200db \u00ad 👩\u200d👧", "a\u200db \u00ad 👩\u200d👧"),
        ("e\x00\u0301", "é"),
    ],
)
def test_normalization(given: str, normal: str) -> None:
    assert normalize(given) == normal


@given(st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("\r\n\x00\ufeffe\u0301")))
@example("e\ufeff\u0301")
@example("\r\x00\n")
def test_normalized_text_is_normal(text: str) -> None:
    normal = normalize(text)
    assert normalize(normal) == normal
    assert unicodedata.is_normalized("NFC", normal)
    is_control = [unicodedata.category(c) == "Cc" and c not in "\t\n" for c in normal]
    assert not any(is_control)
    plain = "".join(c for c in text if c != "\ufeff" and unicodedata.category(c) != "Cc")
    left = normal.replace("\n", "").replace("\t", "")
    assert unicodedata.normalize("NFC", left) == unicodedata.normalize("NFC", plain)


def test_every_control_character_is_removed() -> None:
    characters = [c for c in map(chr, range(0x10000)) if unicodedata.category(c) == "Cc"]
    assert len(characters) == 65
    for character in {*characters, "\ufeff"} - {"\n", "\t", "\r"}:
        assert normalize(f"a{character}b") == "ab"


@pytest.mark.parametrize("most", [1, 50, 10**6, 2**63])
def test_repeated_keys_are_found(most: int) -> None:
    keys = np.random.default_rng(0).integers(0, most, 2000, np.uint64, endpoint=True)
    keys[1000:1010] = keys[10:0:-1]
    places, groups = repeated(keys)
    different, counts = np.unique(keys, return_counts=True)
    assert places.tolist() == np.flatnonzero(np.isin(keys, different[counts > 1])).tolist()
    assert {*groups.tolist()} == {*range(np.count_nonzero(counts > 1))}
    for number in {*groups.tolist()}:
        assert len({*keys[places[groups == number]].tolist()}) == 1
    assert all(len(found) == 0 for found in repeated(keys[:0]))
