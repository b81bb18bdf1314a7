"""What the options say about cleaning, and doing it to the rows of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.console import Console

from kiem.config import PreprocessOptions
from kiem.data.clean.contamination import EvaluationText, read_evaluation
from kiem.data.clean.filters import mend, reject
from kiem.data.clean.near_duplicates import require_rensa
from kiem.data.clean.words import WordHashes
from kiem.data.read.rows import Document


@dataclass(frozen=True)
class Cleaning:
    """What is mended and left out.

    Attributes:
        filters: the language whose filters are used.
        near_duplicates: whether documents like an earlier one are left out.
        evaluation: what documents must not share; None if that is not looked at.
    """

    filters: Literal["none", "dutch"] = "none"
    near_duplicates: bool = False
    evaluation: EvaluationText | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """What a chunk directory's manifest records of it."""
        return {
            "clean": self.filters,
            "near_duplicates": self.near_duplicates,
            "decontaminate": list(self.evaluation.sha256) if self.evaluation else [],
        }

    def mend(self, text: str) -> str:
        """Returns the text of a document as `clean` does."""
        return mend(text) if self.filters == "dutch" else text

    def clean(
        self, documents: Sequence[Document], hashes: WordHashes
    ) -> list[tuple[str, str | None]]:
        """Returns the text of every document, mended, and why it is left out; None: it is not.

        Args:
            documents: what was read; what has a problem is left out for the reason it has.
            hashes: keeps the hashes of words that it saw before.
        """
        texts = [self.mend(document.text) for document in documents]
        reasons = [document.problem.reason if document.problem else None for document in documents]
        if self.filters == "dutch":
            reasons = [
                "empty" if reason is None and not text.strip() else reason
                for text, reason in zip(texts, reasons, strict=True)
            ]
            left = [n for n, reason in enumerate(reasons) if reason is None]
            for number, reason in zip(left, reject([texts[n] for n in left]), strict=True):
                reasons[number] = reason
        if self.evaluation is not None:
            for number, text in enumerate(texts):
                if reasons[number] is None and self.evaluation.is_in(text, hashes):
                    reasons[number] = "contaminated"
        return list(zip(texts, reasons, strict=True))


def make_cleaning(options: PreprocessOptions, console: Console) -> Cleaning:
    """Returns what the options ask for, with the evaluation files read.

    Args:
        options: all options of preprocess.py.
        console: where it is said what is not read.

    Raises:
        UserError: rensa is missing, or an evaluation file cannot be read.
    """
    if options.near_duplicates:
        require_rensa()
    evaluation = None
    if options.decontaminate:
        evaluation = read_evaluation(options.decontaminate, options.text_column, console)
    return Cleaning(options.clean, options.near_duplicates, evaluation)
