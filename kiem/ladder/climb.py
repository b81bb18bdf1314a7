"""`kiem ladder`: trains the rungs that fit into the time, and fits and shows what they tell."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec
import torch
from rich.console import Console

from kiem.config import LadderOptions, TrainingOptions
from kiem.core.console import PlainConsole
from kiem.core.errors import ExitCode, UserError, bad_option
from kiem.core.files import append_json_lines, remove_folder
from kiem.core.json_input import read_json
from kiem.core.locking import locked_folder
from kiem.data.chunks import read_manifest, read_tokenizer
from kiem.ladder.order import (
    DEFAULT_MODELS,
    TOKENS_PER_STEP,
    Place,
    Trial,
    default_lengths,
    next_trial,
)
from kiem.ladder.page import show_ladder, write_ladder_page
from kiem.model.config import PRESETS, name_of, preset
from kiem.parallel.launch import read_place
from kiem.planning.ladder_runs import RUNS_FILE, LadderRun, ladder_folder, read_runs, text_hash
from kiem.planning.recipe import RECIPE_VERSION
from kiem.planning.transfer import transfer_rate
from kiem.report.page import REPORT_FILE
from kiem.report.record import METADATA_FILE, SUMMARY_FILE
from kiem.training.loop import train

Kind = TypeVar("Kind")
# The rate that is expected to be best for gemma3-nano on a million tokens, where it was tried.
_NANO_RATE = 2e-2
_NANO_SIZE = PRESETS["gemma3-nano"].num_layer_parameters()


class _Hardware(msgspec.Struct):
    device: str
    precision: str


class _Metadata(msgspec.Struct):
    hardware: _Hardware


class _Summary(msgspec.Struct):
    seconds: Annotated[float, msgspec.Meta(gt=0)]
    test_bpb: Annotated[float, msgspec.Meta(gt=0)]


@dataclass(frozen=True)
class _Ladder:
    """What is trained on, and where it goes."""

    options: LadderOptions
    folder: Path
    text: str
    vocab_size: int
    chunk_size: int
    num_train_tokens: int

    @property
    def chunks_per_step(self) -> int:
        return max(1, round(TOKENS_PER_STEP / self.chunk_size))

    @property
    def tokens_per_step(self) -> int:
        return self.chunks_per_step * self.chunk_size

    def places(self) -> list[Place]:
        """Returns the rungs that the options ask for."""
        step_tokens = self.tokens_per_step
        lengths = self.options.tokens or default_lengths(self.num_train_tokens)
        steps = dict.fromkeys(max(1, round(tokens / step_tokens)) for tokens in lengths)
        places = []
        for model in self.options.models or DEFAULT_MODELS:
            config = preset(model, self.vocab_size)
            sizes = config.num_layer_parameters(), config.num_parameters()
            rate = transfer_rate(_NANO_RATE, _NANO_SIZE, sizes[0])
            for num_steps in steps:
                tokens = num_steps * step_tokens
                places.append(Place(name_of(config), *sizes, num_steps, tokens, rate))
        return places

    def train(self, trial: Trial) -> LadderRun:
        """Trains a model, or goes on with its training, and returns what it reached."""
        name = f"{trial.model}-{trial.num_steps}-{trial.learning_rate:g}"
        options = TrainingOptions(
            dataset_path=(self.options.dataset_path,),
            model=trial.model,
            output_dir=self.folder / "training",
            run_name=name,
            max_steps=trial.num_steps,
            batch_size=self.chunks_per_step,
            gradient_accumulation_steps=1,
            learning_rate=trial.learning_rate,
            precision=self.options.precision,
            seed=self.options.seed,
            eval_steps=0,
            save_total_limit=1,
            minimal_pairs="never",
            sample_prompt=(),
        )
        started = time.monotonic()
        is_finite = _train(options)
        wall_seconds = time.monotonic() - started
        metadata = _read(options.output_dir / name / METADATA_FILE, _Metadata)
        file = options.output_dir / name / "final_model" / SUMMARY_FILE
        summary = _read(file, _Summary) if is_finite else None
        run = LadderRun(
            model=trial.model,
            num_layer_parameters=preset(trial.model, 1).num_layer_parameters(),
            vocab_size=self.vocab_size,
            tokens=trial.num_steps * self.tokens_per_step,
            tokens_per_step=self.tokens_per_step,
            learning_rate=trial.learning_rate,
            bpb=summary.test_bpb if summary else None,
            seconds=summary.seconds if summary else wall_seconds,
            wall_seconds=wall_seconds,
            recipe=RECIPE_VERSION,
            data=self.text,
            text=self.options.dataset_path.resolve().name,
            hardware=f"{metadata.hardware.device}, {metadata.hardware.precision}",
            date=f"{datetime.now(timezone.utc):%Y-%m-%d}",
        )
        append_json_lines(self.folder / RUNS_FILE, [msgspec.to_builtins(run)])
        remove_folder(options.output_dir)
        return run


def _train(options: TrainingOptions) -> bool:
    """Trains quietly; returns whether the loss stayed finite, as with too high a rate it may not.

    Raises:
        UserError: it was stopped, or cannot be done.
    """
    torch.compiler.reset()  # it compiles a function for so many shapes only
    try:
        train(options, PlainConsole(quiet=True))
    except UserError as error:
        if error.exit_code == ExitCode.NOT_FINITE:
            return False
        if error.exit_code == ExitCode.STOPPED:
            error.fix = "The same command goes on with this training."
        raise
    return True


def _read(path: Path, kind: type[Kind]) -> Kind:
    fix = f"Remove {path.parent}: the same command then trains it again."
    return read_json(path, kind, fix=fix, exit_code=ExitCode.DAMAGED)


def ladder(options: LadderOptions, console: Console) -> None:
    """Runs `kiem ladder`.

    Raises:
        UserError: anything about options, data or disk that users can correct, or it was stopped;
            the same command then continues.
    """
    started, num_processes = time.monotonic(), read_place().world_size
    if num_processes > 1:
        what = f"{num_processes} processes were started, but a ladder is trained on one device"
        raise bad_option("the launcher", what, "Start it with python.")
    manifest = read_manifest(options.dataset_path)
    folder = options.output_dir or ladder_folder(options.dataset_path)
    this = _Ladder(
        options,
        folder,
        text_hash(manifest),
        read_tokenizer(options.dataset_path, manifest).num_rows,
        manifest["options"]["chunk_size"],
        manifest["splits"]["train"]["tokens"],
    )
    places = this.places()
    with locked_folder(folder):
        known = read_runs(folder / RUNS_FILE) if (folder / RUNS_FILE).exists() else []
        runs = [run for run in known if (run.data, run.recipe) == (this.text, RECIPE_VERSION)]
        if len(runs) < len(known):
            num_others = len(known) - len(runs)
            console.print(f"{num_others} runs there are of other data or of an earlier recipe")
        new = list[LadderRun]()
        while True:
            seconds_left = started + options.minutes * 60 - time.monotonic()
            found = next_trial(places, runs, new or runs, seconds_left)
            if found is None:
                break
            trial, seconds = found
            tokens = f"{trial.num_steps * this.tokens_per_step:,} tokens"
            expected = "" if seconds is None else f", about {seconds / 60:.1f} minutes"
            console.print(f"{trial.model}: {tokens} at {trial.learning_rate:g}{expected}")
            run = this.train(trial)
            bpb = "not finite" if run.bpb is None else f"{run.bpb:.4f} bits per byte"
            console.print(f"  {bpb} in {run.wall_seconds / 60:.1f} minutes")
            runs.append(run)
            new.append(run)
        if not runs:
            raise bad_option("--minutes", "no training fits into them", "Give more.")
        show_ladder(runs, console)
        write_ladder_page(runs, folder / REPORT_FILE)
    console.print(f"\nThe ladder on one page: {folder / REPORT_FILE}")
