"""Passes that fit into memory: tried before the first update, while nothing can be lost."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from rich.console import Console

from kiem.compute.memory import is_out_of_memory as is_out_of_memory
from kiem.config import TrainingOptions
from kiem.core.console import warn
from kiem.core.errors import ExitCode, UserError
from kiem.model.gemma3 import Gemma3
from kiem.optim.batch import Collator
from kiem.parallel.distributed import Distributed
from kiem.planning.recipe import Recipe


def fit_recipe(
    model: Gemma3,
    options: TrainingOptions,
    recipe: Recipe,
    chunk_size: int,
    distributed: Distributed,
    console: Console,
) -> Recipe:
    """Returns the recipe, with smaller passes, but the same updates, if memory does not suffice.

    A pass is tried in each process by itself, so that none waits for one that has failed, beside
    gradients of an earlier pass and as much memory as the optimizer will take. A Linux that
    promises more memory than it has ends a program instead; there the plan has to see to it. With
    `--shard parameters` nothing is tried: no process can do a pass by itself.

    Raises:
        UserError: not even a pass of one chunk fits.
    """
    if options.shard == "parameters":
        return recipe
    while distributed.any(not fits(model, options, recipe, chunk_size, distributed)):
        if recipe.batch_size == 1:
            raise out_of_memory(recipe, "before the first step")
        passes = recipe.batch_size * recipe.accumulation
        half = recipe.batch_size // 2
        batch_size = next(size for size in range(half, 0, -1) if passes % size == 0)
        recipe = replace(recipe, batch_size=batch_size, accumulation=passes // batch_size)
        warn(
            console,
            f"out of memory: going on with --batch-size {recipe.batch_size} "
            f"--gradient-accumulation-steps {recipe.accumulation}, which gives the same updates",
        )
    return recipe


def try_pass(
    model: Gemma3, options: TrainingOptions, size: tuple[int, int], distributed: Distributed
) -> None:
    """Does a pass forward and backward on made-up tokens, and leaves no gradients behind.

    Args:
        model, options, devices: of the run.
        size: chunks in the pass, and tokens in each.
    """
    collate = Collator(0, 0, options.document_mask, distributed.device)
    batch = collate(np.ones(size, dtype=np.int32))
    try:
        with distributed.autocast():
            loss, _ = model(batch.ids, batch.targets, batch.bos_id, options.z_loss)
        loss.backward()
    finally:
        model.zero_grad()


def out_of_memory(recipe: Recipe, where: str) -> UserError:
    """Returns the error for a training that does not fit."""
    smaller = "--activation-checkpointing full"
    if recipe.batch_size > 1:
        half, double = recipe.batch_size // 2, recipe.accumulation * 2
        smaller = f"--batch-size {half} --gradient-accumulation-steps {double}"
    return UserError(
        "there is not enough memory",
        where=where,
        fix=f"Try {smaller}, or chunks made with a smaller --chunk-size.",
        exit_code=ExitCode.OUT_OF_MEMORY,
    )


def fits(
    model: Gemma3,
    options: TrainingOptions,
    recipe: Recipe,
    chunk_size: int,
    distributed: Distributed,
) -> bool:
    """Tries a pass and says whether there was memory for it; arguments as of `fit_recipe`."""
    num_values = sum(parameter.numel() for parameter in model.parameters())
    held = distributed.world_size if options.shard == "optimizer" else 1
    # A quarter more than will be needed: allocators lose some memory between their blocks.
    size = (recipe.batch_size + recipe.batch_size // 4, chunk_size)
    try:
        moments = torch.empty(2 * num_values // held, device=distributed.device)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        try_pass(model, options, size, distributed)
        del moments
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True
