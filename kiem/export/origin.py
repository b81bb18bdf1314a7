"""Name, languages and licence of a model, from its card."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec

from kiem.core.errors import ExitCode, bad_input
from kiem.core.json_input import convert
from kiem.hub import looks_like_hub_id, read_front_matter

CARD_FILE = "README.md"


class _Entry(msgspec.Struct):
    name: str = ""


class _Card(msgspec.Struct, rename={"model_index": "model-index"}):
    language: str | list[str] = ""
    license: str = ""
    license_name: str = ""
    license_link: str = ""
    model_name: str = ""
    model_index: list[_Entry] | str = ""  # YAML's nothing is a text here


@dataclass(frozen=True)
class Origin:
    """What a card says of its model; empty where it says nothing.

    Attributes:
        name: the model's name.
        languages: ISO codes of the languages of its text.
        license: identifier of the licence on the Hub.
        license_name, license_link: of a licence that the Hub calls "other".
    """

    name: str
    languages: list[str]
    license: str
    license_name: str
    license_link: str


def read_origin(folder: Path, model_path: str) -> Origin:
    """Reads the card of a model directory.

    A run writes its own name and language there. If the card has no name, a model of the Hub has
    that of its repository; the name of a folder, such as final_model, tells nothing.

    Args:
        folder: the model directory.
        model_path: the folder or Hub id that was asked for.

    Raises:
        UserError: the head of the card is damaged; names the key.
    """
    path = folder / CARD_FILE
    fix = "Correct the lines between '---' at its top, or remove the file."
    try:
        values = read_front_matter(path) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise bad_input(str(path), f"cannot be read ({error})", fix) from error
    card = convert(values, _Card, where=str(path), fix=fix, exit_code=ExitCode.BAD_INPUT)
    entries = card.model_index if isinstance(card.model_index, list) else []
    name = entries[0].name if entries else card.model_name
    if not name and looks_like_hub_id(model_path) and not Path(model_path).exists():
        name = model_path.rpartition("/")[2]
    languages = [card.language] if isinstance(card.language, str) else card.language
    languages = [language for language in languages if language]
    return Origin(name, languages, card.license, card.license_name, card.license_link)
