"""What the parts of gpu.py share: sizes, made-up data, clocks, and lines of results."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu import add_record, read_records
from torch import Tensor

from kiem.model.config import GEMMA_VOCABULARY, Gemma3Config, describe, preset
from kiem.model.gemma3 import Gemma3
from kiem.parallel.distributed import Distributed
from kiem.planning.time_estimate import GPUS, Gpu

BOS, PAD = 2, 0
_DOCUMENT_TOKENS = 600  # about as many as a page of the Dutch Wikipedia
_TRUE_SIZES = ("gemma3-1b", GEMMA_VOCABULARY, 1024, 16, 16, 512, 64)
_TINY_SIZES = ("gemma3-micro", 1024, 160, 2, 2, 140, 6)


@dataclass(frozen=True)
class Sizes:
    """What is measured: a preset and its vocabulary, the update, and what is decoded."""

    model: str
    vocabulary: int
    chunk_size: int
    batch_size: int
    accumulation: int
    prompt_tokens: int
    new_tokens: int

    @property
    def config(self) -> Gemma3Config:
        """The shape of the model."""
        return preset(self.model, self.vocabulary)


@dataclass(frozen=True)
class Bench:
    """A part at work.

    Attributes:
        part: its name.
        file: where results go.
        folder: for what it writes.
        rehearse: whether this is the CPU, with tiny sizes.
    """

    part: str
    file: Path
    folder: Path
    rehearse: bool

    @property
    def sizes(self) -> Sizes:
        """What is measured."""
        return Sizes(*(_TINY_SIZES if self.rehearse else _TRUE_SIZES))

    @property
    def device(self) -> torch.device:
        """Where it is measured."""
        return torch.device("cpu") if self.rehearse else torch.device("cuda", 0)

    @property
    def card(self) -> str:
        """The name of the device."""
        return "CPU" if self.rehearse else torch.cuda.get_device_name(self.device)

    @property
    def gpu(self) -> Gpu | None:
        """The data sheet of the card, if the plan has one."""
        key = "h100" if self.rehearse else published(self.card)
        return GPUS[key] if key else None

    @property
    def distributed(self) -> Distributed:
        """One process, as training has it; a rehearsal does without bf16, which CPUs emulate."""
        flops = self.gpu.matrix_flops if self.gpu else 1.0
        return Distributed(0, 1, self.device, "fp32" if self.rehearse else "bf16", flops)

    def report(
        self,
        check: str,
        value: float | str,
        unit: str = "",
        *,
        at_most: float | None = None,
        at_least: float | None = None,
        is_speed: bool = False,
        verdict: str | None = None,
        **details: Any,
    ) -> None:
        """Writes down a result.

        Args:
            check: what was looked at.
            value, unit: what was found.
            at_most, at_least: the target, if there is one.
            is_speed: whether missing it means slow, and not wrong.
            verdict: instead of judging the value.
            details: what else goes into the file.
        """
        target = ""
        if verdict is None:
            verdict = "measured"
            if not (is_speed and self.rehearse) and (at_most, at_least) != (None, None):
                reached = value <= at_most if at_most is not None else value >= at_least
                verdict = "ok" if reached else "below" if is_speed else "failed"
        if at_most is not None:
            target = f"at most {at_most:,.6g}"
        if at_least is not None:
            target = f"at least {at_least:,.6g}"
        result = {"part": self.part, "check": check, "value": value, "unit": unit}
        now = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
        machine = {"card": self.card, "torch": f"torch {torch.__version__}", "date": now}
        add_record(
            self.file, {**result, "target": target, "verdict": verdict, **details, **machine}
        )

    def results(self, part: str) -> list[dict[str, Any]]:
        """Returns what another part has found last on the same kind of device."""
        found = read_records(self.file)
        of_part = [r for r in found if (r["part"], r.get("card")) == (part, self.card)]
        return [*{r["check"]: r for r in of_part}.values()]


def published(card: str) -> str | None:
    """Returns the plan's key for a card by its name, such as NVIDIA H100 80GB HBM3."""
    keys = {"A100-SXM4-40GB": "a100-40gb", "A100": "a100", "A10G": "a10g", "L40S": "l40s"}
    keys |= {"H100": "h100", "H200": "h200", "L4": "l4", "3090": "rtx3090", "4090": "rtx4090"}
    return next((key for text, key in keys.items() if text in card), None)


def run_part(*functions: Callable[[Bench], None]) -> None:
    """Runs the part that the command line names, one of the functions."""
    parser = argparse.ArgumentParser()
    parser.add_argument("part", choices=[function.__name__ for function in functions])
    parser.add_argument("file", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rehearse", action="store_true")
    bench = Bench(**vars(parser.parse_args()))
    next(function for function in functions if function.__name__ == bench.part)(bench)


def compile_refusal(device: torch.device) -> str | None:
    """Returns why torch.compile makes no kernels here, or None if it does.

    For a GPU it needs a C compiler and Python's headers once, for triton's launcher.
    """
    try:
        torch.compile(lambda x: (x.sin() + 1).sum())(torch.ones(64, device=device))
    except Exception as error:  # noqa: BLE001 - whatever it is, it is what the report says
        return f"{type(error).__name__}: {first_line(error)}"
    return None


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, which may be empty."""
    return next(iter(str(error).strip().splitlines()), "")


def new_model(bench: Bench) -> Gemma3:
    """Returns a model with random weights, on the device, ready for training."""
    torch.manual_seed(0)
    with bench.device:
        model = Gemma3(bench.sizes.config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02) if parameter.ndim > 1 else parameter.zero_()
    model.model.embed_tokens.adds_to_gradient = True
    return model


def new_peer(bench: Bench, model: Gemma3 | None = None) -> Any:
    """Returns transformers' model of the same shape on the device, with the same weights if any."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig  # seconds, and not always there

    ids = {"bos_token_id": BOS, "eos_token_id": 1, "pad_token_id": PAD}
    config = Gemma3TextConfig(**{**describe(bench.sizes.config, "float32"), **ids})
    with bench.device:
        peer = Gemma3ForCausalLM(config)
    if model is not None:
        missing = peer.load_state_dict(model.state_dict(), strict=False).missing_keys
        assert missing in ([], ["lm_head.weight"])  # tied to the embedding
        peer.tie_weights()
    return peer


def made_up_chunks(sizes: Sizes, num_chunks: int, seed: int = 0) -> np.ndarray:
    """Returns chunks [num_chunks, chunk_size] of random tokens in documents of usual lengths."""
    generator = np.random.default_rng(seed)
    chunks = generator.integers(3, sizes.vocabulary, (num_chunks, sizes.chunk_size), np.int32)
    chunks[generator.random(chunks.shape) < 1 / _DOCUMENT_TOKENS] = BOS
    return chunks


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Returns ||found - expected|| / ||expected||."""
    expected = expected.float()
    return float((found.float() - expected).norm() / expected.norm())


def synchronize(device: torch.device) -> None:
    """Waits until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(
    run: Callable[[], object], device: torch.device, repeats: int = 10, warm_ups: int = 3
) -> float:
    """Returns the median time of a call, after some that do not count."""
    if device.type == "cpu":
        repeats, warm_ups = 2, 1
    for _ in range(warm_ups):
        run()
    times = []
    for _ in range(repeats):
        synchronize(device)
        started = time.perf_counter()
        run()
        synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def peak_bytes(device: torch.device, run: Callable[[], object]) -> int:
    """Returns what a call takes on a GPU beside what is there already; 0 elsewhere."""
    if device.type != "cuda":
        run()
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    return torch.cuda.max_memory_allocated(device) - before
