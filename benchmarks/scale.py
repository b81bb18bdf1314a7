"""The whole way at the size of a corpus: memory over time, processor time and disk.

    python benchmarks/scale.py --text FOLDER --tokenizer tokenizer.json --words 1_000_000_000

The text is repeated until it has so many words. A counter word before each document makes all of
them different. Then preprocess.py runs, and on its chunks a short training, `kiem look` and
`kiem audit`. With --kill-after preprocess.py is killed after some units and started again; a line
says how many of these units the second run made again.

Memory is what a process has for itself: PSS without mapped files, which the system may drop. It
must not grow with the text, so its peak in the first and in the last tenth of a phase are compared.
Repeated text has no new words: encoding is faster than it would be with as much new text.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import msgspec
import psutil
from peers import ROOT, machine
from rich.console import Console
from rich.table import Table

from kiem import cli
from kiem.core.files import format_bytes

WORK = ".chunks.unfinished"
_SAMPLE_SECONDS = 1.0
# The training ends with all of the test split, which would take longer than all the rest.
_TEST_SPLIT = 0.00001

Stamp = tuple[int, int]


@dataclass(frozen=True)
class Options:
    """Measure memory, processor time and disk from text to an audited run."""

    text: Path
    """Folder with .jsonl files, which are repeated."""
    tokenizer: Path
    """A tokenizer.json."""
    words: int = 1_000_000_000
    """Words of the repeated text."""
    chunk_size: int = 1024
    """Tokens in a chunk."""
    num_proc: int = 2
    """Worker processes."""
    clean: str = "none"
    """As of preprocess.py."""
    kill_after: int = 0
    """Kill preprocess.py when so many units are finished, and start it again. 0: never."""
    steps: int = 5
    """Updates of the training."""
    folder: Path | None = None
    """Where text, chunks and run go. The text of an earlier call is taken again. Default: a
    temporary folder."""


class Sample(NamedTuple):
    """What a program and its children hold at a moment.

    Attributes:
        phase: what it is doing.
        seconds: since its start.
        main, others: bytes of the program itself, and of its children together.
        mapped: bytes of files that they have mapped.
        disk: bytes of units and chunks.
    """

    phase: str
    seconds: float
    main: int
    others: int
    mapped: int
    disk: int


class Watched(NamedTuple):
    """A command that has been watched to its end.

    Attributes:
        samples: in the order of time.
        cpu_seconds: user and system, with all children.
        units: the units of preprocess.py, as they were last seen.
    """

    samples: list[Sample]
    cpu_seconds: float
    units: dict[str, Stamp]


def main(options: Options, console: Console) -> None:
    console.print(machine())
    with contextlib.ExitStack() as stack:
        folder = options.folder or stack.enter_context(tempfile.TemporaryDirectory())
        measure(options, Path(folder).absolute(), console)


def measure(options: Options, folder: Path, console: Console) -> None:
    text, chunks = folder / "text", folder / "chunks"
    for made in (chunks, folder / WORK, folder / "run"):
        shutil.rmtree(made, ignore_errors=True)
    num_words, num_bytes = repeat_text(options.text, text, options.words)
    console.print(f"{num_words:,} words, {format_bytes(num_bytes)}")
    columns = ("main: first tenth", "last tenth", "children: first tenth", "last tenth")
    table = Table("", "", *columns, "mapped", "disk", "processor seconds")
    preprocess = ["preprocess.py", "--source", str(text), "--tokenizer", str(options.tokenizer)]
    preprocess += ["--chunk-size", str(options.chunk_size), "--num-proc", str(options.num_proc)]
    preprocess += ["--clean", options.clean, "--output-dir", str(folder), "--name", chunks.name]
    preprocess += ["--test-split", str(_TEST_SPLIT)]
    units = kill_after(preprocess, folder, options.kill_after) if options.kill_after else {}
    done = watch(preprocess, folder)
    add_rows(table, "preprocess", done)
    splits = json.loads((chunks / "manifest.json").read_bytes())["splits"].values()
    num_tokens = sum(split["tokens"] for split in splits)
    num_documents = sum(split["documents"] for split in splits)
    rate = num_tokens / done.cpu_seconds
    console.print(f"{num_tokens:,} tokens in {num_documents:,} documents")
    console.print(f"{rate:,.0f} tokens per second of processor time")
    if units:
        again = [path for path, stamp in units.items() if stamp != done.units.get(path)]
        console.print(f"of {len(units)} units of the killed run, {len(again)} were made again")
    training = ["training.py", "--dataset-path", str(chunks), "--model", "gemma3-micro"]
    training += ["--output-dir", str(folder), "--run-name", "run"]
    training += ["--max-steps", str(options.steps), "--minimal-pairs", "never"]
    training += ["--batch-size", "1", "--gradient-accumulation-steps", "1", "--eval-chunks", "4"]
    audit = ["-m", "kiem", "audit", str(folder / "run")]
    further = {
        "verify": ["preprocess.py", "--verify", str(chunks)],
        "train": training,
        "look": ["-m", "kiem", "look", str(chunks), "--output", str(folder / "look.html")],
        "audit": audit,
        "audit --step": [*audit, "--step", str(options.steps)],
    }
    for name, command in further.items():
        add_rows(table, name, watch(command, folder))
    console.print(table)


def repeat_text(source: Path, folder: Path, num_words: int) -> tuple[int, int]:
    """Writes the documents again and again, each with another first word, unless they are there.

    Returns:
        The words and bytes that were written.
    """
    lines = [line for file in sorted(source.glob("*.jsonl")) for line in file.open()]
    documents = [json.loads(line)["text"] for line in lines]
    num_words_once = sum(len(text.split()) + 1 for text in documents)
    num_copies = -(-num_words // num_words_once)
    folder.mkdir(parents=True, exist_ok=True)
    num_bytes = 0
    for copy in range(num_copies):
        file = folder / f"{copy:05d}.jsonl"
        if not file.exists():
            first = copy * len(documents)
            texts = (f"{number} {text}" for number, text in enumerate(documents, first))
            file.write_bytes(b"".join(msgspec.json.encode({"text": t}) + b"\n" for t in texts))
        num_bytes += file.stat().st_size
    return num_copies * num_words_once, num_bytes


def watch(command: list[str], folder: Path) -> Watched:
    """Runs a Python command to its end."""
    started = time.perf_counter()
    log = folder / "log.txt"
    with log.open("wb") as output:
        program = subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT
        )
    samples: list[Sample] = []
    units: dict[str, Stamp] = {}
    while True:
        with contextlib.suppress(psutil.NoSuchProcess, OSError):
            phase = samples[-1].phase if samples else ""
            samples.append(take_sample(program.pid, phase, started, folder))
        units |= find_units(folder)
        ended, status, usage = os.wait4(program.pid, os.WNOHANG)
        if ended:
            break
        time.sleep(_SAMPLE_SECONDS)
    program.returncode = os.waitstatus_to_exitcode(status)
    if program.returncode != 0:
        raise SystemExit(log.read_text())
    return Watched(samples, usage.ru_utime + usage.ru_stime, units)


def take_sample(pid: int, before: str, started: float, folder: Path) -> Sample:
    """Looks at a program; `before` is the phase that it was in."""
    children = psutil.Process(pid).children(recursive=True)
    main, mapped = memory_of(pid)
    others = 0
    for child in children:
        with contextlib.suppress(OSError):
            own, mapped_by_child = memory_of(child.pid)
            others += own
            mapped += mapped_by_child
    work = folder / WORK
    phase = "plan" if before in ("", "plan") else "decide"
    phase = "pack" if (work / "result").exists() else "encode" if children else phase
    files = itertools.chain(work.rglob("*"), (folder / "chunks").rglob("*"))
    disk = 0
    for file in files:
        with contextlib.suppress(OSError):
            disk += file.stat().st_size
    seconds = time.perf_counter() - started
    return Sample(phase if work.exists() else "", seconds, main, others, mapped, disk)


def memory_of(pid: int) -> tuple[int, int]:
    """Returns the bytes that a process has for itself, and those of files that it has mapped.

    What it shares with others counts by their number.
    """
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    kilobytes = {name: int(size.split()[0]) for name, size in (line.split(":") for line in lines)}
    own = kilobytes["Pss_Anon"] + kilobytes["Pss_Shmem"] + kilobytes["SwapPss"]
    return own * 1024, kilobytes["Pss_File"] * 1024


def add_rows(table: Table, name: str, watched: Watched) -> None:
    """Adds a row for each phase: peaks in its first and last tenth."""
    seconds = f"{watched.cpu_seconds:.0f}"
    for phase, group in itertools.groupby(watched.samples, lambda sample: sample.phase):
        samples = [*group]
        tenth = -(-len(samples) // 10)
        parts = samples[:tenth], samples[-tenth:]
        peaks = [max(getattr(s, of) for s in part) for of in ("main", "others") for part in parts]
        peaks += [max(sample.mapped for sample in samples), max(sample.disk for sample in samples)]
        table.add_row(name, phase, *map(format_bytes, peaks), seconds)
        name = seconds = ""


def kill_after(command: list[str], folder: Path, num_units: int) -> dict[str, Stamp]:
    """Starts a command and kills it when it has finished so many units; returns these."""
    program = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.DEVNULL)
    while len(find_units(folder)) < num_units:
        if program.poll() is not None:
            raise SystemExit("preprocess.py ended before it was killed")
        time.sleep(_SAMPLE_SECONDS)
    program.kill()
    program.wait()
    time.sleep(5 * _SAMPLE_SECONDS)  # its workers end when they have finished their units
    return find_units(folder)


def find_units(folder: Path) -> dict[str, Stamp]:
    """Returns the finished units by name, with what changes when one is made again."""
    units = {}
    for path in (folder / WORK).glob("*.unit"):
        with contextlib.suppress(OSError):
            found = path.stat()
            units[path.name] = (found.st_ino, found.st_mtime_ns)
    return units


if __name__ == "__main__":
    sys.exit(cli.run(Options, __file__, main))
