"""Whether to compile the model's layers, and what to do where that is not possible."""

from __future__ import annotations

import logging
import time

from rich.console import Console

from kiem.config import TrainingOptions
from kiem.core.console import warn
from kiem.model.gemma3 import Gemma3, run_layer
from kiem.model.presets import Gemma3Config
from kiem.parallel.distributed import Distributed
from kiem.planning.fit import try_pass
from kiem.planning.flops import flops_per_token
from kiem.planning.recipe import Recipe

# Compiling takes up to a minute and saves a fifth to a third of the time. A number that does not
# depend on a measurement, so that a run that is resumed decides alike.
_WORTHWHILE_MINUTES = 5
_WORTHWHILE_FLOP = {"cpu": 3e14, "cuda": 1e16}


def compile_if_worthwhile(
    model: Gemma3,
    options: TrainingOptions,
    recipe: Recipe,
    chunk_size: int,
    distributed: Distributed,
    console: Console,
) -> bool:
    """Compiles the model's layers if the options say so or the training is long enough.

    The kernels are made here, on made-up tokens, so that the time of the first update is that
    of an update and what goes wrong, goes wrong before the run.

    Returns:
        Whether the layers are compiled.
    """
    if not is_wanted(model.config, options, recipe, chunk_size, distributed):
        return False
    from torch._dynamo.exc import BackendCompilerFailed  # seconds, so only where needed
    from torch._inductor.exc import InductorError

    started = time.perf_counter()
    model.compile_layers()
    # It would warn of in-place operations in a checkpoint; the layers have none.
    logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
    try:
        try_pass(model, options, (recipe.batch_size, chunk_size), distributed)
    except (BackendCompilerFailed, InductorError) as error:
        reason = str(error).splitlines()[0]
        warn(console, f"training goes on without --compile, which does not work here: {reason}")
        model.run_layer = run_layer
        return False
    if distributed.is_main:
        console.print(f"compiled the layers in {time.perf_counter() - started:.0f} s")
    return True


def is_wanted(
    config: Gemma3Config,
    options: TrainingOptions,
    recipe: Recipe,
    chunk_size: int,
    distributed: Distributed,
) -> bool:
    """Says whether the options ask for compiled layers, or leave it open and they gain time.

    Args:
        config: the model's shape.
        options, recipe, devices: of the run.
        chunk_size: tokens in a chunk.
    """
    if options.compile != "auto":
        return options.compile == "always"
    if recipe.max_seconds is not None and recipe.max_seconds < 60 * _WORTHWHILE_MINUTES:
        return False
    if recipe.max_steps is None:
        return True
    num_tokens = recipe.max_steps * recipe.chunks_per_step * chunk_size / distributed.world_size
    flop = num_tokens * flops_per_token(config, chunk_size)
    return flop > _WORTHWHILE_FLOP[distributed.device.type]
