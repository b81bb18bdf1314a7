"""Languages to clean: their names, where their thresholds are from, and how they are told apart."""

from __future__ import annotations

import json
import re
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import ROOT
from language_cases import DECLARATION, FINEWEB, language
from rich.console import Console

from kiem.config import PreprocessOptions
from kiem.core.errors import ExitCode, UserError
from kiem.data.chunks import read_manifest
from kiem.data.clean import frequent_words
from kiem.data.clean.filters import reject_reasons
from kiem.data.clean.frequent_words import RELATIVES, identify_languages
from kiem.data.clean.languages import find_language, list_languages
from kiem.data.clean.ngrams import lowercase_words
from kiem.data.clean.tokens import Tokens
from kiem.data.prepare.preprocess import preprocess
from kiem.tokenizer.tokenizer import Tokenizer

QUIET = Console(quiet=True)


@pytest.mark.parametrize("label", FINEWEB)
def test_thresholds_are_those_of_fineweb(label: str, tmp_path: Path) -> None:
    file = tmp_path / f"{label}.yml"
    file.write_text(FINEWEB[label])
    given, known = language(str(file)), language(label)
    assert given.thresholds == known.thresholds
    assert (given.label, given.title) == (label, label)
    assert yaml.safe_load(FINEWEB[label])["stopwords"] == [*known.thresholds.stopwords]


@pytest.mark.parametrize(
    ("name", "ways"),
    [
        ("dutch", ["nl", "nld", "dut", "nld_Latn", "Dutch", "flemish", " NL "]),
        (
            "frisian",
            ["fy", "fry", "fry_Latn", "fy-Latn", "FRISIAN", "West Frisian", "west-frisian"],
        ),
        ("norwegian", ["no", "nb", "nob", "bokmal"]),
        ("nynorsk", ["nn", "nno_Latn"]),
        ("serbian", ["sr", "srp", "sr_Cyrl"]),
        ("serbian latin", ["sr_Latn", "srp_Latn", "serbian-latin"]),
        ("swahili", ["sw", "swa", "swh", "swh_Latn"]),
    ],
)
def test_languages_have_several_names(name: str, ways: list[str]) -> None:
    assert language(name).name == name
    for way in ways:
        assert language(way) == language(name)


def test_every_language_is_found() -> None:
    languages = list_languages()
    assert len({each.name for each in languages}) == len(languages) >= 70
    for each in languages:
        assert find_language(each.name) == find_language(each.label) == each
        if each.name != "serbian latin":  # its codes alone are the other script's
            assert all(find_language(code) == each for code in each.codes)
    documented = " ".join((ROOT / "docs/cleaning.md").read_text().split())
    titles = sorted(each.title for each in languages)
    assert f"There are: {', '.join(titles)}." in documented
    official = "bg hr cs da nl et fi fr de el hu ga it lv lt mt pl pt ro sk sl es sv"
    assert {*official.split()} <= {code for each in languages for code in each.codes}
    assert find_language("none") is find_language("None") is None


@pytest.mark.parametrize(
    ("given", "meant"),
    [("frisain", "frisian"), ("ducth", "dutch"), ("low-germn", "low german"), ("klingon", None)],
)
def test_unknown_language(given: str, meant: str | None) -> None:
    with pytest.raises(UserError) as caught:
        find_language(given)
    error = caught.value
    assert (error.where, error.exit_code) == ("--clean", ExitCode.BAD_OPTION)
    assert given in error.what
    assert (f"Did you mean {meant}" in error.fix) == (meant is not None)
    assert "fry_Latn.yml" in error.fix


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        (None, None, "No such file"),
        (None, "a: [", "not YAML"),
        (None, "", "Expected object"),
        (None, "- a", "Expected object"),
        (None, "\x00", "not YAML"),
        ("dup_line_frac: 0.248\n", "", "dup_line_frac"),
        ("0.056", "much", "line_punct_thr"),
        ("0.056", ".nan", "line_punct_thr"),
        ("0.056", "1e9", "line_punct_thr"),
        ("0.723", "1.5", "language_score"),
        ("[5, 0.12]", "[0, 0.12]", "dup_n_grams"),
        ("[5, 0.12]", "[5]", "dup_n_grams"),
        ("[de, fan, yn, it, en, in, e, op, is, mei, dat]", "[de]", "stopwords"),
        ("new_line_ratio", "new_line", "new_line"),
    ],
)
def test_files_that_are_no_config(
    old: str | None, new: str | None, what: str, tmp_path: Path
) -> None:
    file = tmp_path / "fry_Latn.yml"
    text = FINEWEB["fry_Latn"].replace(old, new or "", 1) if old else new
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=what) as caught:
        find_language(str(file))
    assert caught.value.where == f"--clean {file}"
    assert caught.value.exit_code == (ExitCode.NOT_FOUND if text is None else ExitCode.BAD_INPUT)


def test_a_language_is_told_from_others() -> None:
    for name, text in DECLARATION.items():
        assert reject_reasons([text], language(name)) == [None]
    for name, other in permutations(DECLARATION, 2):
        known = language(name)
        assert reject_reasons([DECLARATION[other]], known) == [f"not {known.title}"]


