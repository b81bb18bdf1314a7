"""What a model says of itself in its card: name, languages, licence."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec

from kiem.core.errors import ExitCode, UserError
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
    """Where a model comes from; what nobody says is empty.

    Attributes:
        name: what the model is called.
        languages: ISO codes of the languages of its text.
        license: identifier of the licence, as the Hub has them.
        license_name, license_link: of a licence that the Hub calls "other".
    """

    name: str
    languages: list[str]
    license: str
    license_name: str
    license_link: str


def read_origin(folder: Path, model_path: str) -> Origin:
    """Returns what the card of a model directory says.

    A run writes its own name and language there. Where the card gives no name, a model of the Hub
    has that of its repository; the name of a folder says nothing: final_model, say.

    Args:
        folder: the model directory.
        model_path: the folder or Hub id that was asked for.

    Raises:
        UserError: there is a card, and its head is not like a card's; names the key.
    """
    path = folder / CARD_FILE
    fix = "Mend the lines between '---' at its top, or remove the file."
    try:
        values = read_front_matter(path) if path.is_file() else {}
    except (OSError, ValueError) as error:
        what = f"cannot be read ({error})"
        where = str(path)
        raise UserError(what, where=where, fix=fix, exit_code=ExitCode.BAD_INPUT) from error
    card = convert(values, _Card, where=str(path), fix=fix, exit_code=ExitCode.BAD_INPUT)
    entries = card.model_index if isinstance(card.model_index, list) else []
    name = entries[0].name if entries else card.model_name
    if not name and looks_like_hub_id(model_path) and not Path(model_path).exists():
        name = model_path.rpartition("/")[2]
    languages = [card.language] if isinstance(card.language, str) else card.language
    return Origin(
        name=name,
        languages=[language for language in languages if language],
        license=card.license,
        license_name=card.license_name,
        license_link=card.license_link,
    )
