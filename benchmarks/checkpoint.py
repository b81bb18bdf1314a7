"""How long saving a checkpoint takes, beside writing as many bytes to the same disk and no more.

python benchmarks/checkpoint.py --model gemma3-270m --folder DISK
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import torch

from kiem.core.files import format_bytes, remove_folder
from kiem.model.config import GEMMA_VOCABULARY, preset
from kiem.model.gemma3 import Gemma3, initialize
from kiem.optim.optimizer import make_optimizers
from kiem.parallel.distributed import Distributed
from kiem.training.checkpoint import save_checkpoint, verify_checkpoint

BLOCK_BYTES = 64 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="gemma3-270m")
    parser.add_argument("--folder", type=Path, default=Path())
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    model = Gemma3(preset(options.model, GEMMA_VOCABULARY))
    initialize(model, 1)
    optimizers = make_optimizers(model, "adamw", 0.1)
    for parameter in model.parameters():  # what a first update leaves, without doing one
        for key in ("exp_avg", "exp_avg_sq"):
            optimizers[0].state[parameter][key] = torch.randn_like(parameter)
        optimizers[0].state[parameter]["step"] = torch.tensor(1.0)
    num_bytes = 12 * model.config.num_parameters()
    print(f"{options.model}: {format_bytes(num_bytes)}")
    distributed = Distributed(0, 1, torch.device("cpu"), "fp32", 1e9)
    ids = {"pad": 0, "eos": 1, "bos": 2}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for step in range(options.rounds):
            seconds = write_plainly(Path(folder) / "plain", num_bytes)
            print(f"plain write and fsync: {seconds:.1f} s")
            began = time.perf_counter()
            path = save_checkpoint(
                Path(folder), model, optimizers, ids, {"step": step, "run": {}}, distributed
            )
            print(f"save: {time.perf_counter() - began:.1f} s")
            if step < options.rounds - 1:
                remove_folder(path)
        began = time.perf_counter()
        verify_checkpoint(path)
        print(f"verify: {time.perf_counter() - began:.1f} s")


def write_plainly(path: Path, num_bytes: int) -> float:
    """Returns the seconds that it takes to write random bytes and wait for the disk."""
    block = os.urandom(BLOCK_BYTES)
    began = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for start in range(0, num_bytes, BLOCK_BYTES):
            file.write(block[: num_bytes - start])
        os.fsync(file.fileno())
    seconds = time.perf_counter() - began
    path.unlink()
    return seconds


if __name__ == "__main__":
    main()
