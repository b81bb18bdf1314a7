"""Languages whose text can be cleaned, with the thresholds and stop words of FineWeb-2.

languages.jsonl has a line for each of them: names, ISO 639 codes, FineWeb-2's label (language and
script), and what configs/<label>.yml of github.com/huggingface/fineweb-2 had at `commit`. Left out
are languages written without spaces between words (Chinese, Japanese, Thai ...), since words are
told by the spaces here, and English, for which FineWeb-2 has no thresholds.
"""

from __future__ import annotations

import functools
import hashlib
import unicodedata
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated

import msgspec
import yaml
from msgspec import Meta

from kiem.core.errors import ExitCode, UserError, bad_option

NO_CLEANING = "none"
_FILE = Path(__file__).with_name("languages.jsonl")
_SUFFIXES = (".yml", ".yaml")
_SOURCE = "configs/ of github.com/huggingface/fineweb-2"

# A threshold that is never reached disables its filter; FineWeb-2 has some.
_Threshold = Annotated[float, Meta(ge=-1, le=10_000)]
_Words = Annotated[int, Meta(ge=2, le=100)]


class Thresholds(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A config file of FineWeb-2, with its names.

    Attributes:
        dup_line_frac: most duplicate lines.
        dup_n_grams: n, and the most characters in repeated n-grams.
        line_punct_thr: fewest lines that end with punctuation.
        max_avg_word_length, min_avg_word_length: mean length of words.
        max_non_alpha_words_ratio: fewest words with a letter, in spite of its name.
        new_line_ratio: most line ends for a word.
        stopwords: of which a document has at least two.
        top_n_grams: n, and the most characters in the most frequent n-gram.
        language_score: least confidence of GlotLID in its answer.
    """

    dup_line_frac: _Threshold
    dup_n_grams: tuple[tuple[_Words, _Threshold], ...]
    line_punct_thr: _Threshold
    max_avg_word_length: _Threshold
    max_non_alpha_words_ratio: _Threshold
    min_avg_word_length: _Threshold
    new_line_ratio: _Threshold
    stopwords: Annotated[tuple[str, ...], Meta(min_length=2)]
    top_n_grams: tuple[tuple[_Words, _Threshold], ...]
    language_score: Annotated[float, Meta(ge=0, le=1)] | None = None


@dataclass(frozen=True)
class Language:
    """A language whose text can be cleaned.

    Attributes:
        name: in English, such as "dutch"; of a file its label.
        label: FineWeb-2's, such as "nld_Latn".
        codes: ISO 639 codes, the two-letter one first.
        thresholds: of its filters.
        sha256: of the file that the user gave, if it is from one.
    """

    name: str
    label: str
    codes: tuple[str, ...]
    thresholds: Thresholds
    sha256: str | None = None

    @property
    def title(self) -> str:
        """Its name in a sentence."""
        return self.name if self.sha256 else self.name.title()

    @property
    def recorded(self) -> str:
        """What manifests record, the same however the language was named."""
        return f"{self.name}.yml {self.sha256}" if self.sha256 else self.name

    @property
    def stop_words(self) -> frozenset[str]:
        """FineWeb-2's stop words as they are in normalized text in lower case."""
        words = (unicodedata.normalize("NFC", word) for word in self.thresholds.stopwords)
        return frozenset(word.lower() for word in words)


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    names: list[str]
    codes: tuple[str, ...]
    label: str
    commit: str
    thresholds: Thresholds

    @property
    def keys(self) -> list[str]:
        """What the language is found by."""
        script = self.label.partition("_")[2]
        return [*self.names, self.label, *self.codes, *(f"{c}_{script}" for c in self.codes)]


def list_languages() -> list[Language]:
    """Returns the languages that kiem knows."""
    return [Language(e.names[0], e.label, e.codes, e.thresholds) for e in _entries()]


def find_language(given: str) -> Language | None:
    """Returns the language that --clean names; None if it is none.

    Args:
        given: a name, an ISO 639 code, one with a script (fry_Latn), or a config file of FineWeb-2.

    Raises:
        UserError: there is no such language, or the file is missing or no config file.
    """
    if given.lower() == NO_CLEANING:
        return None
    if given.lower().endswith(_SUFFIXES):
        return _read_file(Path(given))
    numbers: dict[str, int] = {}
    for number, entry in enumerate(_entries()):
        for key in entry.keys:
            numbers.setdefault(_fold(key), number)
    if (found := numbers.get(_fold(given))) is not None:
        return list_languages()[found]
    names = {_fold(name): name for entry in _entries() for name in entry.names}
    close = [names[match] for match in get_close_matches(_fold(given), names)]
    meant = f"Did you mean {' or '.join(close)}? " if close else ""
    raise bad_option(
        "--clean",
        f"kiem has no filters for {given!r}",
        f"{meant}docs/cleaning.md lists the languages, which can be named in English or by ISO "
        f"code. For another, give the path of its file in {_SOURCE}, such as fry_Latn.yml.",
    )


@functools.cache
def _entries() -> list[_Entry]:
    lines = _FILE.read_bytes().splitlines()
    return [msgspec.json.decode(line, type=_Entry) for line in lines]


def _fold(name: str) -> str:
    return name.strip().casefold().replace("-", "_").replace(" ", "_")


def _read_file(path: Path) -> Language:
    """Reads a config file of FineWeb-2."""
    where = f"--clean {path}"
    fix = f"Give a file such as fry_Latn.yml, as it is in {_SOURCE}."
    try:
        data = path.read_bytes()
        # BaseLoader reads every scalar as text: the stop word `no` is not false.
        content = yaml.load(data, Loader=yaml.BaseLoader)
        thresholds = msgspec.convert(content, Thresholds, strict=False)
    except OSError as error:
        what = f"cannot be read ({error.strerror})"
        raise UserError(what, where=where, fix=fix, exit_code=ExitCode.NOT_FOUND) from error
    except (yaml.YAMLError, RecursionError) as error:
        what = f"not YAML ({str(error).splitlines()[0]})"
        raise UserError(what, where=where, fix=fix, exit_code=ExitCode.BAD_INPUT) from error
    except msgspec.ValidationError as error:
        what = f"no config file of FineWeb-2: {str(error).replace('`', '')}"
        raise UserError(what, where=where, fix=fix, exit_code=ExitCode.BAD_INPUT) from error
    language = path.stem.partition("_")[0]
    return Language(path.stem, path.stem, (language,), thresholds, hashlib.sha256(data).hexdigest())
