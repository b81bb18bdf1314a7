"""Preprocessing side by side with the usual pipeline: datasets.map and group_texts.

    python benchmarks/preprocessing.py --text FOLDER --tokenizer tokenizer.json

Both read the same JSON Lines files, with the same tokenizer and as many processes as there are
cores, from the start of the program to chunks on the disk. They take turns; the first table has
each side's median and the ratio of the medians. The peer runs in an environment of its own, which
is made on first use.

The second table shows how kiem grows with the text: the same files several times over, whose
difference to one time is the speed once all is loaded, and single documents of many megabytes.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
from peers import ROOT, environment, machine
from rich.console import Console
from rich.table import Table

from kiem import cli
from kiem.core.processors import num_processors

PEER_REQUIREMENTS = ("datasets==5.2.0", "transformers==5.23.0")
_SAMPLE_SECONDS = 0.25
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
    copies: int = 10
    """How many times over the text is given for the second table."""
    long_documents: tuple[int, ...] = (25, 50, 100)
    """Megabytes of the single documents for the second table."""


@dataclass(frozen=True)
class Result:
    """What a run took.

    Attributes:
        seconds: from start to end.
        memory_bytes: most memory of all its processes together, of which shared memory counts once;
            0 if that was not watched.
    """

    seconds: float
    memory_bytes: int


def main(options: Options, console: Console) -> None:
    console.print(machine())
    console.print(side_by_side(options, console))
    with tempfile.TemporaryDirectory() as folder:
        console.print(growth(options, Path(folder)))


def side_by_side(options: Options, console: Console) -> Table:
    num_proc = num_processors()
    peer_python = environment("peer-datasets", PEER_REQUIREMENTS, console)
    results: dict[str, list[Result]] = {"kiem": [], "datasets.map": []}
    for run in range(options.runs + 1):
        watch = run == options.runs  # in a run of its own, since it takes time
        results["kiem"].append(run_kiem(options, options.text, watch)[0])
        with tempfile.TemporaryDirectory() as folder:
            arguments = [str(options.text), str(options.tokenizer), f"{folder}/out", folder]
            arguments += [str(options.chunk_size), str(num_proc)]
            results["datasets.map"].append(timed([str(peer_python), "-c", PEER, *arguments], watch))
    table = Table("", "seconds", "min", "max", "peak memory", "ratio")
    seconds_of = {name: [run.seconds for run in runs[:-1]] for name, runs in results.items()}
    medians = {name: statistics.median(seconds) for name, seconds in seconds_of.items()}
    for name, seconds in seconds_of.items():
        cells = (f"{medians[name]:.2f}", f"{min(seconds):.2f}", f"{max(seconds):.2f}")
        ratio = f"{medians['datasets.map'] / medians[name]:.1f}x"
        table.add_row(name, *cells, megabytes(results[name][-1]), ratio)
    return table


def growth(options: Options, folder: Path) -> Table:
    table = Table("", "seconds", "tokens", "peak memory")
    files = sorted(options.text.glob("*.jsonl"))
    copies = folder / "copies"
    copies.mkdir()
    for number in range(options.copies):
        for file in files:
            shutil.copy(file, copies / f"{number}-{file.name}")
    sources = {"once": options.text, f"{options.copies} times": copies}
    text = "\n\n".join(json.loads(line)["text"] for file in files for line in file.open("rb"))
    rest = [json.dumps({"text": f"Een korte tekst, nummer {n}."}) for n in range(1000)]
    for size in options.long_documents:
        document = (text * (1 + size * 1_000_000 // len(text)))[: size * 1_000_000]
        file = folder / f"long{size}.jsonl"
        file.write_text("\n".join([json.dumps({"text": document}), *rest]))
        sources[f"a document of {size} MB"] = file
    found = {}
    for name, source in sources.items():
        seconds, num_tokens = run_kiem(options, source, watch_memory=False)
        memory, _ = run_kiem(options, source, watch_memory=True)
        found[name] = (seconds.seconds, num_tokens)
        table.add_row(name, f"{seconds.seconds:.2f}", f"{num_tokens:,}", megabytes(memory))
    (once, tokens_once), (often, tokens_often), *_ = found.values()
    rate = (tokens_often - tokens_once) / (often - once) / (num_processors())
    table.caption = f"beyond the first time: {rate:,.0f} tokens/s per core"
    return table


def run_kiem(options: Options, source: Path, watch_memory: bool) -> tuple[Result, int]:
    """Preprocesses `source` and returns how that went, and the number of tokens."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "preprocess.py"), "--source", str(source)]
        command += ["--tokenizer", str(options.tokenizer), "--output-dir", folder, "--name", "out"]
        result = timed([*command, "--chunk-size", str(options.chunk_size)], watch_memory)
        manifest = json.loads(Path(folder, "out", "manifest.json").read_bytes())
    return result, sum(split["tokens"] for split in manifest["splits"].values())


def megabytes(result: Result) -> str:
    return f"{result.memory_bytes / 1e6:.0f} MB"


def timed(command: list[str], watch_memory: bool) -> Result:
    """Runs a command to its end."""
    started = time.perf_counter()
    process = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    most = 0
    while watch_memory and process.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess):
            family = [process, *process.children(recursive=True)]
            most = max(most, sum(member.memory_full_info().pss for member in family))
        with contextlib.suppress(psutil.TimeoutExpired):
            process.wait(_SAMPLE_SECONDS)
    errors = process.stderr.read()
    process.wait()
    seconds = time.perf_counter() - started
    if process.returncode != 0:
        raise SystemExit(errors.decode())
    return Result(seconds, most)


if __name__ == "__main__":
    sys.exit(cli.run(Options, __file__, main))
