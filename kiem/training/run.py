"""A run: what it is made of, how far it is, and the files it leaves behind."""

from __future__ import annotations

import dataclasses
import math
import platform
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import kiem
from kiem.cli import to_dict, to_yaml, warn
from kiem.config import TrainingOptions
from kiem.data.chunks import (
    MANIFEST_FILE,
    Chunks,
    open_split,
    read_manifest,
    read_tokenizer,
    verify_shards,
)
from kiem.data.tokenizer import Tokenizer, load_tokenizer, write_tokenizer
from kiem.errors import ExitCode, UserError, no_effect
from kiem.files import (
    check_name,
    new_folder,
    point_link,
    require_free_space,
    sha256_file,
    write_json,
    write_text,
)
from kiem.memory import keep_freed_memory
from kiem.model.files import find_model, read_model, write_model
from kiem.model.gemma3 import Gemma3
from kiem.model.initialize import initialize
from kiem.model.presets import name_of, preset
from kiem.report.card import model_card
from kiem.report.record import CONFIG_FILE, FACTS_FILE, SUMMARY_FILE
from kiem.training.checkpoint import list_checkpoints, load_checkpoint
from kiem.training.compiling import compile_if_worthwhile
from kiem.training.devices import Devices
from kiem.training.metrics import Metrics, keep_metrics_until
from kiem.training.optimizer import make_optimizers
from kiem.training.options import check_options
from kiem.training.recipe import Recipe, settle, usual_for, what_to_recompute
from kiem.training.sharding import Sharing
from kiem.training.trackers import open_trackers

_EVALUATIONS_PER_RUN = 5
_SECONDS_BETWEEN_SAVES = 1800


@dataclass
class Run:
    """Everything the loop works with.

    Attributes:
        options, recipe: what was asked, and the numbers it was settled to.
        directory: the run directory.
        manifest: the chunk directory's manifest.
        tokenizer: the chunk directory's tokenizer.
        train, test: the chunks.
        model, model_name, optimizers: what is trained.
        sharing: how the processes share the model.
        metrics: the run's log; only the first process has one.
        fingerprint: what must not change when the run is resumed.
        facts: what the run is made of, for the report and the model card.
        step, tokens, seconds: updates, tokens and training time so far, evaluations not counted.
        joules: energy so far, where the hardware counts it; 0 elsewhere.
        resumed_from: the checkpoint this run went on from.
        compiled: whether torch.compile made the layers' kernels.
    """

    options: TrainingOptions
    recipe: Recipe
    directory: Path
    manifest: dict[str, Any]
    tokenizer: Tokenizer
    train: Chunks
    test: Chunks
    model: Gemma3
    model_name: str
    optimizers: list[torch.optim.Optimizer]
    sharing: Sharing
    fingerprint: dict[str, Any]
    facts: dict[str, Any] = field(default_factory=dict)
    metrics: Metrics | None = None
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    joules: float = 0.0
    resumed_from: Path | None = None
    compiled: bool = False

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
            return self.options.save_steps > 0 and self.step % self.options.save_steps == 0
        return self.seconds // _SECONDS_BETWEEN_SAVES > seconds_before // _SECONDS_BETWEEN_SAVES

    def _share(self, step: float, seconds: float) -> float:
        of_steps = step / self.recipe.max_steps if self.recipe.max_steps else 0.0
        of_seconds = seconds / self.recipe.max_seconds if self.recipe.max_seconds else 0.0
        return max(of_steps, of_seconds)


