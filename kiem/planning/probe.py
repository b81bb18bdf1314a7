"""First passes on made-up tokens, before the run: they compile the layers and find what fits."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace

import numpy as np
import torch
from rich.console import Console

from kiem.compute.cross_entropy import logits_gradient
from kiem.compute.memory import is_out_of_memory
from kiem.config import TrainingOptions
from kiem.core.console import warn
from kiem.core.errors import ExitCode, UserError
from kiem.model.gemma3 import Gemma3, run_layer
from kiem.optim.batch import Collator
from kiem.parallel.distributed import Distributed
from kiem.planning.recipe import Recipe
from kiem.planning.time_estimate import flops_per_token

# Compiling takes up to a minute and saves a fifth to a third of the time. The limits do not depend
# on a measurement, so that a resumed run decides alike.
_COMPILE_SECONDS = 300
_COMPILE_FLOP = {"cpu": 3e14, "cuda": 1e16}


@dataclass(frozen=True)
class Probe:
    """First passes of a model, on made-up tokens."""

    model: Gemma3
    options: TrainingOptions
    chunk_size: int
    distributed: Distributed
    console: Console

    def fit_recipe(self, recipe: Recipe) -> Recipe:
        """Returns the recipe, with smaller passes but the same updates if memory does not suffice.

        Where the system promises more memory than it has, it ends a program instead of refusing;
        there the estimate has to prevent it. With `--shard parameters` nothing is tried: no process
        can do a pass by itself.

        Raises:
            UserError: not even a pass of one chunk fits.
        """
        if self.options.shard == "parameters":
            return recipe
        # Each process tries by itself, so that none waits for one that has failed.
        while self.distributed.any(not self._fits(recipe.batch_size)):
            if recipe.batch_size == 1:
                raise out_of_memory(recipe, "before the first step")
            passes = recipe.batch_size * recipe.accumulation
            half = recipe.batch_size // 2
            batch_size = next(size for size in range(half, 0, -1) if passes % size == 0)
            recipe = replace(recipe, batch_size=batch_size, accumulation=passes // batch_size)
            smaller = f"--batch-size {batch_size}"
            smaller += f" --gradient-accumulation-steps {recipe.accumulation}"
            warn(self.console, f"out of memory: going on with {smaller}, for the same updates")
        return recipe

    def compile_if_worthwhile(self, recipe: Recipe) -> bool:
        """Compiles the layers if the options say so or the training is long enough.

        The kernels are made in a pass here, so that failures come before the run and the first
        update takes no longer than the others.

        Returns:
            Whether the layers are compiled.
        """
        if not self.is_compiling_worthwhile(recipe):
            return False
        from torch._dynamo.exc import BackendCompilerFailed  # seconds, so only where needed
        from torch._inductor.exc import InductorError

        started = time.perf_counter()
        self.model.compile_layers()
        # It would warn of in-place operations in a checkpoint; the layers have none.
        logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
        try:
            self._run_pass(recipe.batch_size)
        except (BackendCompilerFailed, InductorError) as error:
            what = "training goes on without --compile, which does not work here"
            warn(self.console, f"{what}: {str(error).splitlines()[0]}")
            self.model.run_layer, self.model.logits_gradient = run_layer, logits_gradient
            return False
        if self.distributed.is_main:
            self.console.print(f"compiled the layers in {time.perf_counter() - started:.0f} s")
        return True

    def is_compiling_worthwhile(self, recipe: Recipe) -> bool:
        """Says whether the options ask for compiled layers, or leave it open and they save time."""
        if self.options.compile != "auto":
            return self.options.compile == "always"
        if recipe.max_seconds is not None and recipe.max_seconds < _COMPILE_SECONDS:
            return False
        if recipe.max_steps is None:
            return True
        num_tokens = recipe.max_steps * recipe.chunks_per_step * self.chunk_size
        flop = num_tokens * flops_per_token(self.model.config, self.chunk_size)
        device = self.distributed.device.type
        return flop / self.distributed.world_size > _COMPILE_FLOP[device]

    def _fits(self, batch_size: int) -> bool:
        """Tries a pass beside gradients and moments, and says whether there was memory for it."""
        parameters = list(self.model.parameters())
        num_moments = 2 * sum(parameter.numel() for parameter in parameters)
        if self.options.shard == "optimizer":
            num_moments //= self.distributed.world_size
        try:
            moments = torch.empty(num_moments, device=self.distributed.device)
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter)
            # A quarter more than will be needed: allocators lose some memory between their blocks.
            self._run_pass(batch_size + batch_size // 4)
            del moments
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return False
        return True

    def _run_pass(self, batch_size: int) -> None:
        """Runs a pass forward and backward; it leaves no gradients."""
        collate = Collator(0, 0, self.options.document_mask, self.distributed.device)
        batch = collate(np.ones((batch_size, self.chunk_size), np.int32))
        try:
            with self.distributed.autocast():
                loss, _ = self.model(
                    batch.ids, batch.targets, batch.document_starts, self.options.z_loss
                )
            loss.backward()
        finally:
            self.model.zero_grad()


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
