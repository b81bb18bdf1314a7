"""What the benchmarks share: environments for peers, and running kiem as its users do."""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from kiem.core.processors import num_processors
from kiem.model.config import describe, preset

ROOT = Path(__file__).resolve().parent.parent
TRAINER_REQUIREMENTS = (
    "torch==2.13.0",
    "transformers==5.23.0",
    "accelerate==1.15.0",
    "datasets==5.2.0",
)
# Which make a processor seem to be another one.
_IMITATIONS = "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS"


@dataclass(frozen=True)
class Speed:
    """How fast a training went.

    Attributes:
        tokens_per_second: of the median update, the first ones not counted.
        memory_bytes: most memory the process held.
        mfu: share of the matrix peak, where the program says it.
    """

    tokens_per_second: float
    memory_bytes: float
    mfu: float | None = None


def machine() -> str:
    """Returns what all figures depend on: the processor and its kind, as in docs/results.md."""
    found = torch.cpu.get_capabilities()
    given = [name for name in _IMITATIONS if name in os.environ]
    has_amx = found.get("amx_bf16") and not given
    kind = "AMX" if has_amx else torch.backends.cpu.get_cpu_capability()
    imitated = f" ({' '.join(given)} given)" if given else ""
    return (
        f"{num_processors()} cores of {found.get('cpu_name', platform.machine())}, {kind}{imitated}"
    )


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


def run_peer(
    python: Path, script: str, model: str, vocabulary: int, **options: Any
) -> dict[str, Any]:
    """Runs a peer's script on a preset's shape; returns the JSON of its last line.

    Args:
        python: of the peer's environment.
        script: in this folder.
        model, vocabulary: preset, and rows of its embedding.
        options: what else the script asks for.
    """
    ids = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
    options["config"] = {**describe(preset(model, vocabulary), "float32"), **ids}
    command = [str(python), str(ROOT / "benchmarks" / script), json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{script} failed:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def run_script(script: str, *options: str | Path) -> None:
    """Runs one of kiem's scripts."""
    command = [sys.executable, str(ROOT / script), *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{script} failed:\n{done.stdout[-1500:]}{done.stderr[-1500:]}")


def make_chunks(
    text: Path | str, tokenizer: str, chunk_size: int, folder: Path, name: str, *more: str
) -> Path:
    """Returns the chunk directory `name` in a folder, made by preprocess.py if it is not there."""
    data = folder / name
    if not data.exists():
        options = ("--source", text, "--tokenizer", tokenizer, "--chunk-size", str(chunk_size))
        run_script("preprocess.py", *options, *more, "--output-dir", folder, "--name", name)
    return data


def training_speed(run: Path, uncounted: int) -> Speed:
    """Returns the speed of a run of training.py, from its log, without so many first updates."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    updates = [line for line in lines if "loss" in line]
    settled = updates[uncounted:] or updates
    return Speed(
        statistics.median(update["tokens_per_second"] for update in settled),
        updates[-1]["memory_bytes"],
        statistics.median(update["mfu"] for update in settled),
    )
