"""Preprocessing side by side with the usual pipeline: datasets.map and group_texts.

    python benchmarks/preprocessing.py --text FOLDER --tokenizer tokenizer.json

Both read the same JSON Lines files, with the same tokenizer and as many processes or threads as
there are cores, from the start of the program to chunks on the disk. They take turns; the table has
each side's median and the ratio of the medians. The peer runs in an environment of its own, which
is made on first use.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
PEER_REQUIREMENTS = ("datasets==5.2.0", "transformers==5.23.0")
PEER = """
import sys
from itertools import chain
from datasets import load_dataset
from transformers import PreTrainedTokenizerFast

folder, tokenizer_file, output, cache, chunk_size, num_proc = sys.argv[1:]
chunk_size, num_proc = int(chunk_size), int(num_proc)
tokenizer = PreTrainedTokenizerFast(tokenizer_file=tokenizer_file, eos_token="<eos>")

def tokenize(batch):
    ids = tokenizer(batch["text"])["input_ids"]
    return {"input_ids": [row + [tokenizer.eos_token_id] for row in ids]}

def group_texts(batch):
    ids = list(chain(*batch["input_ids"]))
    end = len(ids) // chunk_size * chunk_size
    return {"input_ids": [ids[i : i + chunk_size] for i in range(0, end, chunk_size)]}

if __name__ == "__main__":
    data = load_dataset("json", data_files=folder + "/*.jsonl", split="train", cache_dir=cache)
    both = {"batched": True, "num_proc": num_proc}
    data = data.map(tokenize, remove_columns=data.column_names, **both)
    data = data.map(group_texts, **both)
    data.save_to_disk(output)
    print(len(data) * chunk_size)
"""


@dataclass(frozen=True)
class Options:
    """Time preprocessing against the usual pipeline."""

    text: Path
    """Folder with .jsonl files."""
    tokenizer: Path
    """A tokenizer.json."""
    chunk_size: int = 1024
    """Tokens in a chunk."""
    runs: int = 3
    """Runs of each side."""


@dataclass(frozen=True)
class Result:
    seconds: float
    memory_bytes: int


def main(options: Options, console: Console) -> None:
    num_proc = os.cpu_count() or 1
    peer_python = environment("peer-datasets", PEER_REQUIREMENTS, console)
    results: dict[str, list[Result]] = {"kiem": [], "datasets.map": []}
    for _ in range(options.runs):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, str(ROOT / "preprocess.py"), "--source", str(options.text)]
            command += ["--tokenizer", str(options.tokenizer), "--output-dir", folder]
            command += ["--chunk-size", str(options.chunk_size)]
            results["kiem"].append(timed(command))
        with tempfile.TemporaryDirectory() as folder:
            arguments = [str(options.text), str(options.tokenizer), f"{folder}/out", folder]
            arguments += [str(options.chunk_size), str(num_proc)]
            results["datasets.map"].append(timed([str(peer_python), "-c", PEER, *arguments]))
    table = Table("", "seconds", "min", "max", "peak memory of a process", "ratio")
    medians = {name: statistics.median(r.seconds for r in runs) for name, runs in results.items()}
    for name, runs in results.items():
        seconds = [run.seconds for run in runs]
        memory = max(run.memory_bytes for run in runs)
        cells = (f"{medians[name]:.2f}", f"{min(seconds):.2f}", f"{max(seconds):.2f}")
        ratio = f"{medians['datasets.map'] / medians[name]:.1f}x"
        table.add_row(name, *cells, f"{memory / 1e6:.0f} MB", ratio)
    console.print(table)


def timed(command: list[str]) -> Result:
    """Runs a command to its end; its memory is that of its largest process."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        raise SystemExit(errors.decode())
    return Result(time.perf_counter() - started, usage.ru_maxrss * 1024)


def environment(name: str, requirements: tuple[str, ...], console: Console) -> Path:
    """Returns the Python of an environment with these packages, made if it is not there."""
    folder = ROOT / ".cache" / name
    python = folder / "bin" / "python"
    stamp = folder / "requirements.txt"
    wanted = "\n".join(requirements)
    if not stamp.exists() or stamp.read_text() != wanted:
        console.print(f"making {folder}")
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *requirements], check=True)
        stamp.write_text(wanted)
    return python


if __name__ == "__main__":
    main(tyro.cli(Options), Console())
