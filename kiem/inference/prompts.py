"""Where prompts come from: an option, a file, or five Dutch ones."""

from __future__ import annotations

import json
from pathlib import Path

from kiem.errors import ExitCode, UserError

DEFAULT_PROMPTS = (
    "Nederland is een land waar",
    "De geschiedenis van Amsterdam begint",
    "Vandaag heeft de regering besloten dat",
    "Het belangrijkste verschil tussen een fiets en een auto is",
    "Er was eens een klein meisje dat",
)


def read_prompts(prompt: str | None, path: Path | None) -> list[str]:
    """Returns the prompts that the options name, or the five default ones.

    Args:
        prompt: the one prompt, if it is given.
        path: a file with prompts, if it is given.

    Raises:
        UserError: the file is missing, empty or malformed; names the line.
    """
    if prompt is not None:
        return [prompt]
    if path is None:
        return list(DEFAULT_PROMPTS)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise _bad_prompts(str(path), "not UTF-8") from error
    except OSError as error:
        raise UserError(
            f"cannot be read ({error.strerror})",
            where=str(path),
            fix="Correct --prompts-file.",
            exit_code=ExitCode.NOT_FOUND,
        ) from error
    # Not splitlines(): it cuts at U+2028 too, which may stand inside a prompt.
    numbered = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not numbered:
        raise _bad_prompts(str(path), "the file has no prompts")
    if path.suffix == ".jsonl":
        return [_json_prompt(line, f"{path}:{number}") for number, line in numbered]
    return [line for _, line in numbered]


def _json_prompt(line: str, place: str) -> str:
    try:
        prompt = json.loads(line)["prompt"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _bad_prompts(place, 'not like {"prompt": "..."}') from error
    if not isinstance(prompt, str):
        raise _bad_prompts(place, "the prompt is not a string")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:  # JSON can write half of a pair of surrogates
        raise _bad_prompts(place, "the prompt has half a character") from error
    return prompt


def _bad_prompts(where: str, what: str) -> UserError:
    return UserError(
        what,
        where=where,
        fix="Give one prompt a line (.txt), or JSON Lines with a key prompt (.jsonl).",
        exit_code=ExitCode.BAD_INPUT,
    )
