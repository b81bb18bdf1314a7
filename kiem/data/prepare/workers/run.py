"""The workers that the options ask for.

A worker takes the next unit when it has finished one. The result does not depend on which worker
takes which unit.
"""

from __future__ import annotations

from rich.console import Console

from kiem.core.console import warn
from kiem.core.processors import num_processors
from kiem.data.prepare.units import Job
from kiem.data.prepare.workers.cluster import run_on_ray
from kiem.data.prepare.workers.local import FinishedUnits, run_locally
from kiem.tokenizer.encoding import fast_path, load_encoders


def run_units(job: Job, console: Console) -> FinishedUnits:
    """Finishes units in the workers that the options ask for.

    Raises a UserError as `finish_unit` does, or if a worker is killed. Finished units are kept. The
    console shows why encoding is slow, if it is.
    """
    options, tokenizer = job.options, job.tokenizer
    fast = fast_path(tokenizer, options.encoder) if tokenizer else ""
    if tokenizer and isinstance(fast, str) and options.encoder == "auto":
        warn(console, f"encoding slowly with the tokenizers library: {fast}")
    if options.executor == "ray":
        yield from run_on_ray(job, console)
        return
    num_workers = min(options.num_proc or num_processors(), len(job.units))
    if tokenizer is None:
        yield from run_locally(job, [None] * num_workers)
        return
    with load_encoders(tokenizer, fast, num_workers) as encoders:
        yield from run_locally(job, encoders)
