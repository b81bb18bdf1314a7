"""Whole runs of training.py on a GPU: killed and resumed, in two processes, short of memory; tests.

Run by gpu.py. Small models are trained on chunks of the built-in sample.
"""

from __future__ import annotations

import json
import math
import os
import re
import socket
import subprocess
import sys
import time

from gpu_record import Bench, run_part
from peers import ROOT, make_chunks

_CHUNK_SIZE, _VOCABULARY = 128, 2048
_SAVE_STEPS = 10
_COMPARED_STEPS = 10  # rounding grows from update to update
_REHEARSED_STEPS = 3
_MEMORY_SHARE = 0.25
# More tokens than fit into a quarter of any card's memory without recomputation.
_LARGE_BATCH = 2048
_SHORT_OF_MEMORY = f"""
import sys, torch
from kiem.cli import run
from kiem.config import TrainingOptions
from training import main
if torch.cuda.is_available():
    torch.cuda.set_per_process_memory_fraction({_MEMORY_SHARE})
sys.exit(run(TrainingOptions, "training.py", main, sys.argv[1:]))
"""


class Training:
    """A run of training.py on the chunks, in processes of its own; it starts at once.

    Args:
        bench: the part.
        name: of the run.
        options: of training.py.
        num_processes: how many, all on the same GPU.
        program: what to run in place of training.py.
    """

    def __init__(
        self,
        bench: Bench,
        name: str,
        *options: str,
        num_processes: int = 1,
        program: str | None = None,
    ):
        self.folder = bench.folder / name
        self._log = bench.folder / f"{name}.log"
        self._num_processes = num_processes
        self._command = [sys.executable, *(["-c", program] if program else ["training.py"])]
        self._command += ["--dataset-path", str(bench.folder / "chunks"), "--run-name", name]
        self._command += ["--output-dir", str(bench.folder), "--minimal-pairs", "never"]
        self._command += ["--eval-steps", "0", *options]
        self.start()

    def start(self) -> None:
        """Starts it, or resumes it."""
        places = [{}]
        if self._num_processes > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{free.getsockname()[1]}"}
            for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
                shared[name] = f"{self._num_processes}"
            shared["KIEM_SHARE_GPUS"] = "true"
            ranks = [f"{rank}" for rank in range(self._num_processes)]
            places = [{**shared, "RANK": rank, "LOCAL_RANK": rank} for rank in ranks]
        with self._log.open("ab") as log:
            self._processes = [
                subprocess.Popen(
                    self._command, cwd=ROOT, env={**os.environ, **place}, stdout=log, stderr=log
                )
                for place in places
            ]

    def kill_after(self, step: int) -> None:
        """Kills it as soon as the checkpoint of an update is there."""
        (process,) = self._processes
        while not (self.folder / "checkpoints" / f"step-{step}").exists():
            assert process.poll() is None, f"it ended before it could be killed:\n{self.output()}"
            time.sleep(0.01)
        process.kill()
        process.wait()

    def wait(self) -> None:
        """Waits for its end, which must be a good one."""
        while None in (codes := [process.poll() for process in self._processes]):
            if any(codes):
                break  # the others would wait for it
            time.sleep(0.05)
        assert not any(codes), f"exit codes {codes}:\n{self.output()[-3000:]}"

    def output(self) -> str:
        """Returns what it has printed."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    def losses(self) -> dict[int, float]:
        """Returns the loss of each update."""
        lines = (self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        records = map(json.loads, lines)
        return {record["step"]: record["loss"] for record in records if "loss" in record}


def text(bench: Bench) -> None:
    """Makes the chunks for the other parts."""
    tokenizer = f"train:{_VOCABULARY}"
    folder = make_chunks("sample", tokenizer, _CHUNK_SIZE, bench.folder, "chunks")
    bench.report("chunks of the sample", folder.name, verdict="ok")


def resume(bench: Bench) -> None:
    """A run that is killed and resumed has the losses of one that is not."""
    save_steps = _REHEARSED_STEPS if bench.rehearse else _SAVE_STEPS
    num_steps = 3 * save_steps if bench.rehearse else 12 * save_steps
    options = (*small(bench), "--batch-size", "2" if bench.rehearse else "8")
    options = (*options, "--max-steps", f"{num_steps}", "--save-steps", f"{save_steps}")
    whole, killed = (Training(bench, name, *options) for name in ("whole", "killed"))
    killed.kill_after(save_steps)
    before = max(killed.losses())
    killed.start()
    for run in (whole, killed):
        run.wait()
    expected, found = whole.losses(), killed.losses()
    assert found.keys() == expected.keys(), (sorted(found), sorted(expected))
    gaps = {step: abs(found[step] - expected[step]) for step in expected}
    compared = [gap for step, gap in gaps.items() if step <= before + _COMPARED_STEPS]
    bench.report("losses", max(compared), at_most=1e-3, largest_of_all=max(gaps.values()))


def processes(bench: Bench) -> None:
    """Two processes on one GPU, which talk by gloo, have the losses of one."""
    num_steps = _REHEARSED_STEPS if bench.rehearse else _COMPARED_STEPS
    steps = ("--max-steps", f"{num_steps}", "--save-steps", "0")
    half = 1 if bench.rehearse else 4
    precisions = {"fp32": 1e-4} if bench.rehearse else {"fp32": 1e-4, "bf16": 5e-3}
    started = {}
    for precision in precisions:
        common = (*small(bench), *steps, "--precision", precision)
        alone = Training(bench, f"{precision}-1", *common, "--batch-size", f"{2 * half}")
        for shard in ("none", "optimizer"):
            words = (*common, "--batch-size", f"{half}", "--shard", shard)
            pair = Training(bench, f"{precision}-2-{shard}", *words, num_processes=2)
            started[precision, shard] = alone, pair
    for (precision, shard), (alone, pair) in started.items():
        for run in (alone, pair):
            run.wait()
        gaps = [abs(pair.losses()[step] - loss) for step, loss in alone.losses().items()]
        name = f"losses, {precision}, --shard {shard}"
        bench.report(name, max(gaps), at_most=precisions[precision])


def memory(bench: Bench) -> None:
    """A batch that does not fit into a quarter of the memory is halved until it does."""
    model = "gemma3-micro" if bench.rehearse else "gemma3-270m"
    batch = 4 if bench.rehearse else _LARGE_BATCH
    sizes = ("--batch-size", f"{batch}", "--gradient-accumulation-steps", "1")
    options = ("--model", model, "--max-steps", "2", "--save-steps", "0", *sizes)
    options = (*options, "--activation-checkpointing", "none", "--compile", "never")
    run = Training(bench, "short-of-memory", *options, program=_SHORT_OF_MEMORY)
    run.wait()
    assert all(math.isfinite(loss) for loss in run.losses().values())
    pattern = r"out\s+of\s+memory:[^0-9]*--batch-size\s+(\d+)\s+"
    pattern += r"--gradient-accumulation-steps\s+(\d+)"
    found = [(int(size), int(passes)) for size, passes in re.findall(pattern, run.output())]
    if bench.rehearse:
        return bench.report("passes", "it fits", verdict="measured")
    is_halved = bool(found) and all(size * passes == batch for size, passes in found)
    words = " then ".join(f"{size} x {passes}" for size, passes in found) or "not halved"
    bench.report("passes", words, verdict="ok" if is_halved else "failed")


def tests(bench: Bench) -> None:
    """The tests that need a GPU."""
    files = sorted((ROOT / "tests").glob("test_*.py"))
    files = [file for file in files if "mark.gpu" in file.read_text(encoding="utf-8")]
    if not files:
        return bench.report("pytest -m gpu", "there are none", verdict="left out")
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-W", "default", "-rsfE"]
    command += ["-p", "no:cacheprovider", "--basetemp", str(bench.folder / "pytest")]
    done = subprocess.run(
        [*command, *map(str, files)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    last = done.stdout.strip().splitlines()[-1].strip("= ") if done.stdout.strip() else "nothing"
    good = done.returncode == 0 and ("passed" in last or bench.rehearse)
    tail = (done.stdout + done.stderr)[-6000:]
    bench.report("pytest -m gpu", last, verdict="ok" if good else "failed", output=tail)


def small(bench: Bench) -> tuple[str, ...]:
    """Returns the options of a small model."""
    model = ("--model", "gemma3-micro" if bench.rehearse else "gemma3-nano")
    return (*model, "--gradient-accumulation-steps", "2")


if __name__ == "__main__":
    run_part(text, resume, processes, memory, tests)
