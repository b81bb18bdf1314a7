"""Checks of the options of a run, defaults by size, and the numbers and the model that follow."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from kiem.config import TrainingOptions
from kiem.core.errors import ExitCode, UserError, bad_option, no_effect
from kiem.data.order import WARMUP_PARTS, count_steps
from kiem.model.config import PRESETS, preset
from kiem.model.gemma3 import Gemma3, Recompute, initialize
from kiem.model.io import find_model, read_model
from kiem.planning.memory_estimate import (
    Setting,
    largest_batch,
    least_recompute,
    recompute_choices,
)
from kiem.planning.transfer import transfer_rate
from kiem.tokenizer.tokenizer import Tokenizer, load_tokenizer

# To raise when a default other than size, batch and learning rate changes what a training reaches:
# a ladder does not mix versions.
RECIPE_VERSION = 2
SECONDS_BETWEEN_SAVES = 1800  # without --save-steps
# Small data gets small batches: a run of whole epochs should have at least this many updates. In
# docs/recipe.md twice as many of half the size are better for the same text, up to a thousand.
_MIN_STEPS = 400
# More tokens in a pass make no GPU faster; fewer are taken where memory is short. A pass reads all
# weights and adds to all gradients: below the smallest that takes longer than recomputation.
GPU_PASS_TOKENS, SMALLEST_GPU_PASS_TOKENS = 16_384, 4_096


@dataclass(frozen=True)
class _Defaults:
    """What suits a model; more than `tokens_per_pass` make a CPU no faster.

    The learning rate follows from the one of `tried_on`. How many updates fit a time limit nobody
    knows before, so there the first `batch_warmup_steps` are smaller.
    """

    tokens_per_pass: int
    tokens_per_step: int
    tried_on: str
    batch_warmup_steps: int = 0


# By the largest number of parameters in layers: for the presets micro, nano, 270m and 1b, and for
# models that training starts from.
_DEFAULTS = {
    3_000_000: _Defaults(4_096, tokens_per_step=1_024, tried_on="gemma3-micro"),
    30_000_000: _Defaults(4_096, 4_096, tried_on="gemma3-nano", batch_warmup_steps=400),
    300_000_000: _Defaults(2_048, tokens_per_step=131_072, tried_on="gemma3-nano"),
    10**12: _Defaults(1_024, tokens_per_step=262_144, tried_on="gemma3-nano"),
}
_TRIED_RATES = {"gemma3-micro": 3.2e-2, "gemma3-nano": 2e-2}
# What is published for models of more parameters in layers: for AdamW alone, whose best rate falls
# faster with the size, and taken for models that have been trained before, too.
_PUBLISHED_RATE, _PUBLISHED_ABOVE = 1e-3, 30_000_000


@dataclass(frozen=True)
class Recipe:
    """The numbers of a run.

    Attributes:
        batch_size: chunks per device in one forward pass.
        accumulation: forward passes per update.
        chunks_per_step: chunks in one update after the batch's warm-up, over all devices.
        learning_rate: highest learning rate.
        max_steps: updates at most, or None.
        max_seconds: training time at most, or None; never both None.
        recompute: what the backward pass computes again.
        learning_rate_from: where the learning rate comes from, for people.
        batch_warmup_steps: updates at the start that are smaller; see `count_chunks`.
    """

    batch_size: int
    accumulation: int
    chunks_per_step: int
    learning_rate: float
    max_steps: int | None
    max_seconds: float | None
    recompute: Recompute
    learning_rate_from: str = "given"
    batch_warmup_steps: int = 0


def resolve_recipe(
    options: TrainingOptions, setting: Setting, num_chunks: int, usable: int
) -> Recipe:
    """Returns the numbers of a run: by the options, else what suits model, data and memory.

    A pass recomputes as little as memory allows, and then is as large as memory allows.

    Args:
        options: all options of training.py.
        setting: what is trained and how.
        num_chunks: chunks in the training split.
        usable: bytes that tensors may take on a device.
    """
    config, chunk_size, world_size = setting.config, setting.chunk_size, setting.world_size
    size = config.num_layer_parameters()
    defaults = next(defaults for limit, defaults in _DEFAULTS.items() if size <= limit)

    # An update, in chunks over all devices, and the smaller ones at the start.
    has_budget = options.max_steps is not None or options.max_minutes is not None
    wanted_chunks = defaults.tokens_per_step / chunk_size
    if not has_budget:
        wanted_chunks = min(wanted_chunks, options.epochs * num_chunks / _MIN_STEPS)
    batch_warmup_steps = options.batch_warmup_steps
    if batch_warmup_steps is None:
        batch_warmup_steps = _default_batch_warmup(options, defaults, wanted_chunks / world_size)
    passes = WARMUP_PARTS if batch_warmup_steps else 1  # at least, to be divided into the parts

    # A pass.
    tokens = GPU_PASS_TOKENS if setting.device_type == "cuda" else defaults.tokens_per_pass
    wanted = max(1, min(tokens // chunk_size, round(wanted_chunks / (passes * world_size))))
    batch_size = options.batch_size
    smallest = batch_size or min(wanted, max(1, SMALLEST_GPU_PASS_TOKENS // chunk_size))
    choices = recompute_choices(setting, options.activation_checkpointing)
    recompute = least_recompute(replace(setting, batch_size=smallest), usable, choices)
    if batch_size is None:
        way = replace(setting, recompute=recompute)
        batch_size = max(1, largest_batch(way, usable, wanted))
    accumulation = options.gradient_accumulation_steps
    if accumulation is None:
        accumulation = passes * max(1, round(wanted_chunks / (passes * batch_size * world_size)))

    # The length, and the learning rate.
    chunks_per_step = batch_size * world_size * accumulation
    max_steps = options.max_steps
    if not has_budget:
        max_steps = count_steps(options.epochs * num_chunks, chunks_per_step, batch_warmup_steps)
    learning_rate, learning_rate_from = options.learning_rate, "given"
    if learning_rate is None:
        learning_rate, learning_rate_from = _default_rate(size, defaults.tried_on, options)
    return Recipe(
        batch_size=batch_size,
        accumulation=accumulation,
        chunks_per_step=chunks_per_step,
        learning_rate=learning_rate,
        max_steps=max_steps,
        max_seconds=options.max_minutes * 60 if options.max_minutes is not None else None,
        recompute=recompute,
        learning_rate_from=learning_rate_from,
        batch_warmup_steps=batch_warmup_steps,
    )


def _default_batch_warmup(
    options: TrainingOptions, defaults: _Defaults, chunks_per_device: float
) -> int:
    """Returns the updates of the batch's warm-up; none unless time alone limits the run.

    A quarter of an update must have a chunk for each device, and no option may say otherwise.
    """
    given = (options.max_steps, options.batch_size, options.gradient_accumulation_steps)
    if options.max_minutes is None or any(given) or chunks_per_device < WARMUP_PARTS:
        return 0
    return defaults.batch_warmup_steps


def _default_rate(size: int, tried_on: str, options: TrainingOptions) -> tuple[float, str]:
    """Returns the learning rate of a size in layers, and where it comes from."""
    is_trained = options.init_from is not None
    if size > _PUBLISHED_ABOVE and (is_trained or options.optimizer == "adamw"):
        return _PUBLISHED_RATE, "published for such sizes"
    rate, tried_size = _TRIED_RATES[tried_on], PRESETS[tried_on].num_layer_parameters()
    if size == tried_size:
        return rate, "tried at this size"
    return transfer_rate(rate, tried_size, size), f"extrapolated from {tried_on}"


def tracker_names(options: TrainingOptions) -> list[str]:
    """Returns the trackers that the options name, each once."""
    return sorted({*options.trackers, *(["wandb"] if options.use_wandb else [])})


def check_options(options: TrainingOptions, world_size: int) -> None:
    """Checks combinations; kiem.core.values has checked each value.

    Args:
        options: all options of training.py.
        world_size: devices, present or planned for.

    Raises:
        UserError: two options contradict each other, or one cannot have an effect.
    """
    has_budget = options.max_steps is not None or options.max_minutes is not None
    has_project = {"wandb", "trackio"} & {*tracker_names(options)}
    if options.save_total_limit == 0 and options.save_steps != 0:
        fix = "Give 1 or more, or turn checkpoints off with --save-steps 0."
        raise bad_option("--save-total-limit 0", "every checkpoint would be removed at once", fix)
    if options.save_steps == 0 and options.on_save_failure == "stop":
        raise no_effect("--on-save-failure stop", "with --save-steps 0, which saves nothing")
    if has_budget and options.epochs != 1.0:
        raise no_effect("--epochs", "together with --max-steps or --max-minutes")
    passes = options.gradient_accumulation_steps
    if options.batch_warmup_steps and passes is not None and passes % WARMUP_PARTS:
        what = f"{passes} passes cannot be divided by {WARMUP_PARTS}, as --batch-warmup-steps needs"
        fix = f"Give a multiple of {WARMUP_PARTS}, or leave it out."
        raise bad_option(f"--gradient-accumulation-steps {passes}", what, fix)
    if options.anneal and options.max_minutes is not None:
        what = "which update is the first of its share cannot be known with --max-minutes"
        raise bad_option("--anneal", what, "Give --max-steps or --epochs instead.")
    if not options.anneal and options.anneal_share != TrainingOptions.anneal_share:
        raise no_effect("--anneal-share", "without --anneal")
    if not options.anneal and options.anneal_weights:
        raise no_effect("--anneal-weights", "without --anneal")
    if options.branch_from is not None and options.resume not in ("auto", "none"):
        raise bad_option("--branch-from", "contradicts --resume", "Give one of them.")
    if options.gpu is not None and not options.plan:
        raise no_effect("--gpu", "without --plan")
    if options.ladder is not None and not options.plan:
        raise no_effect("--ladder", "without --plan")
    if options.num_gpus is not None and options.gpu is None:
        raise no_effect("--num-gpus", "without --gpu")
    if options.wandb_project is not None and not has_project:
        raise no_effect("--wandb-project", "without --use-wandb or --trackers trackio")
    if options.shard != "none" and world_size == 1:
        raise no_effect("--shard", "with one device")
    if options.init_from is not None and options.model != "gemma3-1b":
        raise no_effect("--model", "with --init-from, which brings its own shape")


def build_model(options: TrainingOptions, tokenizer: Tokenizer) -> tuple[Gemma3, Path | None]:
    """Returns a new model for the tokenizer's vocabulary, or that of --init-from with its folder.

    Raises:
        UserError: that is no Gemma 3 text model, or has another tokenizer.
    """
    folder = None
    if options.init_from is None:
        with torch.device("meta"):  # torch's own first weights would be drawn in vain
            model = Gemma3(preset(options.model, tokenizer.num_rows))
        initialize(model.to_empty(device="cpu"), options.seed)
    else:
        folder = find_model(options.init_from)
        model = read_model(folder, dtype=torch.float32)
        # Equal vocabularies suffice: Gemma's -it and -pt files, and transformers' own saves, differ
        # in bytes but give every piece of text the same id.
        own = load_tokenizer(str(folder)).implementation.get_vocab(with_added_tokens=False)
        if own != tokenizer.implementation.get_vocab(with_added_tokens=False):
            raise UserError(
                f"the chunks in {options.dataset_path[0]} were made with another tokenizer",
                where=f"--init-from {options.init_from}",
                fix=f"Make them again with preprocess.py --tokenizer {options.init_from}.",
                exit_code=ExitCode.TOKENIZER_MISMATCH,
            )
    model.model.embed_tokens.adds_to_gradient = options.shard != "parameters"
    return model, folder
