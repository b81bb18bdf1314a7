"""Language identification by fastText models: the small one, and files such as GlotLID's."""

from __future__ import annotations

import json
import math
from itertools import permutations
from pathlib import Path

import fasttext
import pytest
from fasttext_model import model_bytes, write_model
from language_cases import DECLARATION, FINEWEB, language
from rich.console import Console

from kiem.config import PreprocessOptions
from kiem.core.errors import ExitCode, UserError
from kiem.core.files import sha256_file
from kiem.data.chunks import read_manifest
from kiem.data.clean.fasttext_file import read_labels
from kiem.data.clean.filters import reject_reasons
from kiem.data.clean.language_model import find_model
from kiem.data.prepare.preprocess import preprocess
from kiem.tokenizer.tokenizer import Tokenizer

WORDS = {"fry_Latn": ["it", "fan"], "nld_Latn": ["het", "van"], "xyz_Latn": ["zzz"]}


def test_labels_are_those_of_the_library(tmp_path: Path) -> None:
    for path in (find_model("lid.176", language("nl")).path, write_model(tmp_path / "m", WORDS)):
        found, _ = fasttext.load_model(str(path)).predict("x it het", k=-1, threshold=-1.0)
        labels = read_labels(path, "x")
        assert {f"__label__{label}" for label in labels} == {*found}
    assert labels == [*WORDS]
    assert len(read_labels(find_model("lid.176", language("nl")).path, "x")) == 176


def test_the_small_model_tells_languages() -> None:
    """Of lid.176: https://fasttext.cc/docs/en/language-identification.html."""
    for name, text in DECLARATION.items():
        known = language(name)
        model = find_model("lid.176", known)
        assert model.label == known.codes[0]
        assert reject_reasons([text], known, model) == [None]
    for name, other in permutations(DECLARATION, 2):
        known, meant = language(name), language(other).title
        found = reject_reasons([DECLARATION[other]], known, find_model("lid.176", known))
        assert found == [f"not {known.title}: {meant}"]


def test_what_a_model_says_comes_before_all_but_length() -> None:
    frisian, dutch = language("fy"), DECLARATION["dutch"]
    texts = ["", "Te koart.", f"{dutch}\n" * 9, "tekst " * 100, f"{DECLARATION['frisian']}\n" * 9]
    found = reject_reasons(texts, frisian, find_model("lid.176", frisian))
    assert found[:3] == ["empty", "too short", "not Frisian: Dutch"]
    assert found[3] is not None
    assert found[3].startswith("not Frisian: ")
    assert found[4] == "repeated lines"


@pytest.mark.parametrize("sharpness", [1.5, 2.5])
def test_the_least_score_is_that_of_fineweb(sharpness: float, tmp_path: Path) -> None:
    model = find_model(str(write_model(tmp_path / "glot.bin", WORDS, sharpness)), language("fy"))
    assert (model.label, model.min_score) == ("fry_Latn", 0.723)
    # Softmax over the shares of three labels' words.
    score = math.exp(sharpness) / (math.exp(sharpness) + 2)
    expected = None if score >= 0.723 else "not Frisian: unclear"
    assert model.reject_reason("it fan\nit") == expected
    assert model.reject_reason("het van het it") == "not Frisian: Dutch"
    assert model.reject_reason("zzz " * 9) == "not Frisian: xyz_Latn"
    assert model.reject_reason("none of its words") == "not Frisian: unclear"


def test_labels_of_other_kinds_have_one_least_score(tmp_path: Path) -> None:
    words = {"nds": ["un"], "fry": ["it"], "sqi": ["dhe"], "als": ["isch"]}
    path = str(write_model(tmp_path / "m.bin", words))
    for name, label in (("low german", "nds"), ("frisian", "fry"), ("albanian", "sqi")):
        model = find_model(path, language(name))
        assert (model.label, model.min_score) == (label, 0.3)


def test_a_language_that_a_model_does_not_know(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.bin", WORDS)
    with pytest.raises(UserError, match="does not know Dutch: has no label nld_Latn, nl") as caught:
        find_model(str(write_model(tmp_path / "m.bin", {"a": ["b"]})), language("dutch"))
    assert caught.value.where == f"--identify-language {path}"
    assert caught.value.exit_code == ExitCode.BAD_OPTION
    config = tmp_path / "xyz_Latn.yml"
    config.write_text(FINEWEB["fry_Latn"])
    write_model(path, WORDS)
    assert find_model(str(path), language(str(config))).label == "xyz_Latn"


def test_parts_of_models_are_refused(tmp_path: Path) -> None:
    small = find_model("lid.176", language("nl")).path.read_bytes()
    tiny = model_bytes(WORDS)
    unsupervised = tiny[:36] + b"\1" + tiny[37:]
    parts = [tiny[:n] for n in range(len(tiny))] + [
        small[: len(small) * n // 50] for n in range(50)
    ]
    path = tmp_path / "m.bin"
    for data in [*parts, tiny + b"\0", small[:-1], small + b"\0", unsupervised, b"text\n" * 99]:
        path.write_bytes(data)
        with pytest.raises(UserError, match="or only a part of one") as caught:
            find_model(str(path), language("fy"))
        assert caught.value.exit_code == ExitCode.BAD_INPUT
    for missing in (tmp_path / "no.bin", tmp_path):
        with pytest.raises(UserError, match="cannot be read") as caught:
            find_model(str(missing), language("fy"))
        assert caught.value.exit_code == ExitCode.NOT_FOUND


def test_manifest_has_the_model(tmp_path: Path, trained: Tokenizer) -> None:
    (tmp_path / "tokenizer.json").write_bytes(trained.json_bytes)
    lines = [{"text": f"{n}. {text}"} for n in range(20) for text in DECLARATION.values()]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    options = {
        "source": (str(tmp_path / "in.jsonl"),),
        "tokenizer": str(tmp_path / "tokenizer.json"),
        "chunk_size": 16,
        "output_dir": tmp_path / "out",
        "clean": "fy",
        "identify_language": "lid.176",
    }
    folders = [
        preprocess(
            PreprocessOptions(**options, name=str(n), num_proc=n),  # type: ignore[arg-type]
            Console(quiet=True),
        )
        for n in (1, 2)
    ]
    manifest, other = map(read_manifest, folders)
    assert {**manifest, "sha256": 0} == {**other, "sha256": 0}
    found = manifest["options"]["identify_language"]
    path = find_model("lid.176", language("fy")).path
    expected = {"model": "lid.176.ftz", "label": "fy", "min_score": 0.3}
    assert found == {**expected, "sha256": sha256_file(path)}
    names = [language(name).title for name in DECLARATION if name != "frisian"]
    assert manifest["rejected"] == {f"not Frisian: {name}": 20 for name in names}
    changed = {**options, "identify_language": None, "name": "1"}
    with pytest.raises(UserError, match=r"--identify-language was \{'model': 'lid"):
        preprocess(PreprocessOptions(**changed), Console(quiet=True))  # type: ignore[arg-type]
    changed = {**options, "clean": "none"}
    with pytest.raises(UserError, match="--identify-language: has no effect without --clean"):
        preprocess(PreprocessOptions(**changed), Console(quiet=True))  # type: ignore[arg-type]
