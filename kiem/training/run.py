"""A run: what it is made of, how far it is, and the files it leaves behind."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from kiem.compute.memory import give_back_free_memory, keep_freed_memory
from kiem.compute.speed import prefers_bf16
from kiem.config import TrainingOptions
from kiem.core.console import warn
from kiem.core.files import sha256_file
from kiem.core.leftovers import remove_leftovers
from kiem.core.locking import locked_folder
from kiem.core.manifest import MANIFEST_FILE
from kiem.core.randomness import derive_seed
from kiem.data.chunks import (
    Chunks,
    open_split,
    open_test_sources,
    read_manifest,
    read_tokenizer,
)
from kiem.data.prepare.verify import verify_shards
from kiem.model.config import name_of
from kiem.model.gemma3 import Gemma3
from kiem.optim.optimizer import make_optimizers
from kiem.parallel.agreement import (
    check_same,
    check_same_command,
    check_same_weights,
    check_writable,
)
from kiem.parallel.distributed import Distributed
from kiem.parallel.parallel_model import ParallelModel, full_model, shard_parameters
from kiem.planning.memory_estimate import hardware_here, largest_batch, setting_of
from kiem.planning.probe import Probe
from kiem.planning.recipe import SECONDS_BETWEEN_SAVES, Recipe, defaults_for, resolve_recipe
from kiem.tokenizer.tokenizer import Tokenizer
from kiem.training.accessories import error_of
from kiem.training.background import BackgroundTracker
from kiem.training.build_model import make_model
from kiem.training.checkpoint import CHECKPOINTS, load_checkpoint, read_state, set_aside_after
from kiem.training.log import open_log
from kiem.training.metadata import run_metadata
from kiem.training.metrics import Metrics
from kiem.training.options import check_devices, check_options, check_sample_prompts
from kiem.training.resume import (
    CHANGEABLE,
    check_same_run,
    check_space,
    choose_checkpoint,
    run_name,
)

_EVALUATIONS_PER_RUN = 5
# What a checkpoint remembers of a run.
_STATE = ("step", "tokens", "seconds", "joules", "test_loss", "recent_losses", "num_skipped")


@dataclass
class Run:
    """Everything the loop works with.

    Attributes:
        options, recipe: what was asked, and the numbers it was settled to.
        directory: the run directory.
        manifest: the chunk directory's manifest.
        tokenizer: the chunk directory's tokenizer.
        train, test: the chunks.
        test_sources: the source of every test token, where the chunk directory has them.
        model, model_name, optimizers: what is trained.
        parallel_model: the model as the processes share it.
        metrics: the run's log; only the first process has one.
        trackers: where the figures go as well, by name; only the first process has them.
        left_out: accessories that have failed, by name; see `accessories.attempt`.
        fingerprint: what must not change when the run is resumed.
        changeable: what may change then, but gives another result.
        facts: what the run is made of, for the report and the model card.
        step, tokens, seconds: updates, tokens and training time so far, evaluations not counted.
        joules: energy so far, where the hardware counts it; 0 elsewhere.
        resumed_from: the checkpoint this run went on from.
        compiled: whether torch.compile made the layers' kernels.
        saved_step: the update after which the newest checkpoint was saved.
        test_loss: of the latest evaluation.
        recent_losses: of the latest updates, for `guard.spike_limit`.
        num_skipped: updates that were left out because of their loss.
    """

    options: TrainingOptions
    recipe: Recipe
    directory: Path
    manifest: dict[str, Any]
    tokenizer: Tokenizer
    train: Chunks
    test: Chunks
    test_sources: Chunks | None
    model: Gemma3
    model_name: str
    optimizers: list[torch.optim.Optimizer]
    parallel_model: ParallelModel
    fingerprint: dict[str, Any]
    changeable: dict[str, Any]
    facts: dict[str, Any] = field(default_factory=dict)
    metrics: Metrics | None = None
    trackers: dict[str, BackgroundTracker] = field(default_factory=dict)
    left_out: set[str] = field(default_factory=set)
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    joules: float = 0.0
    resumed_from: Path | None = None
    compiled: bool = False
    saved_step: int | None = None
    test_loss: float | None = None
    recent_losses: list[float] = field(default_factory=list)
    num_skipped: int = 0

    @property
    def progress(self) -> float:
        """Share of the training that is done: of the updates or of the time, what is nearer."""
        return self._share(self.step, self.seconds)

    @property
    def progress_within_step(self) -> float:
        """Progress in the middle of the next update, for the schedule; less than 1."""
        seconds_per_step = self.seconds / self.step if self.step else 0.0
        return min(self._share(self.step + 0.5, self.seconds + seconds_per_step / 2), 1 - 1e-6)

    def evaluation_is_due(self, progress_before: float) -> bool:
        """Says whether to evaluate after this update; never after the last one."""
        if self.progress >= 1:
            return False
        if self.options.eval_steps is not None:
            return self.options.eval_steps > 0 and self.step % self.options.eval_steps == 0
        times = _EVALUATIONS_PER_RUN
        return math.floor(self.progress * times) > math.floor(progress_before * times)

    def save_is_due(self, seconds_before: float) -> bool:
        """Says whether to save a checkpoint after this update."""
        if self.options.save_steps is not None:
            is_last = self.progress >= 1  # the evaluation at the end can take long
            return self.options.save_steps > 0 and (
                is_last or self.step % self.options.save_steps == 0
            )
        interval = SECONDS_BETWEEN_SAVES
        is_last = self.progress >= 1 and self.seconds > interval
        return is_last or self.seconds // interval > seconds_before // interval

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint holds beside weights and moments."""
        return {
            "step": self.step,
            "run": {name: getattr(self, name) for name in _STATE},
            "fingerprint": self.fingerprint,
            "changeable": self.changeable,
        }

    def go_on_from(self, checkpoint: Path, distributed: Distributed) -> None:
        """Puts everything in the state in which a verified checkpoint was saved."""
        load_checkpoint(checkpoint, self.model, self.optimizers, distributed)
        for name, value in read_state(checkpoint)["run"].items():
            setattr(self, name, value)
        self.saved_step = self.step

    @contextmanager
    def whole_model(self, distributed: Distributed) -> Iterator[None]:
        """Makes `model` one that each process can call by itself; all processes come here."""
        shared, self.model = self.model, full_model(self.model, distributed.device)
        try:
            yield
        finally:
            self.model = shared

    def warn(self, console: Console, message: str) -> None:
        """Says something that a person should know, on the screen and in the log."""
        if self.metrics is not None:
            self.metrics.write(self.step, {"warning": message})
        error_of(lambda: warn(console, message))  # the screen may be what failed

    def _share(self, step: float, seconds: float) -> float:
        of_steps = step / self.recipe.max_steps if self.recipe.max_steps else 0.0
        of_seconds = seconds / self.recipe.max_seconds if self.recipe.max_seconds else 0.0
        return max(of_steps, of_seconds)


