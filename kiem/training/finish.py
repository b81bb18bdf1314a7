"""What a trained run leaves behind: first of all its model."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from kiem.core.files import new_folder, point_link, write_json, write_text
from kiem.core.manifest import write_manifest
from kiem.model.io import write_model
from kiem.report.card import model_card
from kiem.report.record import SUMMARY_FILE
from kiem.tokenizer.tokenizer import write_tokenizer
from kiem.training.accessories import attempt
from kiem.training.run import Run


def write_final_model(run: Run, console: Console, figures: Mapping[str, Any]) -> dict[str, Any]:
    """Writes final_model/ and returns the run's summary, which is in it.

    Args:
        run: the trained run.
        console: where it is said if there is no model card.
        figures: the last evaluation, as far as it came.

    Raises:
        UserError: the disk refuses.
    """
    summary = {
        **run.facts,
        "steps": run.step,
        "tokens": run.tokens,
        "seconds": run.seconds,
        **({"joules": run.joules} if run.joules else {}),
        **figures,
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    describe = partial(model_card, summary, run.directory.name, run.options.language)
    card = attempt(run, console, "the model card", describe)
    folder = final_model(run)
    with new_folder(folder, overwrite=folder.exists()) as unfinished:
        known = write_model(run.model, unfinished, run.tokenizer.special_ids)
        write_tokenizer(run.tokenizer, unfinished)
        write_json(unfinished / SUMMARY_FILE, summary)
        if card is not None:
            write_text(unfinished / "README.md", card)
        write_manifest(unfinished, known, without=("README.md",))
    return summary


def final_model(run: Run) -> Path:
    """Returns where the run's model goes."""
    return run.directory / "final_model"


def point_latest_link(run: Run) -> None:
    """Makes the link of the newest run of this model point to this one."""
    point_link(run.directory.parent / f"{run.model_name}-dutch-latest", run.directory.name)


def close_trackers(run: Run, console: Console, summary: Mapping[str, Any] | None) -> None:
    """Gives the trackers the run's results, None if it was stopped, and ends them."""
    for name, tracker in run.trackers.items():
        attempt(run, console, name, partial(tracker.finish, summary))
