"""All that only a GPU can show, in one command: what is right, how fast it is, and beside whom.

    python benchmarks/gpu.py --json gpu.jsonl

It ends within 8 minutes on one H100 and needs no network: tokens are made up, weights are random.
Each part runs in processes of its own within a limit of time, so none can lose the others. What
it finds goes into the file at once, one JSON object a line, with the card, the date and a verdict:

    ok          the target is reached
    below       right, but slower than the target
    failed      wrong, or the part ended with an error or at its limit
    measured    there is no target
    left out    something is missing, which the line names

Parts in which time counts have the GPU for themselves, one after the other; then the rest runs
side by side. `--rehearse` does everything on the CPU in tiny sizes, and judges no speed.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rich.console import Console
from rich.table import Table

from kiem.cli import parse
from kiem.core.processors import num_processors

HERE = Path(__file__).resolve().parent
_REHEARSAL_FACTOR = 4  # more time: processors are slow and compile C++
_PROCESSORS_PER_PART = 4
_MOST_PARTS_AT_ONCE = 5
_TAIL_CHARACTERS = 2000
_WIDTH = 120  # where there is no terminal
_LONGEST_RESULT = 50  # in the table


class Part(NamedTuple):
    """A part: its name, the script that has it, its limit, and whether it needs the GPU alone."""

    name: str
    script: str
    limit_seconds: float
    is_timed: bool


PARTS = (
    Part("versions", "gpu_numbers.py", 50, True),
    Part("text", "gpu_runs.py", 40, True),
    Part("attention", "gpu_numbers.py", 50, True),
    Part("loss", "gpu_numbers.py", 60, True),
    Part("parity", "gpu_numbers.py", 60, True),
    Part("training", "gpu_speed.py", 170, True),
    Part("decoding", "gpu_speed.py", 60, True),
    Part("trainer", "gpu_speed.py", 110, True),
    Part("tests", "gpu_runs.py", 170, False),
    Part("plan", "gpu_speed.py", 60, False),
    Part("resume", "gpu_runs.py", 100, False),
    Part("processes", "gpu_runs.py", 100, False),
    Part("memory", "gpu_runs.py", 100, False),
)
# Parts that train on the chunks of the part text.
_NEED_TEXT = {"resume", "processes", "memory"}
Name = Literal[tuple(part.name for part in PARTS)]


@dataclass(frozen=True)
class Options:
    """Check and measure everything on this machine's GPU."""

    parts: tuple[Name, ...] = tuple(part.name for part in PARTS)
    """Which parts to run. plan and trainer compare with what training has left in the file."""
    json: Path = Path("gpu.jsonl")
    """File to which results are added."""
    minutes: float = 8.0
    """End by then; parts that have not begun are left out."""
    rehearse: bool = False
    """Run all on the CPU in tiny sizes."""


