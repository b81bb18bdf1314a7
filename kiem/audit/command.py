"""kiem audit: the chain of hashes behind a run, or the documents behind one of its updates."""

from __future__ import annotations

from rich.console import Console

from kiem.audit.links import Check, Link, find_links, own_sha256
from kiem.audit.record import FINAL_MODEL, FIX, RunRecord, read_run
from kiem.audit.update import print_update
from kiem.config import AuditOptions
from kiem.core.errors import damaged

_MOST_SHOWN = 20  # of the files of a link that are not proved
_COLORS = {"proved": "green", "not checked": "yellow", "missing": "yellow", "changed": "red"}


def audit(options: AuditOptions, console: Console) -> None:
    """Runs kiem audit.

    Args:
        options: all options of kiem audit.
        console: where the links, or the documents, go.

    Raises:
        UserError: a link is changed, or the run's own record is missing or damaged.
    """
    run = read_run(options.run, options.dataset_path)
    if options.step is not None:
        return print_update(run, options.step, console)
    links = []
    for link in find_links(run):
        links.append(link)
        _print_link(link, console)
    changed = [check for link in links for check in link.checks if check.state == "changed"]
    if changed:
        what = f"{len(changed)} files are changed, first of all this one"
        raise damaged(changed[0].what, what if len(changed) > 1 else "is changed", FIX)
    _print_conclusion(run, links, console)


def _print_link(link: Link, console: Console) -> None:
    proved = sum(check.state == "proved" for check in link.checks)
    counts = f"{proved} of {len(link.checks)} files"
    console.print(f"{link.state:11}", style=_COLORS[link.state], end="  ")
    console.print(f"{link.name} ({counts})" if len(link.checks) > 1 else link.name)
    open_checks = [check for check in link.checks if check.state != "proved"]
    for check in open_checks[:_MOST_SHOWN]:
        _print_check(check, console)
    if len(open_checks) > _MOST_SHOWN:
        console.print(f"    and {len(open_checks) - _MOST_SHOWN} more")


def _print_check(check: Check, console: Console) -> None:
    console.print(f"    {check.state}: {check.what}: {check.why}")


def _print_conclusion(run: RunRecord, links: list[Link], console: Console) -> None:
    """Says what the hashes prove together, and what they cannot."""
    not_proved = [link.name for link in links if link.state != "proved"]
    if not_proved:
        console.print(f"\nNothing is changed. Not proved: {'; '.join(not_proved)}.")
    else:
        console.print("\nEvery link is proved, from the final weights to the source files.")
    if run.summary is not None:
        sha256 = own_sha256(run.directory / FINAL_MODEL)
        console.print(f"Whoever knows the sha256 of {FINAL_MODEL}/manifest.json can repeat this:")
        console.print(f"  {sha256}")
    console.print(
        "Hashes prove that nothing has changed since it was recorded. That the training did what "
        "was recorded, only training again proves: on a CPU it gives the same bits."
    )
