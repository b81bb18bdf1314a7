"""Training processes that start fast, to be killed by the hundred.

One process imports all that training needs and forks for every start, so that a life costs tenths
of a second. What runs in the fork is what `python training.py` runs.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from conftest import ROOT

from kiem.core.errors import ExitCode
from kiem.training.checkpoint import list_checkpoints

SCALE = float(os.environ.get("KIEM_CHAOS_SCALE", "0.1"))
OPTIONS = (
    *("--model", "gemma3-micro", "--max-steps", "12", "--save-steps", "3", "--eval-steps", "5"),
    *("--precision", "fp32", "--minimal-pairs", "never", "--batch-size", "2"),
    *("--gradient-accumulation-steps", "1", "--sample-prompt"),
)
# A save is short: the first of so many interruptions waits for one, which takes about so long.
_INTERRUPTIONS_PER_SAVE = 4
_SAVE_SECONDS = 0.03
_TIMES = ("seconds", "tokens_per_second", "memory_bytes", "mfu")
_SERVER = """
import json, os, sys
import torch
import kiem.training.loop
from kiem.cli import run
from kiem.config import TrainingOptions
from kiem.parallel import distributed as devices
from training import main

devices.measure_matrix_flops = lambda *_: 1e11  # it takes longer than the rest of a life
print(0, flush=True)
for line in sys.stdin:
    order = json.loads(line)
    if "wait" in order:
        print(os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1]), flush=True)
        continue
    pid = os.fork()
    if pid == 0:
        os.setsid()
        os.dup2(os.open(order["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
        os.dup2(1, 2)
        os.environ.update(order["env"])
        try:
            exec(order["patch"])
            code = run(TrainingOptions, "training.py", main, order["arguments"])
        except BaseException:
            import traceback
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(pid, flush=True)
"""


def chaos(name: str) -> random.Random:
    """Returns the random numbers of a test; the same again with the seed that is printed."""
    seed = os.environ.get("KIEM_CHAOS_SEED", "0")
    print(f"KIEM_CHAOS_SEED={seed}")
    return random.Random(f"{seed}{name}")


class Lives:
    """Starts training on a chunk directory, any number of times.

    Args:
        chunks: the chunk directory.
        folder: what the processes say is written here.
    """

    def __init__(self, chunks: Path, folder: Path):
        self._chunks = chunks
        self.log = folder / "output.txt"
        self._server = subprocess.Popen(
            [sys.executable, "-c", _SERVER],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._answer()

    def start(self, output: Path, *more: str, processes: int = 1, patch: str = "") -> list[int]:
        """Starts one training, of one process or several, and returns their ids.

        `patch` is Python that each runs first, to bring about what does not happen by itself.
        """
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        arguments = ["--dataset-path", str(self._chunks), "--output-dir", str(output)]
        arguments += ["--run-name", "run", *OPTIONS, *more]
        return [
            self._ask(
                {
                    "arguments": arguments,
                    "output": str(self.log),
                    "patch": patch,
                    "env": {
                        **{"RANK": str(rank), "LOCAL_RANK": str(rank)},
                        **{"WORLD_SIZE": str(processes), "MASTER_PORT": port},
                        "MASTER_ADDR": "127.0.0.1",
                    },
                }
            )
            for rank in range(processes)
        ]

    def wait(self, pids: list[int]) -> list[int]:
        """Waits for the end of processes and returns their exit codes, negative for signals."""
        return [self._ask({"wait": pid}) for pid in pids]

    def run(self, output: Path, *more: str, **how: Any) -> list[int]:
        """Starts a training, waits for its end and returns the exit codes."""
        return self.wait(self.start(output, *more, **how))

    def run_until(self, step: int, output: Path, *more: str, processes: int) -> list[int]:
        """Starts a training that is asked to stop when a step's checkpoint is there, as `run`."""
        pids = self.start(output, *more, processes=processes)
        path = output / "run" / "checkpoints" / f"step-{step}"
        while not path.exists():
            time.sleep(0.005)
        for pid in pids:
            os.kill(pid, signal.SIGTERM)
        return self.wait(pids)

    def close(self) -> None:
        """Ends the server."""
        self._server.communicate(timeout=60)

    def _ask(self, order: dict[str, Any]) -> int:
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(order) + "\n")
        self._server.stdin.flush()
        return self._answer()

    def _answer(self) -> int:
        assert self._server.stdout is not None
        return int(self._server.stdout.readline())


def outcome(run: Path) -> dict[str, Any]:
    """Returns all that must be the same whatever happened to a run: hashes, and the log's figures.

    Times and memory are left out, and what was said about the interruptions.
    """
    last = list_checkpoints(run / "checkpoints")[-1]
    files = [*last.glob("*.safetensors"), run / "final_model" / "model.safetensors"]
    state = json.loads((last / "state.json").read_text())
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {
        **{f"{f.parent.name}/{f.name}": hashlib.sha256(f.read_bytes()).hexdigest() for f in files},
        "state": {name: v for name, v in state["run"].items() if name not in _TIMES},
        "checkpoints": [path.name for path in list_checkpoints(run / "checkpoints")],
        "metrics": [
            {name: value for name, value in line.items() if name not in _TIMES}
            for line in lines
            if "warning" not in line
        ],
    }


def leftovers(run: Path) -> list[str]:
    """Returns what is in a run directory that should not be there."""
    return [str(path.relative_to(run)) for path in run.rglob(".*")]


def wait_for_a_save(run: Path, seconds: float) -> None:
    """Returns when a checkpoint is being written, or after so many seconds."""
    ends = time.monotonic() + seconds
    for is_wanted in (False, True):  # what an earlier kill left must go first
        while any((run / "checkpoints").glob(".step-*")) != is_wanted and time.monotonic() < ends:
            time.sleep(0.001)


def interrupt_often(
    lives: Lives,
    output: Path,
    expected: dict[str, Any],
    num: int,
    chance: random.Random,
    **how: Any,
) -> dict[str, int]:
    """Interrupts trainings at random moments until it has happened `num` times.

    Args:
        lives: starts them.
        output: where the runs go.
        expected: the outcome of an undisturbed run; each run must have it in the end.
        num: interruptions.
        chance: the random numbers.
        how: `signals` to choose from, `processes`, `options`, `seconds` that an undisturbed run
            takes.

    Returns:
        How many interruptions came in the middle of a save, and how many runs came to their end.
    """
    counts = {"interruptions": 0, "in a save": 0, "finished": 0}
    while True:
        pids = lives.start(output, *how["options"], processes=how["processes"])
        is_over = counts["interruptions"] == num
        if not is_over:
            waits = counts["interruptions"] % _INTERRUPTIONS_PER_SAVE == 0
            is_first_in_save = waits and counts["in a save"] == 0  # this one must not miss it
            if waits:
                wait_for_a_save(output / "run", how["seconds"])
            seconds = _SAVE_SECONDS if waits else how["seconds"]
            time.sleep(0 if is_first_in_save else chance.uniform(0, seconds))
            number = chance.choice(how["signals"])
            is_kill = number == signal.SIGKILL
            takes_one = is_kill and not is_first_in_save and chance.random() < 0.5
            victims = [chance.choice(pids)] if takes_one else pids
            for pid in victims:
                os.kill(pid, number)  # its parent has not waited, so the id is still its own
        codes = lives.wait(pids)
        if (output / "run" / "final_model").exists():  # also if the kill came just behind it
            counts["interruptions"] += codes != [0] * how["processes"]
            counts["finished"] += 1
            assert outcome(output / "run") == expected
            assert codes != [0] * how["processes"] or leftovers(output / "run") == []
            shutil.rmtree(output / "run")
            if is_over:
                return counts
            continue
        assert not is_over, lives.log.read_text()[-3000:]
        counts["interruptions"] += 1
        counts["in a save"] += any((output / "run" / "checkpoints").glob(".step-*"))
        if not is_kill:
            # Before the first update there is nothing to save, and the signal does what it does.
            early = {-int(number), ExitCode.INTERRUPTED}
            lost = ExitCode.PROCESS_LOST
            assert set(codes) <= {int(ExitCode.STOPPED), *early, lost, 1}, (codes, number)
