"""Cleaning of documents: normalization of characters, and reasons to reject a document."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import groupby
from typing import Any, NamedTuple

from rich.console import Console

from kiem.config import PreprocessOptions
from kiem.core.console import warn
from kiem.core.errors import no_effect, not_installed
from kiem.data.clean.contamination import MIN_EVALUATION_WORDS, EvaluationNgrams, read_evaluation
from kiem.data.clean.filters import reject_reasons
from kiem.data.clean.language_model import LanguageModel, find_model
from kiem.data.clean.languages import NO_CLEANING, Language, find_language
from kiem.data.clean.ngrams import WordHashes
from kiem.data.clean.personal_data import (
    PLACEHOLDERS,
    replace_personal_data,
    require_libraries,
)
from kiem.data.read.rows import Document

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff]")
_CONTROL_CHARACTERS = "".join(map(chr, {*range(32), *range(127, 160), 0xFEFF} - {9, 10}))
_MANY_MARKS = re.compile(r"(?<![^\w\s\x00-\u02ff])[^\w\s\x00-\u02ff]{100,}")
_IS_WIDE = bytes(byte >= 0x80 for byte in range(256))  # whether it is of a character outside ASCII
_MANY_WIDE = bytes([True]) * 200  # of so many marks each takes two bytes or more


class CleanedDocument(NamedTuple):
    """A document after cleaning.

    Attributes:
        text: as it is hashed and encoded.
        reason: why it is rejected; None: it is kept.
        num_replaced: how often personal data is replaced, for each kind.
    """

    text: str
    reason: str | None
    num_replaced: list[int]


@dataclass(frozen=True)
class Cleaning:
    """What is normalized, replaced and rejected.

    Attributes:
        language: whose filters are used, and text normalized; None: neither.
        near_duplicates: whether near duplicates of an earlier document are rejected.
        evaluation: n-grams that documents must not contain, if any.
        personal_data: the kinds of it that are replaced.
        model: tells the language of documents; None: frequent words do.
    """

    language: Language | None = None
    near_duplicates: bool = False
    evaluation: EvaluationNgrams | None = None
    personal_data: tuple[str, ...] = ()
    model: LanguageModel | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """What a chunk directory's manifest records of it."""
        return {
            "clean": self.language.recorded if self.language else NO_CLEANING,
            "near_duplicates": self.near_duplicates,
            "decontaminate": list(self.evaluation.sha256) if self.evaluation else [],
            "replace_personal_data": [*self.personal_data] or None,
            "identify_language": self.model.identity if self.model else None,
        }

    def final_text(self, text: str) -> str:
        """Returns the text of a document as `clean` does."""
        return self.hide_personal_data(self._normalize(text))[0]

    def hide_personal_data(self, text: str) -> tuple[str, list[int]]:
        """Returns a text with placeholders for personal data, and how many there are of a kind."""
        return replace_personal_data(text, self.personal_data)

    def _normalize(self, text: str) -> str:
        return normalize(text) if self.language else text

    def clean(self, documents: Sequence[Document], hashes: WordHashes) -> list[CleanedDocument]:
        """Normalizes documents, replaces personal data, and finds reasons to reject some.

        A document with a problem is rejected for that.
        """
        normalized = [self._normalize(document.text) for document in documents]
        replaced = [self.hide_personal_data(text) for text in normalized]
        texts = [text for text, _ in replaced]
        reasons = [document.problem.reason if document.problem else None for document in documents]
        if self.language is not None:
            found = reject_reasons(texts, self.language, self.model)
            reasons = [reason or other for reason, other in zip(reasons, found, strict=True)]
        if self.evaluation is not None:
            # Evaluation texts are compared as they are, with what is personal in them.
            for number, text in enumerate(normalized):
                if reasons[number] is None and self.evaluation.overlaps(text, hashes):
                    reasons[number] = "contaminated"
        return [
            CleanedDocument(text, reason, num_replaced)
            for (text, num_replaced), reason in zip(replaced, reasons, strict=True)
        ]


def make_cleaning(options: PreprocessOptions, console: Console) -> Cleaning:
    """Returns what the options ask for; the console shows which evaluation texts are not used.

    Raises:
        UserError: there are no filters for the language, the model does not know it, a library is
            missing, or an evaluation file cannot be read.
    """
    language = find_language(options.clean)
    if options.replace_personal_data:
        require_libraries()
    if options.near_duplicates and find_spec("rensa") is None:
        raise not_installed("rensa", "--near-duplicates")
    model = None
    if options.identify_language is not None:
        if language is None:
            raise no_effect("--identify-language", "without --clean and a language")
        model = find_model(options.identify_language, language)
    evaluation = None
    if options.decontaminate:
        evaluation = read_evaluation(options.decontaminate, options.text_column, console)
        if evaluation.num_ignored:
            what = f"evaluation texts of fewer than {MIN_EVALUATION_WORDS} words, not looked for"
            warn(console, f"--decontaminate: {what}: {evaluation.num_ignored}")
    kinds = tuple(kind for kind in PLACEHOLDERS if kind in options.replace_personal_data)
    return Cleaning(language, options.near_duplicates, evaluation, kinds, model)


def normalize(text: str) -> str:
    """Returns a text in Unicode NFC with LF line ends, without control characters and BOMs.

    Normalizing twice is normalizing once.
    """
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    # Expressions look at every character; most texts have nothing for them.
    if any(map(text.__contains__, _CONTROL_CHARACTERS)):
        text = _CONTROL.sub("", text)
    if _MANY_WIDE in text.encode(errors="surrogatepass").translate(_IS_WIDE):
        # Python sorts the combining marks of a letter in quadratic time.
        text = _MANY_MARKS.sub(_sort_marks, text)
    return unicodedata.normalize("NFC", text)


def _sort_marks(found: re.Match[str]) -> str:
    """Returns characters with their combining marks in canonical order, which NFC keeps."""
    runs = groupby(found[0], key=lambda character: unicodedata.combining(character) > 0)
    ordered = (sorted(run, key=unicodedata.combining) if marks else run for marks, run in runs)
    return "".join(map("".join, ordered))
