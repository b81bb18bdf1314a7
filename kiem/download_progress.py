"""What people see of a download: which file of how many, bytes, speed and time left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


class DownloadProgress:
    """One bar over all files, fed by huggingface_hub.

    Args:
        num_files: how many files there are.
        total_bytes: their bytes together.
        console: where it is shown; nothing is when this is no terminal.
    """

    def __init__(self, num_files: int, total_bytes: int, console: Console):
        text = TextColumn("{task.description}", markup=False)
        columns = (
            text,
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        is_shown = console.is_terminal
        self._bar = Progress(*columns, console=console, transient=True, disable=not is_shown)
        self._task = self._bar.add_task("downloading", total=total_bytes)
        self._num_files = num_files
        self._num_begun = 0
        self._finished_bytes = 0

    def __enter__(self) -> DownloadProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    @contextmanager
    def file(self, num_bytes: int) -> Iterator[None]:
        """Counts the next file, of `num_bytes`, whether it is downloaded or there already."""
        self._num_begun += 1
        self._bar.update(self._task, description=f"file {self._num_begun} of {self._num_files}")
        yield
        self._finished_bytes += num_bytes
        self._bar.update(self._task, completed=self._finished_bytes)

    def tqdm_class(self) -> type:
        """Returns what huggingface_hub makes for each file that it downloads."""
        from huggingface_hub.utils.tqdm import tqdm

        bar, task, progress = self._bar, self._task, self

        class FileProgress(tqdm):
            def __init__(self, *args: Any, **options: Any):
                super().__init__(*args, **{**options, "disable": True})
                # A try after a failed one begins where that one ended, or at zero.
                completed = progress._finished_bytes + options.get("initial", 0)
                bar.update(task, completed=completed)

            def update(self, n: float | None = 1) -> None:
                bar.advance(task, n or 0)

            # Xet counts what comes over the network apart from what is written; one is enough.
            def update_transfer(self, _: float) -> None: ...

            def set_transfer_postfix_str(self, *_: Any, **__: Any) -> None: ...

        return FileProgress
