"""Recipes of training against a base: bits per byte after as many updates, with their noise.

    python benchmarks/recipe.py --text FOLDER --variants schedule=wsd share=0.85,learning_rate=6e-3

A variant is its changes, joined by commas: options of training.py, settings of the optimizer in
recipe_candidates.py, which then takes the place of kiem's, and `share`: of the updates. One that is
no worse than the base with a share of 0.85 reaches its quality in 15 % fewer updates. (Values along
a run do not tell: the learning rate has not fallen yet.)

All variants train the same shape on the same text. Runs of one seed have the same first weights and
read the same batches, so they are compared in pairs. Each finished run is a line of --runs, and a
second start does only those that are missing. A line counts as long as text, options and the code
that updates weights are the same. An update's cost is processor time, and no result depends on a
clock, so other programs may run beside it.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from peers import ROOT, machine, make_chunks
from recipe_candidates import Settings, Trial
from rich.console import Console
from rich.table import Table

from kiem import cli
from kiem.config import TrainingOptions
from kiem.core.errors import bad_option
from kiem.core.values import option_types
from kiem.data.chunks import read_manifest
from kiem.evaluation.significance import compare
from kiem.model.config import preset
from kiem.parallel.distributed import Distributed, init_distributed
from kiem.planning.memory_estimate import setting_of
from kiem.planning.recipe import resolve_recipe
from kiem.training.loop import train_updates
from kiem.training.setup import setup
from kiem.training.validation import evaluate

Size = Literal["tiny", "small", "nano"]
DEFAULT = "default"  # the variant without a change
_EVALUATION_TOKENS = 32_768
# What a result follows from besides shape and text: code, and defaults of options.
_CODE = ("kiem/optim/muon.py", "kiem/optim/optimizer.py", "kiem/optim/step.py")
_CANDIDATES = "benchmarks/recipe_candidates.py"
_OPTIONS = (
    *("optimizer", "schedule", "warmup_ratio", "weight_decay"),
    *("max_grad_norm", "z_loss", "spike_sigmas", "document_mask"),
)


@dataclass(frozen=True)
class Options:
    """Compare recipes of training."""

    text: Path
    """Folder with .jsonl files to train on."""
    runs: Path = Path("recipe_runs.jsonl")
    """File of finished runs."""
    chunks: Path = Path("processed_data")
    """Folder of the chunk directories, which are made when they are not there."""
    variants: tuple[str, ...] = ()
    """What to compare with the base."""
    base: str = DEFAULT
    """Variant to compare with, such as learning_rate=1.6e-2."""
    sizes: tuple[Size, ...] = ("small",)
    """small: gemma3-micro with a vocabulary of 4096, 2 million parameters. nano: gemma3-nano with
    16 384, 9.9 million. tiny: for tests."""
    updates: tuple[int, ...] = (500,)
    """Lengths of runs."""
    seeds: tuple[int, ...] = (0, 1, 2, 3)
    """Seeds of runs."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """As for training.py."""
    only_compare: bool = False
    """Compare finished runs, and do no others."""


@dataclass(frozen=True)
class Shape:
    """A model, the text as it reads it, and the chunks of an update."""

    model: Literal["gemma3-micro", "gemma3-nano"]
    vocabulary: int
    chunk_size: int
    chunks_per_update: int


SHAPES: dict[Size, Shape] = {
    "tiny": Shape("gemma3-micro", 512, 32, 2),
    "small": Shape("gemma3-micro", 4096, 128, 8),
    "nano": Shape("gemma3-nano", 16_384, 512, 4),
}


@dataclass(frozen=True)
class Key:
    """What the result of a run follows from.

    Attributes:
        size: of the model.
        updates: of the base; the variant may have a share of them.
        variant, seed, precision: of this run.
        learning_rate: the highest, chosen or by default.
        text, code: hashes.
    """

    size: str
    updates: int
    variant: str
    seed: int
    precision: str
    learning_rate: float
    text: str
    code: str


def main(options: Options, console: Console) -> None:
    torch.set_num_threads(1)  # so that processor time does not contain waiting
    console.print(machine())
    with init_distributed(options.precision) as distributed:
        for size in options.sizes:
            data = make_data(SHAPES[size], options)
            for updates in options.updates:
                results = run_all(options, size, updates, data, distributed)
                title = f"{size}, {updates:,} updates; differences ± standard error"
                console.print(side_by_side(results, options.base, title))


def make_data(shape: Shape, options: Options) -> Path:
    """Returns the chunk directory, made if it is not there."""
    name = f"recipe-{shape.vocabulary}-{shape.chunk_size}"
    tokenizer, more = f"train:{shape.vocabulary}", ("--test-split", "0.01")
    return make_chunks(options.text, tokenizer, shape.chunk_size, options.chunks, name, *more)


def run_all(
    options: Options, size: Size, updates: int, data: Path, distributed: Distributed
) -> dict[str, dict[int, dict[str, Any]]]:
    """Returns the results of each variant by seed, and does the runs that are missing."""
    results: dict[str, dict[int, dict[str, Any]]] = {}
    text = text_hash(data)
    for seed in options.seeds:  # all variants with one seed, then the next: they can be compared
        for variant in dict.fromkeys((options.base, *options.variants)):
            rate = learning_rate(SHAPES[size], variant, data, distributed)
            run = (size, updates, variant, seed, distributed.precision, rate)
            key = Key(*run, text, code_hash(variant))
            result = finished(options.runs).get(key)
            if result is None and not options.only_compare:
                result = train(key, data, distributed)
                with options.runs.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({**dataclasses.asdict(key), **result}) + "\n")
            if result is not None:
                results.setdefault(variant, {})[seed] = result
    return results


def finished(path: Path) -> dict[Key, dict[str, Any]]:
    """Returns the results in a file of runs, which need not be there."""
    found = {}
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        line = json.loads(text)
        key = Key(**{field.name: line.pop(field.name) for field in dataclasses.fields(Key)})
        found[key] = line
    return found


def train(key: Key, data: Path, distributed: Distributed) -> dict[str, Any]:
    """Trains, and returns bits per byte on test chunks and the processor time of an update."""
    shape = SHAPES[key.size]  # type: ignore[index]
    _, settings, share = read_variant(key.variant)
    with tempfile.TemporaryDirectory() as folder:
        options = replace(
            training_options(shape, key.variant, data),
            output_dir=Path(folder),
            max_steps=round(share * key.updates),
            seed=key.seed,
        )
        with setup(options, distributed, Console(quiet=True)) as (run, state):
            if settings:
                run = replace(run, optimizers=[Trial(run, Settings(**settings))])
            started = time.process_time()
            state = train_updates(run, state)
            seconds = (time.process_time() - started) / state.step
            max_chunks = _EVALUATION_TOKENS // shape.chunk_size
            figures = evaluate(run, run.model.module, max_chunks)
    return {
        "bpb": round(figures["test_bpb"], 6),
        "milliseconds_per_update": round(1000 * seconds, 1),
        "skipped": state.num_skipped,
    }


def training_options(shape: Shape, variant: str, data: Path) -> TrainingOptions:
    """Returns a variant's options, but for length, seed and place."""
    options = TrainingOptions(
        dataset_path=(data,),
        run_name="run",
        model=shape.model,
        max_steps=1,
        batch_size=shape.chunks_per_update,
        gradient_accumulation_steps=1,
        eval_steps=0,
        save_steps=0,
        minimal_pairs="never",
        sample_prompt=(),
        compile="never",
    )
    return replace(options, **read_variant(variant)[0])


