"""First passes on made-up tokens, before the run: they compile the layers and find what fits."""

from __future__ import annotations

import logging
import time
import warnings
from dataclasses import dataclass, replace

import numpy as np
import torch
from rich.console import Console

from kiem.compute.cross_entropy import logits_gradient
from kiem.compute.memory import (
    forget_peak_memory,
    give_back_free_memory,
    is_out_of_memory,
    keep_freed_memory,
)
from kiem.config import TrainingOptions
from kiem.core.console import warn
from kiem.core.errors import ExitCode, UserError
from kiem.data.order import WARMUP_PARTS
from kiem.model.gemma3 import Gemma3, Recompute, run_layer
from kiem.optim.batch import Collator
from kiem.parallel.distributed import Distributed
from kiem.planning.memory_estimate import GPU_USABLE_SHARE, Setting, update_cost
from kiem.planning.recipe import SMALLEST_GPU_PASS_TOKENS, Recipe
from kiem.planning.time_estimate import flops_per_token

# Compiling takes up to a minute and saves a twelfth to a third of the time on a CPU; for a GPU
# layers are always compiled. The limits do not depend on a measurement, so that a resumed run
# decides alike. Two cores do the FLOP in five to nine minutes: in fp32 with AVX2, in bf16 with AMX.
_COMPILE_SECONDS = 300
_COMPILE_FLOP = {"fp32": 5e13, "bf16": 1e14}
# Of a GPU's memory a pass that is tried leaves free a little less than the plan does, whose
# estimate may be a percent too low: else it would refuse passes that the plan has just chosen.
_SPARE_SHARE = 0.8 * (1 - GPU_USABLE_SHARE)


