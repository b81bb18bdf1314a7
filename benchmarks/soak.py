"""A long run of a small model, watched from outside: memory, descriptors and files must not grow.

python benchmarks/soak.py --minutes 60
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil

ROOT = Path(__file__).resolve().parent.parent
SECONDS_BETWEEN_LOOKS = 2.0
# Caches fill up at first.
WARM_UP_SHARE = 0.2
MOST_MB_PER_1000_STEPS = 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    minutes = parser.parse_args().minutes
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder)
        sample = ["--source", "sample", "--tokenizer", "train:600", "--chunk-size", "32"]
        words = ["preprocess.py", *sample, "--output-dir", str(output), "--name", "chunks"]
        subprocess.run([sys.executable, *words], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        words = ["training.py", "--dataset-path", str(output / "chunks"), "--model", "gemma3-micro"]
        words += ["--output-dir", str(output), "--run-name", "run", "--batch-size", "1"]
        words += ["--gradient-accumulation-steps", "1", "--max-minutes", str(minutes)]
        words += ["--save-steps", "200", "--eval-steps", "500", "--eval-chunks", "4"]
        program = subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=subprocess.DEVNULL)
        looks = watch(program, output / "run")
        num_saves = last_step(output / "run") // 200
        assert program.returncode == 0
    judge(np.array(looks[int(len(looks) * WARM_UP_SHARE) :]), num_saves)


def watch(program: subprocess.Popen[bytes], run: Path) -> list[tuple[int, float, int, int]]:
    """Returns (step, MB of memory, open descriptors, files of the run) again and again."""
    process, looks = psutil.Process(program.pid), []
    while program.poll() is None:
        time.sleep(SECONDS_BETWEEN_LOOKS)
        step = last_step(run)
        try:
            # In the middle of a save or at the end it is another state.
            if step and not (run / "final_model").exists() and not list(run.rglob(".*")):
                memory = process.memory_info().rss / 1e6
                looks.append((step, memory, process.num_fds(), len(list(run.rglob("*")))))
        except (psutil.NoSuchProcess, FileNotFoundError):
            continue
    return looks


def last_step(run: Path) -> int:
    """Returns the step of the last whole line of the log."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return 0
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4000))
        for line in reversed(file.read().splitlines()[1:]):
            try:
                return int(json.loads(line)["step"])
            except ValueError:
                continue
    return 0


def judge(looks: np.ndarray, num_saves: int) -> None:
    steps, memory, descriptors, files = looks.T
    slope = np.polyfit(steps / 1000, memory, 1)[0]
    print(f"steps {steps[0]:.0f} to {steps[-1]:.0f}, {len(looks)} looks, {num_saves} checkpoints")
    print(f"memory {memory[0]:.1f} MB at first, {memory[-1]:.1f} MB at last")
    print(f"slope {slope:.3f} MB per 1000 steps (limit {MOST_MB_PER_1000_STEPS})")
    print(f"descriptors {descriptors.min():.0f} to {descriptors.max():.0f}")
    print(f"files {files.min():.0f} to {files.max():.0f}")
    half = len(looks) // 2
    grows = [of[half:].max() > of[:half].max() for of in (descriptors, files)]
    sys.exit(1 if slope >= MOST_MB_PER_1000_STEPS or any(grows) else 0)


if __name__ == "__main__":
    main()