def prepare_run(options: TrainingOptions, devices: Devices, console: Console) -> Run:
    """Opens the data, makes or loads the model, and resumes where a run of that name stopped.

    Raises:
        UserError: anything about options, data, model or disk that a person can mend.
    """
    check_options(options)
    manifest = read_manifest(options.dataset_path)
    tokenizer = read_tokenizer(options.dataset_path, manifest)
    if devices.is_first:
        verify_shards(options.dataset_path, manifest)
    devices.wait_for_all()
    train = open_split(options.dataset_path, manifest, "train")
    test = open_split(options.dataset_path, manifest, "test")
    model = _make_model(options, tokenizer).to(devices.device)
    model_name = name_of(model.config)
    directory = options.output_dir / _run_name(options, model_name)
    usual = usual_for(model.config)
    recipe = settle(options, usual, train.num_chunks, train.chunk_size, devices.world_size)
    keep_freed_memory()
    compiled = compile_if_worthwhile(model, options, recipe, train.chunk_size, devices, console)
    checkpoint = _checkpoint_to_resume(options, directory)
    _check_disk(options, directory, model)
    if options.shard != "none" and devices.world_size == 1:
        raise no_effect("--shard", "with one device")
    sharing = Sharing(model, devices, options.shard)
    decay = options.weight_decay
    run = Run(
        options=options,
        recipe=recipe,
        directory=directory,
        manifest=manifest,
        tokenizer=tokenizer,
        train=train,
        test=test,
        model=model,
        model_name=model_name,
        optimizers=make_optimizers(model, options.optimizer, decay, sharing.owned),
        sharing=sharing,
        fingerprint={
            "model": model_name,
            "data": sha256_file(options.dataset_path / MANIFEST_FILE),
            "seed": options.seed,
            "optimizer": options.optimizer,
            "chunks_per_step": recipe.chunks_per_step,
            "document_mask": options.document_mask,
        },
        resumed_from=checkpoint,
        compiled=compiled,
    )
    if checkpoint is not None:
        state = load_checkpoint(checkpoint, model, run.optimizers, run.fingerprint)
        run.step, run.tokens, run.seconds = state["step"], state["tokens"], state["seconds"]
        run.joules = state.get("joules", 0.0)  # older checkpoints have none
    run.facts = _facts(run, devices)
    if devices.is_first:
        directory.mkdir(parents=True, exist_ok=True)
        write_text(directory / CONFIG_FILE, to_yaml(options))
        write_json(directory / FACTS_FILE, run.facts)
        keep_metrics_until(directory, run.step)
        config = {**to_dict(options), **run.facts}
        run.metrics = Metrics(directory, open_trackers(options, directory, config, run.step))
        if run.resumed_from is None:
            for message in _small_data_warnings(run):
                warn(console, message)
                run.metrics.write(run.step, {"warning": message})
    return run


