"""Detection of documents that share text with evaluation files.

As for GPT-3 (arXiv:2005.14165, appendix C) a document counts as contaminated when it shares 13
consecutive words with an evaluation text, in lower case and without punctuation; lm-evaluation-
harness looks for 13 words too. An evaluation text of 8 to 12 words is looked for as a whole; one
with fewer words is not, since it would be found by chance.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from kiem.core.errors import ExitCode, UserError
from kiem.data.clean.ngrams import WordHashes, hash_ngrams
from kiem.data.read.readers import read_documents
from kiem.data.read.sources import local_source

NGRAM_WORDS = 13
MIN_EVALUATION_WORDS = 8


@dataclass(frozen=True)
class EvaluationNgrams:
    """N-grams of evaluation files.

    Attributes:
        hashes: n -> the sorted hashes of n-grams, uint64 [n-grams].
        num_ignored: evaluation texts that are too short to look for.
        sha256: of each file.
    """

    hashes: dict[int, np.ndarray]
    num_ignored: int
    sha256: tuple[str, ...]

    def overlaps(self, text: str, word_hashes: WordHashes) -> bool:
        """Says whether a document contains one of the n-grams."""
        words = word_hashes.of_text(text)
        for n, wanted in self.hashes.items():
            found = hash_ngrams(words, n)
            places = np.searchsorted(wanted, found)
            places[places == len(wanted)] = 0
            if (wanted[places] == found).any():
                return True
        return False


def read_evaluation(
    paths: Sequence[Path], text_column: str, console: Console | None = None
) -> EvaluationNgrams:
    """Reads evaluation files in all formats that text to train on may have.

    Raises:
        UserError: a file is missing, damaged or of another type, or has no text to look for.
    """
    source = local_source(list(map(str, paths)), "--decontaminate", console)
    word_hashes = WordHashes()
    parts: defaultdict[int, list[np.ndarray]] = defaultdict(list)
    num_ignored = 0
    fix = "Correct or remove it, or leave the file out of --decontaminate."
    for document in read_documents(source, text_column, fix):
        words = word_hashes.of_text(document.text)
        n = min(NGRAM_WORDS, len(words))
        if n < MIN_EVALUATION_WORDS:
            num_ignored += 1
        else:
            parts[n].append(hash_ngrams(words, n))
    if not parts:
        raise UserError(
            f"no text has {MIN_EVALUATION_WORDS} words or more, so there is nothing to look for",
            where="--decontaminate",
            fix="Name files with longer texts, or leave the option out.",
            exit_code=ExitCode.NO_EFFECT,
        )
    hashes = {n: np.unique(np.concatenate(found)) for n, found in sorted(parts.items())}
    return EvaluationNgrams(hashes, num_ignored, tuple(source.description["sha256"].values()))
