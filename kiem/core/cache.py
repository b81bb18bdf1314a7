"""What takes long to make and can always be made again, kept in the user's cache folder."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

from kiem.core.errors import UserError
from kiem.core.files import make_folder, read_sealed, sealed_file


def cache_folder() -> Path:
    """Returns the folder, which need not be there.

    Raises:
        RuntimeError: the user has no home folder.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kiem"


def kept(name: str, made_from: bytes, make: Callable[[], bytes]) -> bytes:
    """Returns what `make` returns, from the user's cache if it is there and intact.

    Without a cache folder that can be written to, it is made each time.

    Args:
        name: of the file in the cache.
        made_from: a digest of all that the content depends on. A file that was made from something
            else is replaced.
        make: makes the content.
    """
    with contextlib.suppress(OSError, RuntimeError):
        content = read_sealed(cache_folder() / name)
        if content is not None and content.startswith(made_from):
            return content[len(made_from) :]
    made = make()
    with contextlib.suppress(UserError, OSError, RuntimeError):
        make_folder(cache_folder())
        with sealed_file(cache_folder() / name) as file:
            file.write(made_from + made)
    return made