def main() -> int:
    options = parse(Options, sys.argv[1:], __file__)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # with the parts and the table
    console = Console(width=None if sys.stdout.isatty() else _WIDTH)
    names = {*options.parts, *(["text"] if _NEED_TEXT & {*options.parts} else [])}
    parts = [part for part in PARTS if part.name in names]
    timed = [part for part in parts if part.is_timed]
    others = [part for part in parts if not part.is_timed]
    num_old = len(read_records(options.json))
    end = time.monotonic() + 60 * options.minutes * (_REHEARSAL_FACTOR if options.rehearse else 1)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        runner = Runner(options, Path(folder), console)
        try:
            reserve = max((runner.limit(part) for part in others), default=0)
            for part in timed:
                runner.run(part, end - reserve)
            num_at_once = min(num_processors() // _PROCESSORS_PER_PART, _MOST_PARTS_AT_ONCE)
            with ThreadPoolExecutor(max(1, num_at_once)) as pool:
                try:
                    list(pool.map(lambda part: runner.run(part, end), others))
                except BaseException:
                    runner.stop()
                    raise
        finally:
            records = read_records(options.json)[num_old:]
            console.print(table(records, options.rehearse))
    return int(any(record["verdict"] == "failed" for record in records))


class Runner:
    """Runs parts.

    Args:
        options: of the command line.
        folder: for what parts write.
        console: where progress goes.
    """

    def __init__(self, options: Options, folder: Path, console: Console):
        self._options = options
        self._folder = folder
        self._console = console
        self._running: set[int] = set()
        self._is_stopped = False

    def stop(self) -> None:
        """Ends the parts that run, and begins no others."""
        self._is_stopped = True
        for group in [*self._running]:
            kill_group(group)

    def limit(self, part: Part) -> float:
        """Returns the seconds that a part may take."""
        return part.limit_seconds * (_REHEARSAL_FACTOR if self._options.rehearse else 1)

    def run(self, part: Part, end: float) -> None:
        """Runs a part to its end or its limit, or till `end` (monotonic seconds)."""
        started = time.monotonic()
        seconds = min(self.limit(part), end - started)
        if self._is_stopped:
            return
        if seconds <= 0:
            return self._add(part, "left out", "no time was left")
        log = self._folder / f"{part.name}.log"
        command = [sys.executable, str(HERE / part.script), part.name, str(self._options.json)]
        command += [str(self._folder), *(["--rehearse"] if self._options.rehearse else [])]
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            self._running.add(process.pid)
            try:
                why = f"exit code {code}" if (code := process.wait(seconds)) != 0 else ""
            except subprocess.TimeoutExpired:
                why = f"stopped after {seconds:.0f} s"
            finally:  # its programs, too, also when this one is interrupted
                kill_group(process.pid)
                process.wait()
                self._running.discard(process.pid)
        if why:
            tail = log.read_text(encoding="utf-8", errors="replace")[-_TAIL_CHARACTERS:]
            self._add(part, "failed", why, output=tail)
            self._console.print(tail, markup=False, highlight=False)
        done = [r for r in read_records(self._options.json) if r["part"] == part.name]
        words = ", ".join(f"{r['check']}: {r['verdict']}" for r in done)
        self._console.print(
            f"{part.name} ({time.monotonic() - started:.0f} s): {words}", markup=False
        )

    def _environment(self) -> dict[str, str]:
        path = os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
        added = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
        # One GPU: Trainer would use all that it sees.
        added["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        if self._options.rehearse:
            added |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        return {**os.environ, **added}

    def _add(self, part: Part, verdict: str, why: str, **details: str) -> None:
        record = {"part": part.name, "check": "end", "value": why, "verdict": verdict, **details}
        add_record(self._options.json, record)


def kill_group(group: int) -> None:
    """Ends all processes of a group, if there are any."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def add_record(file: Path, record: dict[str, Any]) -> None:
    """Adds a line to the file of results; several processes may do so."""
    with file.open("ab", buffering=0) as output:
        output.write(json.dumps(record).encode() + b"\n")


def read_records(file: Path) -> list[dict[str, Any]]:
    """Returns the results in a file so far."""
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def table(records: list[dict[str, Any]], rehearse: bool) -> Table:
    """Returns what was found as a table, under the card's name."""
    machine = next((r for r in records if "card" in r), {})
    title = " · ".join(str(machine[key]) for key in ("card", "torch", "date") if key in machine)
    if rehearse:
        title = f"REHEARSAL, which measures nothing: {title}"
    shown = Table("part", "check", "result", "target", "verdict", title=title)
    for record in records:
        value, unit = record.get("value", ""), record.get("unit", "")
        if isinstance(value, float):
            value = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
        shown.add_row(
            record["part"],
            record["check"],
            f"{value} {unit}".strip()[:_LONGEST_RESULT],
            record.get("target", ""),
            record["verdict"],
        )
    return shown


if __name__ == "__main__":
    sys.exit(main())
