"""What training.py --plan predicts on this machine, beside what the training then takes.

python benchmarks/plan.py --dataset-path processed_data/own16k
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from peers import machine

ROOT = Path(__file__).resolve().parent.parent
# Model, batch size, activation checkpointing.
CASES = (
    ("gemma3-micro", 2, "none"),
    ("gemma3-micro", 8, "none"),
    ("gemma3-micro", 8, "full"),
    ("gemma3-nano", 1, "none"),
    ("gemma3-nano", 8, "none"),
    ("gemma3-nano", 8, "selective"),
    ("gemma3-nano", 8, "full"),
)
NUM_STEPS = 8
NUM_FIRST_STEPS = 2  # not counted: they fill caches
# In a process of its own, as a plan is made.
PLAN = """
import json, sys
from rich.console import Console
from kiem.cli import parse
from kiem.config import TrainingOptions
from kiem.parallel.distributed import init_distributed
from kiem.planning.memory_estimate import estimate_memory
from kiem.planning.print_plan import make_plan
options = parse(TrainingOptions, sys.argv[1:], "plan")
with init_distributed(options.precision) as devices:
    plan = make_plan(options, devices, Console(stderr=True))
num_bytes = estimate_memory(plan.setting).total + plan.program_bytes
print(json.dumps([num_bytes, plan.tokens_per_step / plan.step_seconds]))
"""


def predict(options: list[str]) -> tuple[float, float]:
    """Returns bytes and tokens per second as planned."""
    command = [sys.executable, "-c", PLAN, *options]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=True)
    num_bytes, speed = json.loads(done.stdout.splitlines()[-1])
    return num_bytes, speed


def measure(options: list[str]) -> tuple[float, float]:
    """Returns the peak in bytes of the whole run, and tokens per second of its later updates."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "training.py", *options, "--output-dir", folder]
        command += ["--run-name", "run", "--eval-steps", "0", "--save-steps", "0"]
        command += ["--minimal-pairs", "never"]
        subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=True)
        text = (Path(folder) / "run" / "metrics.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    num_bytes = max(line.get("memory_bytes", 0) for line in lines)
    updates = [line for line in lines if "loss" in line]
    speeds = [line["tokens_per_second"] for line in updates[NUM_FIRST_STEPS:]]
    return num_bytes, statistics.median(speeds)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset-path", required=True)
    parser.add_argument("--options", nargs=argparse.REMAINDER, default=[], help="for training.py")
    arguments = parser.parse_args()
    print(f"{machine()}\n")
    print("| model | batch | checkpointing | memory: plan | found | | tokens/s: plan | found | |")
    print("|---|---|---|---|---|---|---|---|---|")
    for model, batch_size, checkpointing in CASES:
        options = ["--dataset-path", arguments.dataset_path, "--model", model]
        options += ["--batch-size", f"{batch_size}", "--gradient-accumulation-steps", "2"]
        options += ["--activation-checkpointing", checkpointing, "--max-steps", f"{NUM_STEPS}"]
        options += arguments.options
        planned_bytes, planned_speed = predict(options)
        found_bytes, found_speed = measure(options)
        bytes_error, speed_error = planned_bytes / found_bytes - 1, planned_speed / found_speed - 1
        print(
            f"| {model} | {batch_size} | {checkpointing} "
            f"| {planned_bytes / 1e6:,.0f} MB | {found_bytes / 1e6:,.0f} MB | {bytes_error:+.0%} "
            f"| {planned_speed:,.0f} | {found_speed:,.0f} | {speed_error:+.0%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
