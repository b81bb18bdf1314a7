"""Defaults by the size of the model, and the numbers of a run that follow from its options."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from kiem.config import TrainingOptions
from kiem.model.config import Gemma3Config
from kiem.model.gemma3 import Recompute

SECONDS_BETWEEN_SAVES = 1800  # without --save-steps
# Small data gets small batches: a run of whole epochs should have at least this many updates.
_MIN_STEPS = 50
# More tokens in a pass make no GPU faster; fewer are taken where memory is short.
_GPU_PASS_TOKENS = 16_384
_RECOMPUTE_ABOVE_PARAMETERS = 500_000_000


@dataclass(frozen=True)
class ModelDefaults:
    """What suits a model; more than `tokens_per_pass` make a CPU no faster."""

    tokens_per_pass: int
    tokens_per_step: int
    learning_rate: float


# By the largest number of parameters without the embedding: for the presets micro, nano, 270m and
# 1b, and for models that training starts from.
_DEFAULTS = {
    3_000_000: ModelDefaults(tokens_per_pass=4_096, tokens_per_step=1_024, learning_rate=4e-3),
    30_000_000: ModelDefaults(tokens_per_pass=4_096, tokens_per_step=4_096, learning_rate=1e-2),
    300_000_000: ModelDefaults(tokens_per_pass=2_048, tokens_per_step=131_072, learning_rate=1e-3),
    10**12: ModelDefaults(tokens_per_pass=1_024, tokens_per_step=262_144, learning_rate=1e-3),
}


@dataclass(frozen=True)
class Recipe:
    """The numbers of a run.

    Attributes:
        batch_size: chunks per device in one forward pass.
        accumulation: forward passes per update.
        chunks_per_step: chunks in one update, over all devices.
        learning_rate: highest learning rate.
        max_steps: updates at most, or None.
        max_seconds: training time at most, or None; never both None.
    """

    batch_size: int
    accumulation: int
    chunks_per_step: int
    learning_rate: float
    max_steps: int | None
    max_seconds: float | None


def what_to_recompute(options: TrainingOptions, config: Gemma3Config) -> Recompute:
    """Returns what the backward pass computes again: by the option, else by the model's size."""
    if options.activation_checkpointing != "auto":
        return options.activation_checkpointing
    return "full" if config.num_parameters() > _RECOMPUTE_ABOVE_PARAMETERS else "none"


def defaults_for(config: Gemma3Config, on_gpu: bool = False) -> ModelDefaults:
    """Returns what suits a model of this shape; GPUs with more memory take larger passes."""
    size = config.num_parameters() - config.vocab_size * config.hidden_size
    defaults = next(defaults for limit, defaults in _DEFAULTS.items() if size <= limit)
    return replace(defaults, tokens_per_pass=_GPU_PASS_TOKENS) if on_gpu else defaults


def resolve_recipe(
    options: TrainingOptions,
    defaults: ModelDefaults,
    num_chunks: int,
    chunk_size: int,
    world_size: int,
    largest_fitting: Callable[[int], int] = lambda wanted: wanted,
) -> Recipe:
    """Returns the numbers of a run: by the options, else what suits model and data.

    Args:
        options: all options of training.py.
        defaults: what suits the model.
        num_chunks: chunks in the training split.
        chunk_size: tokens in a chunk.
        world_size: devices.
        largest_fitting: returns how many of the wanted chunks in a pass fit into memory.
    """
    has_budget = options.max_steps is not None or options.max_minutes is not None
    wanted_chunks = defaults.tokens_per_step / chunk_size
    if not has_budget:
        wanted_chunks = min(wanted_chunks, options.epochs * num_chunks / _MIN_STEPS)
    batch_size = options.batch_size
    if batch_size is None:
        most = defaults.tokens_per_pass // chunk_size
        wanted = max(1, min(most, round(wanted_chunks / world_size)))
        batch_size = max(1, largest_fitting(wanted))
    accumulation = options.gradient_accumulation_steps
    if accumulation is None:
        accumulation = max(1, round(wanted_chunks / (batch_size * world_size)))
    chunks_per_step = batch_size * world_size * accumulation
    max_steps = options.max_steps
    if not has_budget:
        max_steps = math.ceil(options.epochs * num_chunks / chunks_per_step)
    return Recipe(
        batch_size=batch_size,
        accumulation=accumulation,
        chunks_per_step=chunks_per_step,
        learning_rate=options.learning_rate or defaults.learning_rate,
        max_steps=max_steps,
        max_seconds=options.max_minutes * 60 if options.max_minutes is not None else None,
    )
