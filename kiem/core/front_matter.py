"""The YAML at the head of a README.md on the Hub: what the card of a model or dataset says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

_BLOCK = re.compile(r"\s*---[ \t]*\r?\n(.*?)^---[ \t]*$", re.DOTALL | re.MULTILINE)


def read_front_matter(path: Path) -> dict[str, Any]:
    """Returns the metadata of a card; {} if it has none. All values are texts, lists or mappings.

    YAML's own guesses are not asked: to them the language `no` is false.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not UTF-8, or its head is not YAML with keys.
    """
    block = _BLOCK.match(path.read_text(encoding="utf-8-sig"))
    if block is None:
        return {}
    try:
        values = yaml.load(block[1], Loader=yaml.BaseLoader)
    except (yaml.YAMLError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"the lines between '---' are not YAML ({reason})") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError("the lines between '---' are no keys with values")
    return values
