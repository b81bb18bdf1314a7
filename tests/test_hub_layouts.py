"""Which files of a dataset on the Hub are read: against `datasets`, and what is said otherwise."""

from __future__ import annotations

from pathlib import Path

import pytest
from datasets import load_dataset_builder
from hub_layouts import LAYOUTS


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
