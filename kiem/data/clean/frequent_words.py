"""The language of a document by its frequent words.

For Dutch by lists that were chosen to tell it from its neighbours, for other languages by the stop
words that FineWeb-2 found in their Wikipedias; docs/decisions.md has figures for both.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kiem.data.clean.languages import Language, list_languages
from kiem.data.clean.tokens import Tokens

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
# So few words do not tell these apart.
RELATIVES = (
    ("Danish", "Norwegian", "Nynorsk"),
    ("Bosnian", "Croatian", "Serbian Latin"),
    ("Czech", "Slovak"),
    ("Belarusian", "Ukrainian"),
    ("Indonesian", "Malay"),
    ("Xhosa", "Zulu"),
)
# The words of related languages overlap: a document is another's only with so many times its words.
MARGIN = 1.5
MOST_CELLS = 8_000_000  # words times documents that are counted at once


def compared_words(language: Language) -> list[frozenset[str]]:
    """Returns the frequent words of a language and of those that it is told from."""
    if language.name == "dutch":
        return _chosen_words()
    others = [other.stop_words for other in list_languages() if other.label != language.label]
    return [language.stop_words, frozenset(LANGUAGES["English"].split()), *others]


def is_other_language(counts: np.ndarray, num_words: np.ndarray, language: Language) -> np.ndarray:
    """Returns which documents are in another language, bool [D].

    Args:
        counts: of `compared_words` in each document.
        num_words: all words of each document.
        language: the one that they should be in.
    """
    own, *others = counts
    most = np.max(others, axis=0)
    if language.name == "dutch":
        return (most > own) | (own < MIN_DUTCH_WORDS * num_words)
    return most > MARGIN * own


def identify_languages(texts: Sequence[str]) -> list[str]:
    """Returns the language of each text of which most frequent words are in it, or the names of
    relatives that these do not tell apart; "unclear" if those are too few, or two have as many."""
    words = {language.title: language.stop_words for language in list_languages()}
    for name, chosen in zip(LANGUAGES, _chosen_words(), strict=True):
        words[name] = chosen | words.get(name, frozenset())
    tokens = Tokens(texts)
    counts = dict(zip(words, count_words(tokens, [*words.values()]), strict=True))
    for group in RELATIVES:
        counts[" or ".join(group)] = np.max([counts.pop(name) for name in group], axis=0)
    names, of_names = [*counts], np.array([*counts.values()])
    second, most = np.sort(of_names, axis=0)[-2:]
    is_clear = (most > second) & (most >= MIN_DUTCH_WORDS * tokens.num_tokens)
    return [
        names[place] if clear else "unclear"
        for place, clear in zip(of_names.argmax(0).tolist(), is_clear.tolist(), strict=True)
    ]


def _chosen_words() -> list[frozenset[str]]:
    return [frozenset(words.split()) for words in LANGUAGES.values()]


def count_words(tokens: Tokens, lists: Sequence[frozenset[str]]) -> np.ndarray:
    """Returns how many words of each document are in each list, int64 [lists, D]."""
    places = {word: n for n, word in enumerate(sorted(frozenset().union(*lists)))}  # K words
    columns = [[places[word] for word in words] for words in lists]
    longest = max(map(len, places))  # in lower case no word is shorter
    get = places.get
    of_vocabulary = [get(w.lower(), -1) if len(w) <= longest else -1 for w in tokens.vocabulary]
    found = np.array(of_vocabulary, np.int64)[tokens.ids]
    is_known = found >= 0
    found, document = found[is_known], tokens.document[is_known]
    num_documents = len(tokens.num_tokens)
    counts = np.empty((len(lists), num_documents), np.int64)
    step = max(1, MOST_CELLS // len(places))
    for first in range(0, num_documents, step):
        size = min(step, num_documents - first)
        begin, end = np.searchsorted(document, [first, first + size])
        here = (document[begin:end] - first) * len(places) + found[begin:end]
        of_words = np.bincount(here, minlength=size * len(places)).reshape(size, -1)
        for number, chosen in enumerate(columns):
            counts[number, first : first + size] = of_words[:, chosen].sum(1)
    return counts