def prepare_run(
    options: TrainingOptions, distributed: Distributed, console: Console, held: ExitStack
) -> Run:
    """Opens the data, makes or loads the model, and resumes where a run of that name stopped.

    Args:
        options: all options of training.py.
        distributed: all processes.
        console: where warnings go.
        held: as long as it is open the run directory is this program's, and the model is shared.

    Raises:
        UserError: anything about options, data, model or disk that a person can mend.
    """
    check_same_command(options, distributed)
    with distributed.raise_on_all_ranks():
        check_options(options)
        check_devices(options, distributed)
        if (
            distributed.is_main
            and distributed.precision == "bf16"
            and not prefers_bf16(distributed.device)
        ):
            warn(console, "bf16 gains little or nothing on this processor; try --precision fp32")
        manifest = read_manifest(options.dataset_path)
        tokenizer = read_tokenizer(options.dataset_path, manifest)
        data = manifest.get("sha256", sha256_file(options.dataset_path / MANIFEST_FILE))
    fix = "Give all machines the same chunk directory."
    check_same({"sha256 of the chunk directory's manifest": data}, fix, distributed)
    with distributed.raise_on_all_ranks():
        if distributed.is_local_main:
            verify_shards(options.dataset_path, manifest)
        train, test = (open_split(options.dataset_path, manifest, s) for s in ("train", "test"))
        test_sources = open_test_sources(options.dataset_path, manifest)
        model = make_model(options, tokenizer, distributed.world_size)
        check_sample_prompts(options, tokenizer, model.config)
    check_same_weights(model, distributed)
    if options.shard != "parameters":  # which puts only its shares on the device
        model.to(distributed.device)
    model_name = name_of(model.config)
    with distributed.raise_on_all_ranks():
        name = run_name(options, model_name) if distributed.is_main else ""
    directory = options.output_dir / distributed.broadcast_from_main(name)
    usual = defaults_for(model.config, distributed.device.type == "cuda")
    hardware = hardware_here(distributed)
    setting = setting_of(model.config, options, distributed, train.chunk_size)
    recipe = resolve_recipe(
        options,
        usual,
        train.num_chunks,
        train.chunk_size,
        distributed.world_size,
        lambda wanted: int(
            distributed.broadcast_from_main(largest_batch(setting, hardware, wanted))
        ),
    )
    with distributed.raise_on_all_ranks():
        if distributed.is_main:
            held.enter_context(locked_folder(directory))
            remove_leftovers(directory)
            remove_leftovers(directory / CHECKPOINTS)
    if options.save_steps != 0:  # else only the first process writes
        check_writable(directory / CHECKPOINTS, distributed)
    checkpoint = choose_checkpoint(options, directory, distributed, console)
    with distributed.raise_on_all_ranks():
        check_space(options, recipe, directory, model.config.num_parameters())
    keep_freed_memory()
    if options.shard == "parameters":
        shard_parameters(model, distributed)
    probe = Probe(model, options, train.chunk_size, distributed, console)
    recipe = probe.fit_recipe(recipe)
    compiled = probe.compile_if_worthwhile(recipe)
    give_back_free_memory()
    parallel_model = ParallelModel(model, distributed, options.shard)
    held.callback(parallel_model.close)
    optimizers = make_optimizers(
        model,
        options.optimizer,
        options.weight_decay,
        parallel_model.local_params,
        distributed.matrix_dtype,
    )
    run = Run(
        options=options,
        recipe=recipe,
        directory=directory,
        manifest=manifest,
        tokenizer=tokenizer,
        train=train,
        test=test,
        test_sources=test_sources,
        model=model,
        model_name=model_name,
        optimizers=optimizers,
        parallel_model=parallel_model,
        fingerprint={
            "model": model_name,
            **vars(model.config),
            "data": data,
            "seed": options.seed,
            "optimizer": options.optimizer,
            "chunks_per_step": recipe.chunks_per_step,
            "document_mask": options.document_mask,
        },
        changeable={
            **{name: getattr(options, name) for name in CHANGEABLE},
            "precision": distributed.precision,
            "devices": distributed.world_size,
            "compiled": compiled,
        },
        resumed_from=checkpoint,
        compiled=compiled,
    )
    # What was drawn so far depends on how fast the machine is; from here on nothing does.
    torch.manual_seed(derive_seed(options.seed, "training", distributed.rank))
    if checkpoint is not None:
        with distributed.raise_on_all_ranks():
            state = read_state(checkpoint)
            check_same_run(checkpoint, state, run.fingerprint, run.changeable, console)
        run.go_on_from(checkpoint, distributed)
    run.facts = run_metadata(run, distributed)
    with distributed.raise_on_all_ranks():
        if distributed.is_main:
            open_log(run, console)
            set_aside_after(directory / CHECKPOINTS, run.step)
    return run
