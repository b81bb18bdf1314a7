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
# The words of related languages overlap: a document is another's only with so many times its words.
MARGIN = 1.5


def is_other_language(tokens: Tokens, num_words: np.ndarray, language: Language) -> np.ndarray:
    """Returns which documents are in another language, bool [D]; `num_words` are their words."""
    if language.name == "dutch":
        dutch, *others = count_words(tokens, _chosen_words())
        return (np.max(others, axis=0) > dutch) | (dutch < MIN_DUTCH_WORDS * num_words)
    known = [other.stop_words for other in list_languages() if other.label != language.label]
    english = frozenset(LANGUAGES["English"].split())
    own, *others = count_words(tokens, [language.stop_words, english, *known])
    return np.max(others, axis=0) > MARGIN * own


def identify_languages(texts: Sequence[str]) -> list[str]:
    """Returns the language of each text of which most frequent words are in it; "unclear" if those
    are too few."""
    tokens = Tokens(texts)
    counts = count_words(tokens, _chosen_words())
    is_clear = counts.max(0) >= MIN_DUTCH_WORDS * np.maximum(tokens.num_tokens, 1)
    names = [*LANGUAGES]
    return [
        names[place] if clear else "unclear"
        for place, clear in zip(counts.argmax(0).tolist(), is_clear.tolist(), strict=True)
    ]


def _chosen_words() -> list[frozenset[str]]:
    return [frozenset(words.split()) for words in LANGUAGES.values()]


def count_words(tokens: Tokens, lists: Sequence[frozenset[str]]) -> np.ndarray:
    """Returns how many words of each document are in each list, int64 [lists, D]."""
    members: dict[str, list[int]] = {}
    for number, words in enumerate(lists):
        for word in words:
            members.setdefault(word, []).append(number)
    places = {word: place for place, word in enumerate(members)}  # K words
    longest = max(map(len, places))  # in lower case no word is shorter
    get = places.get
    of_vocabulary = [get(w.lower(), -1) if len(w) <= longest else -1 for w in tokens.vocabulary]
    found = np.array(of_vocabulary, np.int64)[tokens.ids]
    is_known = found >= 0
    found, document = found[is_known], tokens.document[is_known]
    # A word counts for each list that it is in.
    num_lists = np.array([len(numbers) for numbers in members.values()])
    flat = np.concatenate([np.array(numbers) for numbers in members.values()])
    times = num_lists[found]
    shifts = (np.cumsum(num_lists) - num_lists)[found] - (np.cumsum(times) - times)
    of_list = flat[np.repeat(shifts, times) + np.arange(times.sum())]
    cells = of_list * len(tokens.num_tokens) + np.repeat(document, times)
    counts = np.bincount(cells, minlength=len(lists) * len(tokens.num_tokens))
    return counts.reshape(len(lists), -1)