def test_languages_are_identified(sample_texts: list[str]) -> None:
    texts = {each.title: " ".join(each.stop_words) for each in list_languages()}
    texts["English"] = frequent_words.LANGUAGES["English"]
    relatives = {name: " or ".join(group) for group in RELATIVES for name in group}
    assert relatives.keys() <= texts.keys()
    assert identify_languages([*texts.values()]) == [relatives.get(n, n) for n in texts]
    assert identify_languages([*DECLARATION.values()]) == [language(n).title for n in DECLARATION]
    assert identify_languages(sample_texts) == ["Dutch"] * len(sample_texts)
    # No words, none that is known, and as many of German as of Turkish.
    assert identify_languages(["", "1 kg", "die und ve bir"]) == ["unclear"] * 3
    assert identify_languages([]) == []


@pytest.mark.parametrize(
    "text",
    [
        "foto's één 'n",  # Dutch
        "हिन्दी में है",  # Hindi
        "বাংলা ভাষা",  # Bengali
        "தமிழ் மொழி",  # Tamil
        "മലയാളം ഭാഷ",  # Malayalam
        "සිංහල ශ්\u200dරී",  # Sinhala, with a joiner
        "می\u200cشود",  # Persian, with a separator
        "קָדוֹשׁ",  # Hebrew with vowels
        "مُحَمَّد",  # Arabic with vowels
        "İstanbul",  # Turkish; in lower case it has a dot of its own
        "kọ́ ẹ̀kọ́",  # Yoruba: no characters for letter and tone
    ],
)
def test_accents_and_vowel_signs_are_in_words(text: str) -> None:
    assert Tokens([f"{text}! ({text})"]).vocabulary == [*text.split(), "!", "(", ")"]
    bare = re.sub("[\u200c\u200d]", "", text.lower().replace("'", " "))
    assert lowercase_words(f"{text}! ({text})") == 2 * bare.split()


def test_white_space_is_what_python_takes_for_it() -> None:
    """Every other character is in a token."""
    characters = [chr(n) for n in range(0x20000) if not 0xD800 <= n < 0xE000]
    tokens = Tokens([f"a{character}b" for character in characters])
    in_tokens = np.diff(tokens.offsets[tokens.starts])
    assert in_tokens.tolist() == [3 - character.isspace() for character in characters]


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("ภาษาไทย เป็น", "ภาษาไทย เป น"),  # Thai
        ("ພາສາລາວ ດີ", "ພາສາລາວ ດ"),  # Lao
        ("ភាសាខ្មែរ", "ភ ស ខ ម រ"),  # Khmer
        ("မြန်မာ", "မ န မ"),  # Burmese
    ],
)
def test_ngrams_of_text_without_spaces_are_of_pieces(text: str, pieces: str) -> None:
    assert Tokens([text]).vocabulary == text.split()
    assert lowercase_words(text) == pieces.split()


def test_one_language_makes_one_directory(tmp_path: Path, trained: Tokenizer) -> None:
    (tmp_path / "tokenizer.json").write_bytes(trained.json_bytes)
    lines = [{"text": f"{n}. {text}"} for n in range(20) for text in DECLARATION.values()]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    config = tmp_path / "fry_Latn.yml"
    config.write_text(FINEWEB["fry_Latn"])

    def make(clean: str, name: str = "a") -> dict[str, Any]:
        options = PreprocessOptions(
            source=(str(tmp_path / "in.jsonl"),),
            tokenizer=str(tmp_path / "tokenizer.json"),
            chunk_size=16,
            output_dir=tmp_path / "out",
            name=name,
            clean=clean,
            num_proc=1,
        )
        return read_manifest(preprocess(options, QUIET))

    manifest = make("fy")
    assert manifest["options"]["clean"] == "frisian"
    assert manifest["rejected"] == {"not Frisian": 20 * (len(DECLARATION) - 1)}
    assert make("West Frisian") == make("fry_Latn") == manifest
    with pytest.raises(UserError, match="--clean was 'frisian'"):
        make(str(config))
    given = make(str(config), "b")
    assert given["options"]["clean"].startswith("fry_Latn.yml ")
    assert given["splits"] == manifest["splits"]
    config.write_text(FINEWEB["fry_Latn"].replace("0.723", "0.724"))
    with pytest.raises(UserError, match=r"--clean was 'fry_Latn\.yml "):
        make(str(config), "b")


def test_words_are_counted_in_parts_of_many_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    lists = [frozenset(["de", "een"]), frozenset(["een", "und"]), frozenset(["nergens"])]
    texts = [" ".join(["De", "een", "und", "x"] * (n % 5)) for n in range(50)]
    expected = np.array([[2, 2, 0]]).T * np.array([n % 5 for n in range(50)])
    for most_cells in (1, 30, 10**6):
        monkeypatch.setattr(frequent_words, "MOST_CELLS", most_cells)
        assert frequent_words.count_words(Tokens(texts), lists).tolist() == expected.tolist()
