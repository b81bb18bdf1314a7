"""Training speed and memory side by side with transformers' Trainer and litgpt's model.

    python benchmarks/training.py --text FOLDER --gemma-tokenizer tokenizer.json

small: gemma3-nano with a vocabulary of 16 384 of its own, updates of 8 chunks of 512 tokens.
1b: gemma3-1b with Gemma's vocabulary, updates of 4 passes of one chunk of 1024 tokens, where
activations are computed again, by kiem the cheap ones; it needs 20 GB of memory.
memory: gemma3-nano with each kind of activation checkpointing.

The sides take turns, each in processes of its own; a side's figure is the best of its runs, and
each run's that of its median update. Both train on the same chunks. Peers run in environments of
their own, which are made on first use.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from peers import (
    TRAINER_REQUIREMENTS,
    Speed,
    environment,
    machine,
    make_chunks,
    run_peer,
    run_script,
    training_speed,
)
from rich.console import Console
from rich.table import Table

from kiem import cli
from kiem.model.config import GEMMA_VOCABULARY

_SMALL_VOCABULARY = 16_384
_LITGPT_REQUIREMENTS = ("torch==2.13.0", "litgpt==0.5.13")
_MORE_CHUNKS = 16


@dataclass(frozen=True)
class Options:
    """Time training against other programs."""

    text: Path
    """Folder with .jsonl files."""
    gemma_tokenizer: Path | None = None
    """Gemma's tokenizer.json; for 1b."""
    cases: tuple[Literal["small", "1b", "memory"], ...] = ("small", "memory", "1b")
    """What to measure."""
    peer: tuple[Literal["transformers", "litgpt"], ...] = ("transformers", "litgpt")
    """Whom to compare with; litgpt in the small case only."""
    precisions: tuple[Literal["bf16", "fp32"], ...] = ("bf16", "fp32")
    """In which precisions; bf16 is kiem's own choice where that is faster."""
    adamw: bool = False
    """Let kiem also run with the peers' optimizer instead of Muon, its own choice."""
    runs: int = 3
    """Runs of each side."""
    steps: int = 12
    """Updates of a run, of which the first two do not count; in the 1b case two, one counts."""


@dataclass(frozen=True)
class Case:
    """What is trained.

    Attributes:
        model: preset.
        vocabulary: rows of the embedding.
        data: chunk directory.
        chunk_size, batch_size, accumulation: tokens, chunks and passes.
        recompute: whether activations are computed again.
        steps: updates.
        uncounted: how many of them are left out at first.
    """

    model: str
    vocabulary: int
    data: Path
    chunk_size: int
    batch_size: int
    accumulation: int
    recompute: bool
    steps: int
    uncounted: int = 2

    def kiem(self, folder: Path, *options: str) -> Speed:
        """Runs training.py and returns its speed."""
        with tempfile.TemporaryDirectory(dir=folder) as output:
            run_script(
                "training.py",
                *("--dataset-path", self.data, "--output-dir", output, "--run-name", "run"),
                *("--model", self.model, "--max-steps", str(self.steps), "--compile", "always"),
                *("--batch-size", str(self.batch_size), "--save-steps", "0", "--eval-steps", "0"),
                *("--gradient-accumulation-steps", str(self.accumulation)),
                *("--minimal-pairs", "never", *options),
            )
            return training_speed(Path(output, "run"), self.uncounted)

    def peer(self, python: Path, script: str, folder: Path, bf16: bool) -> Speed:
        """Runs a peer and returns its speed."""
        result = run_peer(
            python,
            script,
            self.model,
            self.vocabulary,
            data=str(self.data),
            output=str(folder / "peer"),
            chunk_size=self.chunk_size,
            batch_size=self.batch_size,
            accumulation=self.accumulation,
            checkpointing=self.recompute,
            steps=self.steps,
            uncounted=self.uncounted,
            bf16=bf16,
        )
        return Speed(result["tokens_per_second"], result["memory_bytes"])


