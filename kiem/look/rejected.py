"""Examples from rejected.jsonl, of which only some parts are read when it is large."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np

from kiem.core.errors import damaged
from kiem.core.randomness import derive_seed
from kiem.data.chunks import MAKE_AGAIN, REJECTED_FILE

_MOST_BYTES = 1 << 24
_PARTS = 16
_MOST_CHARACTERS = 600


class _Line(msgspec.Struct):
    place: str
    source: str
    reason: str
    text: str | None


def read_rejected(path: Path, num_samples: int, seed: int) -> tuple[list[tuple[str, str]], bool]:
    """Returns examples of rejected documents: for each reason some, the reasons in order.

    Args:
        path: the chunk directory.
        num_samples: examples for each reason.
        seed: of what is chosen.

    Returns:
        What each is, and the beginning of its text; and whether all lines were looked at.

    Raises:
        UserError: the file is missing or damaged.
    """
    file = path / REJECTED_FILE
    generator = np.random.Generator(np.random.PCG64(derive_seed(seed, "look rejected")))
    by_reason: dict[str, list[_Line]] = {}
    try:
        for text in _some_lines(file, generator):
            line = msgspec.json.decode(text, type=_Line)
            by_reason.setdefault(line.reason, []).append(line)
        is_all = file.stat().st_size <= _MOST_BYTES
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise damaged(str(file), f"cannot be read ({error})", MAKE_AGAIN) from error
    examples = []
    for reason, lines in sorted(by_reason.items()):
        chosen = generator.choice(len(lines), min(num_samples, len(lines)), replace=False)
        for number in np.sort(chosen):
            found = lines[number]
            shown = (found.text or "(not text)")[:_MOST_CHARACTERS]
            examples.append((f"{reason}: {found.source}, {found.place}", shown))
    return examples, is_all


def _some_lines(file: Path, generator: np.random.Generator) -> list[bytes]:
    """Returns the lines of a file, or of a large one those of some parts."""
    size = file.stat().st_size
    if size <= _MOST_BYTES:
        return file.read_bytes().splitlines()
    lines: list[bytes] = []
    part_bytes = _MOST_BYTES // _PARTS
    with file.open("rb") as opened:
        for start in np.sort(generator.integers(0, size - part_bytes, _PARTS)).tolist():
            opened.seek(start)
            # The first and the last line may be cut.
            lines += opened.read(part_bytes).split(b"\n")[1:-1]
    return lines