@dataclass(frozen=True)
class Probe:
    """First passes of a model, on made-up tokens."""

    model: Gemma3
    options: TrainingOptions
    setting: Setting
    distributed: Distributed
    console: Console

    def prepare(self, recipe: Recipe) -> Recipe:
        """Compiles the layers if that is worthwhile, and finds passes that fit.

        The kernels are made in a pass here, so that failures come before the run and the first
        update takes no longer than the others. With `--shard parameters` that is all: no process
        can do a pass by itself, so none can try another one alone.

        Returns:
            The recipe, with smaller passes but the same updates if memory does not suffice.

        Raises:
            UserError: not even a pass of one chunk fits.
        """
        started = time.perf_counter()
        keep_freed_memory()
        self.model.recompute = recipe.recompute
        if self.is_compiling_worthwhile(recipe):
            self.model.compile_layers()
        if self.setting.shard == "parameters":
            if self.is_compiled and not self._fits(recipe):
                raise out_of_memory(recipe, "before the first step")
        else:
            # Each process tries by itself, so that none waits for one that has failed.
            while self.distributed.any(not self._fits(recipe)):
                recipe = self._with_smaller_passes(recipe)
        if self.is_compiled and self.distributed.is_main:
            self.console.print(f"compiled the layers in {time.perf_counter() - started:.0f} s")
        give_back_free_memory()
        forget_peak_memory(self.distributed.device)
        return recipe

    @property
    def is_compiled(self) -> bool:
        """Whether torch.compile makes, or has made, the kernels of the layers."""
        return self.model.run_layer is not run_layer

    def is_compiling_worthwhile(self, recipe: Recipe) -> bool:
        """Says whether the options ask for compiled layers, or leave it open and they save time."""
        if self.options.compile != "auto" or self.setting.device_type == "cuda":
            return self.options.compile != "never"
        if recipe.max_seconds is not None and recipe.max_seconds < _COMPILE_SECONDS:
            return False
        if recipe.max_steps is None:
            return True
        num_tokens = recipe.max_steps * recipe.chunks_per_step * self.setting.chunk_size
        flop = num_tokens * flops_per_token(self.model.config, self.setting.chunk_size)
        return flop / self.distributed.world_size > _COMPILE_FLOP[self.distributed.precision]

    def _with_smaller_passes(self, recipe: Recipe) -> Recipe:
        """Returns the recipe for less memory: passes of half the size, or more recomputation.

        Recomputation comes last, but on a GPU before passes that are too small to be fast.

        Raises:
            UserError: there is nothing left to save.
        """
        more = self._more_recomputation(recipe)
        least_tokens = SMALLEST_GPU_PASS_TOKENS if self.setting.device_type == "cuda" else 1
        is_large = recipe.batch_size // 2 * self.setting.chunk_size >= least_tokens
        if more is not None and not is_large:
            recipe = replace(recipe, recompute=more)
            smaller = f"--activation-checkpointing {more}"
        elif recipe.batch_size > 1:
            num_chunks = recipe.batch_size * recipe.accumulation
            smallest = num_chunks // WARMUP_PARTS if recipe.batch_warmup_steps else num_chunks
            half = recipe.batch_size // 2
            batch_size = next(size for size in range(half, 0, -1) if smallest % size == 0)
            recipe = replace(recipe, batch_size=batch_size, accumulation=num_chunks // batch_size)
            smaller = f"--batch-size {batch_size}"
            smaller += f" --gradient-accumulation-steps {recipe.accumulation}"
        else:
            raise out_of_memory(recipe, "before the first step")
        warn(self.console, f"out of memory: going on with {smaller}, for the same updates")
        self.model.recompute = recipe.recompute
        if self.is_compiled:
            torch.compiler.reset()  # it compiles a function for so many shapes only
            self.model.compile_layers()
        return recipe

    def _more_recomputation(self, recipe: Recipe) -> Recompute | None:
        """Returns what to recompute instead; None if the option has decided, or all is already."""
        if self.options.activation_checkpointing != "auto" or recipe.recompute == "full":
            return None
        if recipe.recompute == "none" and self.setting.device_type == "cuda":
            return "selective"
        return "full"

    def _fits(self, recipe: Recipe) -> bool:
        """Tries a pass beside gradients and moments, and says whether there was memory for it.

        On a GPU it also leaves free what the allocator will lose between blocks in a long run.
        Where the system promises more memory than it has, as on a CPU, it ends a program instead of
        refusing; there the estimate has to prevent it.
        """
        device = self.distributed.device
        held_bytes = update_cost(self.setting).moment_bytes
        if device.type == "cuda":
            _, total_bytes = torch.cuda.mem_get_info(device)
            held_bytes += int(total_bytes * _SPARE_SHARE)
        try:
            held = torch.empty(held_bytes, dtype=torch.uint8, device=device)
            for parameter in self.model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            self._run_first_pass(recipe)
            del held
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return False
        finally:
            self.model.zero_grad()
        return True

    def _run_first_pass(self, recipe: Recipe) -> None:
        """Runs a pass; with layers that are not compiled if the compiler does not work here."""
        if not self.is_compiled:
            return self._run_pass(recipe)
        from torch._dynamo.exc import TorchDynamoException  # seconds, so only where needed

        # It would warn of in-place operations in a checkpoint, of which the layers have none, and
        # on small GPUs of a search that kiem does not ask for.
        for name in ("torch._higher_order_ops.wrap", "torch._inductor.utils"):
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            with warnings.catch_warnings():
                # fp32 is chosen for its digits, which TF32 would not have.
                warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")
                return self._run_pass(recipe)
        except TorchDynamoException as error:
            if is_out_of_memory(error):
                raise
            cause = getattr(error, "inner_exception", error)
            why = f"{type(cause).__name__}: {str(cause).strip()}".split("\n")[0]
            what = "training goes on without --compile, which does not work here"
            warn(self.console, f"{what}: {why}")
        self.model.run_layer, self.model.logits_gradient = run_layer, logits_gradient
        return self._run_pass(recipe)

    def _run_pass(self, recipe: Recipe) -> None:
        """Runs a pass forward and backward, which adds to the gradients."""
        collate = Collator(0, 0, self.options.document_mask, self.distributed.device)
        batch = collate(np.ones((recipe.batch_size, self.setting.chunk_size), np.int32))
        with self.distributed.autocast():
            loss, _ = self.model(
                batch.ids, batch.targets, batch.document_starts, self.options.z_loss
            )
        loss.backward()


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
