"""The setup of a run: from options to an open run that is ready for its next update."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import psutil
import torch
from rich.console import Console

from kiem.compute.speed import prefers_bf16
from kiem.config import TrainingOptions
from kiem.core.console import warn
from kiem.core.disk import remove_leftovers
from kiem.core.files import require_free_space
from kiem.core.locking import locked_folder
from kiem.core.randomness import derive_seed
from kiem.core.values import check_name
from kiem.data.mixture import read_mixture
from kiem.data.prepare.verify import verify_shards
from kiem.model.config import name_of
from kiem.model.gemma3 import Gemma3
from kiem.optim.optimizer import make_optimizers
from kiem.parallel.agreement import check_same_start, check_writable
from kiem.parallel.distributed import Distributed, keep_precision
from kiem.parallel.parallel_model import ParallelModel, shard_parameters
from kiem.planning.memory_estimate import setting_of, usable_bytes
from kiem.planning.probe import Probe
from kiem.planning.recipe import (
    SECONDS_BETWEEN_SAVES,
    Recipe,
    build_model,
    check_options,
    resolve_recipe,
)
from kiem.training.checkpoint import CHECKPOINTS, list_checkpoints, read_state, set_aside_after
from kiem.training.log import RunLog
from kiem.training.resume import (
    check_same_run,
    choose_checkpoint,
    copy_log,
    find_branch,
    find_first_weights,
    is_branch_point,
    keep_batch_warmup,
    restore,
)
from kiem.training.run import Run, RunSpec, TrainingData, TrainState
from kiem.training.signals import StopSignals
from kiem.training.validation import check_sample_prompts


@contextmanager
def setup(
    options: TrainingOptions, distributed: Distributed, console: Console
) -> Iterator[tuple[Run, TrainState]]:
    """Opens a run, from its beginning or where a run of that name stopped.

    The run directory is locked until the end of the context.

    Raises:
        UserError: anything about options, data, model or disk that users can correct.
    """
    with ExitStack() as stack:
        # Options, data and weights: the same in all processes.
        data = _open_data(options, distributed, console)
        usable = distributed.broadcast_from_main(usable_bytes(distributed))
        model, first_folder = _open_model(options, data, distributed)

        # The run directory: locked, writable, and with a checkpoint or without.
        directory = _open_directory(options, model, distributed, stack)
        checkpoint = choose_checkpoint(options, directory, distributed, console)

        # The numbers that options leave open; a run that goes on keeps those that it had.
        if checkpoint is not None:
            with distributed.raise_on_all_ranks():
                options = keep_batch_warmup(options, checkpoint)
                before = read_state(checkpoint)["changeable"]["precision"]
            distributed = keep_precision(distributed, options.precision, before)
        setting = setting_of(model.config, options, distributed, data.train.chunk_size)
        recipe = resolve_recipe(options, setting, data.mixture.num_chunks, usable)
        with distributed.raise_on_all_ranks():
            check_space(options, recipe, directory, model.config.num_parameters())

        # The model on its device, in passes that fit there.
        if options.shard == "parameters":
            shard_parameters(model, distributed)
        probe = Probe(model, options, setting, distributed, console)
        recipe = probe.prepare(recipe)

        # Gradients and moments.
        parallel_model = ParallelModel(model, distributed, options.shard)
        stack.callback(parallel_model.close)
        local_params = parallel_model.local_params
        optimizers = make_optimizers(
            model, options.optimizer, options.weight_decay, local_params, distributed.matrix_dtype
        )

        # The run, and its state.
        is_compiled = probe.is_compiled
        spec = RunSpec(options, recipe, model.config, data, distributed, is_compiled, directory)
        with distributed.raise_on_all_ranks():
            first_weights = None
            if distributed.is_main:
                first_weights = find_first_weights(spec, first_folder, checkpoint)
            branched_from = find_branch(spec, checkpoint)
        spec = replace(spec, first_weights=first_weights, branched_from=branched_from)
        log = RunLog(directory, distributed, console, stops_run=options.on_save_failure == "stop")
        signals = StopSignals(distributed, is_enabled=options.save_steps != 0)
        run = Run(spec, parallel_model, optimizers, log, signals, checkpoint)
        yield run, _open_state(run, console)


def _open_data(
    options: TrainingOptions, distributed: Distributed, console: Console
) -> TrainingData:
    """Checks the options, and opens the chunk directories."""
    with distributed.raise_on_all_ranks():
        check_options(options, distributed.world_size)
        is_bf16 = distributed.is_main and distributed.precision == "bf16"
        if is_bf16 and not prefers_bf16(distributed.device):
            warn(console, "bf16 is slow without AVX512_BF16; try --precision fp32")
        mixture = read_mixture(options)
        if distributed.is_local_main:
            for directory in {d.path: d for d in (*mixture.directories, *mixture.anneal)}.values():
                verify_shards(directory.path, directory.manifest)
        train, test = mixture.train_chunks(), mixture.test_chunks()
        return TrainingData(mixture, train, test, mixture.test_sources())


def _open_model(
    options: TrainingOptions, data: TrainingData, distributed: Distributed
) -> tuple[Gemma3, Path | None]:
    """Returns what `build_model` does; all processes must have the same weights and data."""
    with distributed.raise_on_all_ranks():
        model, folder = build_model(options, data.tokenizer)
        check_sample_prompts(options, data.tokenizer, model.config)
    check_same_start(options, data.mixture.identity(), model, distributed)
    if options.shard != "parameters":  # which puts only its shards on the device
        model.to(distributed.device)
    return model, folder


def _open_directory(
    options: TrainingOptions, model: Gemma3, distributed: Distributed, stack: ExitStack
) -> Path:
    """Returns the run directory, locked until `stack` is closed, and writable for all processes."""
    with distributed.raise_on_all_ranks():
        name = run_name(options, name_of(model.config)) if distributed.is_main else ""
    directory = options.output_dir / distributed.broadcast_from_main(name)
    with distributed.raise_on_all_ranks():
        if distributed.is_main:
            stack.enter_context(locked_folder(directory))
            remove_leftovers(directory)
            remove_leftovers(directory / CHECKPOINTS)
    if options.save_steps != 0:  # else only the main process writes
        check_writable(directory / CHECKPOINTS, distributed)
    return directory


def run_name(options: TrainingOptions, model_name: str) -> str:
    """Returns the name of the run directory: that of the options, or with the time of the start.

    The main process decides: every launcher has its own clock.
    """
    if options.run_name is not None:
        return check_name(options.run_name, "--run-name")
    started = datetime.now(timezone.utc)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # All processes of a launcher, and those that it restarts, work on one run.
        launcher = psutil.Process(os.getppid())
        started = datetime.fromtimestamp(launcher.create_time(), timezone.utc)
    return f"{model_name}-dutch-{started:%Y%m%dT%H%M%SZ}"


def check_space(
    options: TrainingOptions, recipe: Recipe, directory: Path, num_parameters: int
) -> None:
    """Checks that the disk has room for all that a run will write.

    Raises:
        UserError: it has not.
    """
    # The best one is kept as well, and the new one is committed before the oldest is removed.
    num_kept = options.save_total_limit + 2
    num_there = len(list_checkpoints(directory / CHECKPOINTS))
    num_new = max(0, min(num_kept - num_there, _max_saves(options, recipe)))
    needed = 4 * num_parameters * (1 + 3 * num_new)  # a checkpoint has weights and two moments
    checkpoints = f"{num_new} checkpoint{'' if num_new == 1 else 's'}"
    require_free_space(directory, needed, f"the model and {checkpoints}")


def _max_saves(options: TrainingOptions, recipe: Recipe) -> int:
    """Returns the most checkpoints that a run can commit, with one for a signal that ends it."""
    if options.save_steps == 0:
        return 0
    limits = [sys.maxsize]
    if recipe.max_steps is not None:
        of_steps = math.ceil(recipe.max_steps / (options.save_steps or 1)) + 1
        limits.append(min(recipe.max_steps, of_steps))
    if recipe.max_seconds is not None and options.save_steps is None:
        limits.append(int(recipe.max_seconds // SECONDS_BETWEEN_SAVES) + 2)
    return min(limits)


def _open_state(run: Run, console: Console) -> TrainState:
    """Returns a new state or that of the checkpoint, and opens the log behind it."""
    spec, distributed, checkpoint = run.spec, run.spec.distributed, run.resumed_from
    # What was drawn so far depends on the speed of the machine; from here on nothing does.
    torch.manual_seed(derive_seed(spec.options.seed, "training", distributed.rank))
    state = TrainState()
    if checkpoint is not None:
        with distributed.raise_on_all_ranks():
            saved = read_state(checkpoint)
            if not is_branch_point(spec, checkpoint):
                check_same_run(checkpoint, saved, spec.fingerprint(), spec.changeable(), console)
            elif distributed.is_main:
                copy_log(checkpoint, spec.directory)
        state = restore(run, checkpoint)
    run.log.step = state.step
    with distributed.raise_on_all_ranks():
        if distributed.is_main:
            repeats = state.awaits_evaluation or state.progress(spec.recipe) >= 1
            run.log.open(spec.options, spec.metadata(), repeats_evaluation=repeats)
            set_aside_after(spec.directory / CHECKPOINTS, state.step)
    return state
