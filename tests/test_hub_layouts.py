"""Which files of a dataset on the Hub are read: against `datasets`, and what is said otherwise."""

from __future__ import annotations

from pathlib import Path

import pytest
from datasets import load_dataset_builder
from hub_layouts import LAYOUTS

from kiem.hub.layout import parse_card


@pytest.mark.parametrize("name", [n for n, layout in LAYOUTS.items() if layout.as_config])
def test_datasets_finds_the_same_files(tmp_path: Path, name: str) -> None:
    layout = LAYOUTS[name]
    for file, content in layout.files().items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes(content)
    config = None if layout.as_config == "default" else layout.as_config
    builder = load_dataset_builder(str(tmp_path), config, cache_dir=str(tmp_path / "cache"))
    found = builder.config.data_files[layout.split]
    assert [Path(file).relative_to(tmp_path).as_posix() for file in found] == [*layout.found]


CARDS = {
    "": None,
    "# Tekst": None,
    "---\n---\n": None,
    "---\n# niets\n---\n": None,
    "\ufeff---\r\nlicense: mit\r\n---\r\n": "mit",
    "---\nlicense:\n- mit\n- cc0-1.0\n---": ["mit", "cc0-1.0"],
    "---\nlicense: no\n---\n": "no",
}


@pytest.mark.parametrize("text", CARDS)
def test_licences_of_cards(text: str) -> None:
    assert parse_card(text).license == CARDS[text]


BAD_CARDS = {
    "text": "tekst",
    "a list": "- a",
    "damaged": "configs: [",
    "configs": "configs: alles",
    "a config": "configs: [[a]]",
    "no name": "configs: [{data_files: a}]",
    "a list as name": "configs: [{config_name: [a]}]",
    "no path": "configs: [{config_name: a, data_files: [{split: train}]}]",
    "a licence": "license: {a: b}",
    "an alias of itself": "configs: &a [*a]",
    "an object": "configs: [{config_name: a, data_files: !!python/tuple [[x]]}]",
}


@pytest.mark.parametrize("name", BAD_CARDS)
def test_bad_cards(name: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_card(f"---\n{BAD_CARDS[name]}\n---\n")


@pytest.mark.parametrize("path", ["../a.txt", "a/../../b.txt", "hf://datasets/a/b/c.txt"])
def test_cards_name_files_of_their_own(path: str) -> None:
    (config,) = parse_card(f"---\nconfigs: [{{config_name: a, data_files: {path}}}]\n---").configs
    with pytest.raises(ValueError, match="not in the dataset"):
        config.patterns()