def learning_rate(shape: Shape, variant: str, data: Path, distributed: Distributed) -> float:
    """Returns the learning rate of a variant, as training.py resolves it."""
    options = training_options(shape, variant, data)
    config = preset(shape.model, shape.vocabulary)
    setting = setting_of(config, options, distributed, shape.chunk_size)
    return resolve_recipe(options, setting, num_chunks=1, usable=sys.maxsize).learning_rate


def read_variant(variant: str) -> tuple[dict[str, Any], dict[str, float], float]:
    """Returns changed options, settings of the candidate, and the share of the updates."""
    kinds = option_types(TrainingOptions)
    changes: dict[str, Any] = {}
    settings: dict[str, float] = {}
    share = 1.0
    for word in variant.split(",") if variant != DEFAULT else ():
        name, is_given, text = word.partition("=")
        if not is_given:
            raise bad_option("--variants", f"{word!r} is no change", "Give such as schedule=wsd.")
        if name in kinds:
            changes[name] = kinds[name].read(text, f"--variants {name}")
        elif name == "share":
            share = float(text)
        elif name in option_types(Settings):
            settings[name] = float(text)
        else:
            fix = "Name an option of training.py, a setting in recipe_candidates.py, or share."
            raise bad_option("--variants", f"there is no {name}", fix)
    return changes, settings, share


def text_hash(data: Path) -> str:
    """Returns the hash of the tokens and the vocabulary of a chunk directory."""
    manifest = read_manifest(data)
    content = [manifest["tokenizer"]["sha256"]]
    for split in ("train", "test"):
        content += [shard["sha256"] for shard in manifest["splits"][split]["shards"]]
    return hashlib.sha256("".join(content).encode()).hexdigest()[:12]


def code_hash(variant: str) -> str:
    """Returns the hash of the code that updates weights, without comments, and of its defaults."""
    content = [str([getattr(TrainingOptions, name) for name in _OPTIONS])]
    _, settings, _ = read_variant(variant)
    for name in (*_CODE, *((_CANDIDATES,) if settings else ())):
        tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(body := getattr(node, "body", None), list):
                node.body = [each for each in body if not is_text(each)]  # type: ignore[attr-defined]
        content.append(ast.dump(tree))
    return hashlib.sha256("".join(content).encode()).hexdigest()[:12]


def is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def side_by_side(
    results: dict[str, dict[int, dict[str, Any]]], base_name: str, title: str
) -> Table:
    """Returns means of each variant, and how pairs of runs differ from those of the base."""
    table = Table("", "runs", "bits per byte", f"than {base_name}", "update", title=title)
    base = results.get(base_name, {})
    for variant, runs in results.items():
        seeds = sorted(base.keys() & runs.keys())
        before, after = ([side[seed]["bpb"] for seed in seeds] for side in (base, runs))
        costs, milliseconds = (
            statistics.median(run["milliseconds_per_update"] for run in side.values())
            for side in (base or runs, runs)
        )
        table.add_row(
            variant,
            str(len(runs)),
            f"{statistics.fmean(run['bpb'] for run in runs.values()):.4f}",
            str(compare(before, after)) if runs is not base else "",
            f"{milliseconds:.0f} ms, {milliseconds / costs:.2f}x",
        )
    return table


if __name__ == "__main__":
    sys.exit(cli.run(Options, __file__, main))
