"""Prompts from an option or a file, or five Dutch ones."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from kiem.core.errors import ExitCode, UserError, bad_input
from kiem.data.read.formats import READABLE
from kiem.data.read.readers import read_documents
from kiem.data.read.sources import local_source
from kiem.data.read.text_files import EVERY_LINE

DEFAULT_PROMPTS = (
    "Nederland is een land waar",
    "De geschiedenis van Amsterdam begint",
    "Vandaag heeft de regering besloten dat",
    "Het belangrijkste verschil tussen een fiets en een auto is",
    "Er was eens een klein meisje dat",
)
_FIX = f'Give one prompt a line (.txt), or a column or key "prompt" ({READABLE}).'


def read_prompts(
    prompt: str | None, path: Path | None, console: Console | None = None
) -> list[str]:
    """Returns the one prompt, those of a file, or the default ones.

    Raises:
        UserError: the file is missing, empty or malformed; names the line.
    """
    if prompt is not None:
        return [prompt]
    if path is None:
        return list(DEFAULT_PROMPTS)
    try:
        source = local_source([str(path)], "--prompts-file", console, EVERY_LINE)
        prompts = [row.text for row in read_documents(source, "prompt", _FIX) if row.text]
    except UserError as error:
        if error.exit_code == ExitCode.BAD_INPUT:
            error.fix = _FIX  # the readers' own advice is about documents
        raise
    if not prompts:
        raise bad_input(str(path), "the file has no prompts", _FIX)
    return prompts