def main(options: Options, console: Console) -> None:
    console.print(machine())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "small" in options.cases or "memory" in options.cases:
            data = make_chunks(options.text, f"train:{_SMALL_VOCABULARY}", 512, folder, "small")
            small = Case("gemma3-nano", _SMALL_VOCABULARY, data, 512, 8, 1, False, options.steps)
        if "small" in options.cases:
            console.print(side_by_side(small, options, folder, console))
        if "memory" in options.cases:
            console.print(activation_memory(small, folder))
        if "1b" in options.cases:
            if options.gemma_tokenizer is None:
                raise SystemExit("1b needs --gemma-tokenizer")
            data = make_chunks(options.text, str(options.gemma_tokenizer), 1024, folder, "1b")
            large = Case("gemma3-1b", GEMMA_VOCABULARY, data, 1024, 1, 4, True, 2, uncounted=1)
            console.print(side_by_side(large, options, folder, console))


def side_by_side(case: Case, options: Options, folder: Path, console: Console) -> Table:
    recompute = ("--activation-checkpointing", "selective" if case.recompute else "none")
    sides: dict[str, Callable[[], Speed]] = {}
    for precision in options.precisions:
        words = (*recompute, "--precision", precision)
        sides[f"kiem, {precision}"] = partial(case.kiem, folder, *words)
        if options.adamw:
            words = (*words, "--optimizer", "adamw")
            sides[f"kiem, {precision}, AdamW"] = partial(case.kiem, folder, *words)
    peers = []
    if "transformers" in options.peer:
        python = environment("peer-transformers", TRAINER_REQUIREMENTS, console)
        peers.append(("Trainer", python, "trainer_peer.py"))
    if "litgpt" in options.peer and not case.recompute:
        python = environment("peer-litgpt", _LITGPT_REQUIREMENTS, console)
        peers.append(("litgpt", python, "litgpt_peer.py"))
    for name, python, script in peers:
        for precision in options.precisions:
            is_bf16 = precision == "bf16"
            sides[f"{name}, {precision}"] = partial(case.peer, python, script, folder, is_bf16)
    speeds: dict[str, list[Speed]] = {name: [] for name in sides}
    for run in range(options.runs):
        for name, measure in sides.items():
            speeds[name].append(measure())
            console.print(f"run {run + 1}, {name}: {speeds[name][-1].tokens_per_second:,.1f}")
    best = {
        name: max(runs, key=lambda speed: speed.tokens_per_second) for name, runs in speeds.items()
    }
    title = f"{case.model}, {case.accumulation} x {case.batch_size} x {case.chunk_size} tokens"
    ratios = [f"kiem's speed in {precision} to its" for precision in options.precisions]
    table = Table("", "tokens/s", "MFU", "peak memory", *ratios, title=title)
    for name, speed in best.items():
        table.add_row(
            name,
            f"{speed.tokens_per_second:,.1f}",
            f"{speed.mfu:.0%}" if speed.mfu is not None else "",
            f"{speed.memory_bytes / 1e9:.1f} GB",
            *(
                f"{best[f'kiem, {precision}'].tokens_per_second / speed.tokens_per_second:.2f}x"
                for precision in options.precisions
            ),
        )
    return table


def activation_memory(case: Case, folder: Path) -> Table:
    """What a token's activations take: more chunks in a pass, and by how much the peak rises."""
    table = Table("", "tokens/s", "peak memory", "per token", title=f"{case.model}, activations")
    for kind in ("none", "selective", "full"):
        option = ("--activation-checkpointing", kind)
        speed = case.kiem(folder, *option)
        more = case.kiem(folder, *option, "--batch-size", str(_MORE_CHUNKS))
        num_tokens = (_MORE_CHUNKS - case.batch_size) * case.chunk_size
        per_token = (more.memory_bytes - speed.memory_bytes) / num_tokens
        memory = f"{speed.memory_bytes / 1e9:.2f} GB"
        table.add_row(kind, f"{speed.tokens_per_second:,.0f}", memory, f"{per_token / 1e3:.1f} kB")
    return table


if __name__ == "__main__":
    sys.exit(cli.run(Options, __file__, main))