def finish_run(run: Run, figures: dict[str, Any]) -> Path:
    """Writes final_model/ and points the latest link at the run; returns the model directory.

    Args:
        run: the trained run.
        figures: the last evaluation.
    """
    assert run.metrics is not None
    summary = {
        **run.facts,
        "steps": run.step,
        "tokens": run.tokens,
        "seconds": run.seconds,
        **({"joules": run.joules} if run.joules else {}),
        **figures,
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    folder = run.directory / "final_model"
    with new_folder(folder, overwrite=folder.exists()) as unfinished:
        write_model(run.model, unfinished, run.tokenizer.special_ids)
        write_tokenizer(run.tokenizer, unfinished)
        write_json(unfinished / SUMMARY_FILE, summary)
        card = model_card(summary, run.directory.name, run.options.language)
        write_text(unfinished / "README.md", card)
    point_link(run.directory.parent / f"{run.model_name}-dutch-latest", run.directory.name)
    run.metrics.close(summary)
    return folder


def _facts(run: Run, devices: Devices) -> dict[str, Any]:
    """Returns what a run is made of: all of its summary that is known before it starts."""
    train, test = (run.manifest["splits"][split] for split in ("train", "test"))
    return {
        "model": run.model_name,
        "parameters": run.model.config.num_parameters(),
        "initialized_from": run.options.init_from or "random weights",
        "data": {
            "source": run.manifest["source"],
            "options": run.manifest["options"],
            "manifest_sha256": run.fingerprint["data"],
            "train_tokens": train["tokens"],
            "train_documents": train["documents"],
            "test_documents": test["documents"],
            "bytes_per_source": train["bytes_per_source"],
        },
        "tokenizer": run.manifest["tokenizer"],
        "recipe": dataclasses.asdict(run.recipe),
        "hardware": {
            "device": _device_name(devices.device),
            "devices": devices.world_size,
            "precision": devices.precision,
            "compiled": run.compiled,
            "matrix_flops": devices.matrix_flops,
        },
        "versions": {
            "kiem": kiem.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def _make_model(options: TrainingOptions, tokenizer: Tokenizer) -> Gemma3:
    if options.init_from is None:
        model = Gemma3(preset(options.model, tokenizer.num_rows))
        initialize(model, options.seed)
    else:
        folder = find_model(options.init_from)
        model = read_model(folder, dtype=torch.float32)
        _check_same_tokenizer(folder, tokenizer, options)
    model.recompute = what_to_recompute(options, model.config)
    return model


def _check_same_tokenizer(folder: Path, tokenizer: Tokenizer, options: TrainingOptions) -> None:
    # Equal vocabularies suffice: Gemma's -it and -pt files, and transformers' own saves, differ in
    # bytes but give every piece of text the same id.
    own = load_tokenizer(str(folder)).implementation.get_vocab(with_added_tokens=False)
    if own != tokenizer.implementation.get_vocab(with_added_tokens=False):
        raise UserError(
            f"the chunks in {options.dataset_path} were made with another tokenizer",
            where=f"--init-from {options.init_from}",
            fix=f"Make them again with preprocess.py --tokenizer {options.init_from}.",
            exit_code=ExitCode.TOKENIZER_MISMATCH,
        )


def _run_name(options: TrainingOptions, model_name: str) -> str:
    if options.run_name is not None:
        return check_name(options.run_name, "--run-name")
    return f"{model_name}-dutch-{datetime.now(timezone.utc):%Y%m%dT%H%M%SZ}"


def _checkpoint_to_resume(options: TrainingOptions, directory: Path) -> Path | None:
    if (directory / "final_model").exists():
        raise UserError(
            "this run is finished",
            where=str(directory),
            fix="Choose another --run-name; to train its model further, use --init-from.",
            exit_code=ExitCode.ALREADY_EXISTS,
        )
    if options.resume not in ("auto", "none"):
        return Path(options.resume)
    checkpoints = list_checkpoints(directory / "checkpoints")
    if not checkpoints:
        return None
    if options.resume == "none":
        raise UserError(
            "this run directory holds checkpoints that would be mixed with a new run's",
            where=str(directory),
            fix="Choose another --run-name, or go on with --resume auto.",
            exit_code=ExitCode.ALREADY_EXISTS,
        )
    return checkpoints[-1]


def _check_disk(options: TrainingOptions, directory: Path, model: Gemma3) -> None:
    num_bytes = 4 * model.config.num_parameters()
    # A checkpoint has weights and two moments; the new one is committed before the oldest goes.
    checkpoints = 0 if options.save_steps == 0 else options.save_total_limit + 1
    needed = num_bytes * (1 + 3 * checkpoints)
    require_free_space(directory, needed, f"the model and {checkpoints} checkpoints")


def _small_data_warnings(run: Run) -> Iterator[str]:
    train = run.manifest["splits"]["train"]
    if run.train.num_chunks < run.recipe.chunks_per_step:
        yield (
            f"one update reads {run.recipe.chunks_per_step} chunks, but there are only "
            f"{run.train.num_chunks}: each is read several times in every update"
        )
    num_parameters = run.model.config.num_parameters()
    if train["tokens"] < num_parameters:
        yield (
            f"{train['tokens']:,} tokens of text for {num_parameters:,} parameters; about 20 for "
            "each are usual (arXiv:2203.15556): a smaller model may do better"
        )


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"
