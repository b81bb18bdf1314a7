"""Efficiency of two single-thread processes against one: the same work for each.

python benchmarks/scaling.py --dataset-path processed_data/own16k
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from peers import machine

ROOT = Path(__file__).resolve().parent.parent
NUM_STEPS = 6
NUM_FIRST_STEPS = 2  # not counted: they fill caches


def tokens_per_second(num_processes: int, options: list[str]) -> float:
    """Returns the median speed of updates, all processes together."""
    with tempfile.TemporaryDirectory() as folder:
        launcher = ["-m", "torch.distributed.run", "--standalone"]
        launcher += [f"--nproc-per-node={num_processes}"]
        command = [sys.executable, *launcher, "training.py", *options, "--output-dir", folder]
        command += ["--run-name", "run", "--eval-steps", "0", "--save-steps", "0"]
        command += ["--minimal-pairs", "never", "--max-steps", f"{NUM_STEPS}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=True)
        text = (Path(folder) / "run" / "metrics.jsonl").read_text(encoding="utf-8")
    updates = [line for line in map(json.loads, text.splitlines()) if "loss" in line]
    return statistics.median(line["tokens_per_second"] for line in updates[NUM_FIRST_STEPS:])


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset-path", required=True)
    parser.add_argument("--model", default="gemma3-nano")
    arguments = parser.parse_args()
    print(f"{machine()}\n")
    options = ["--dataset-path", arguments.dataset_path, "--model", arguments.model]
    options += ["--batch-size", "2", "--gradient-accumulation-steps", "8", "--precision", "fp32"]
    print("| --shard | 1 process, tokens/s | 2 processes, tokens/s | efficiency |")
    print("|---|---|---|---|")
    one = tokens_per_second(1, options)
    for shard in ("none", "optimizer"):
        two = tokens_per_second(2, [*options, "--shard", shard])
        print(f"| {shard} | {one:,.0f} | {two:,.0f} | {two / one / 2:.2f} |", flush=True)


if __name__ == "__main__":
    main()
