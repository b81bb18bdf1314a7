"""What an update takes here: true passes of a model of the same shape with fewer layers."""

from __future__ import annotations

from dataclasses import dataclass, replace

from rich.console import Console
from torch.nn.utils import clip_grad_norm_

from kiem.compute.memory import (
    give_back_free_memory,
    held_to_the_end,
    keep_freed_memory,
    peak_memory_bytes,
)
from kiem.compute.speed import shortest_seconds
from kiem.config import TrainingOptions
from kiem.data.chunks import Chunks
from kiem.model.gemma3 import Gemma3
from kiem.model.initialize import initialize
from kiem.optim.batch import Batch, Collator, Order, micro_batches
from kiem.optim.optimizer import make_optimizers
from kiem.parallel.distributed import Distributed
from kiem.parallel.parallel_model import ParallelModel
from kiem.planning.compiling import compile_if_worthwhile, is_wanted
from kiem.planning.fit import fits
from kiem.planning.memory import Seconds, Setting, memory_of
from kiem.planning.recipe import Recipe

# Layers take the same time each, so the time of more follows from one and so many.
_MOST_LAYERS = 7
_SECONDS_EACH = 2.0


@dataclass(frozen=True)
class Rehearsal:
    """What the passes took.

    Attributes:
        seconds: of the parts of an update.
        base_bytes: memory that is not tensors: program, libraries, compiler, gaps; None if unknown.
    """

    seconds: Seconds
    base_bytes: int | None


def time_step(
    setting: Setting,
    options: TrainingOptions,
    recipe: Recipe,
    chunks: Chunks,
    special_ids: dict[str, int],
    distributed: Distributed,
    console: Console,
) -> Rehearsal:
    """Does some passes and updates on this process's device, as the training would.

    Args:
        setting, options, recipe: what is trained how.
        chunks: of the training split.
        special_ids: the tokenizer's control ids.
        distributed: where, and in which precision.
        console: where it is said if the layers cannot be compiled.
    """
    keep_freed_memory()
    wanted = is_wanted(setting.config, options, recipe, setting.chunk_size, distributed)
    options = replace(options, compile="always" if wanted else "never")
    num_layers = setting.config.num_hidden_layers
    most = min(num_layers, _MOST_LAYERS)

    one_pass = setting.batch_size * distributed.world_size
    numbers = Order(chunks.num_chunks, options.seed).chunks(0, one_pass)
    bos_id, pad_id = special_ids["bos"], special_ids["pad"]
    collate = Collator(bos_id, pad_id, setting.document_mask, distributed.device)
    batch = micro_batches(chunks, numbers, setting.batch_size, collate, distributed)[0]

    def rehearse_layers(number: int) -> Seconds:
        config = replace(setting.config, num_hidden_layers=number)
        fewer = replace(setting, config=config)
        return _time(fewer, options, recipe, batch, distributed, console)

    several = rehearse_layers(most)
    base_bytes = None
    if distributed.device.type == "cpu":  # elsewhere the peak is that of tensors
        config = replace(setting.config, num_hidden_layers=most)
        tensors = memory_of(replace(setting, config=config, world_size=1, shard="none"), 0)
        base_bytes = max(0, peak_memory_bytes(distributed.device) - tensors.total)
    if most == num_layers:
        return Rehearsal(several, base_bytes)
    one = rehearse_layers(1)
    more = (num_layers - most) / (most - 1)
    seconds = Seconds(
        several.forward_backward + more * (several.forward_backward - one.forward_backward),
        several.update + more * (several.update - one.update),
    )
    return Rehearsal(seconds, base_bytes)


def _time(
    setting: Setting,
    options: TrainingOptions,
    recipe: Recipe,
    batch: Batch,
    distributed: Distributed,
    console: Console,
) -> Seconds:
    with distributed.device:
        model = Gemma3(setting.config)
    initialize(model, seed=0)  # with larger logits, numbers too small for full speed come up
    model.recompute = setting.recompute
    model.model.embed_tokens.adds_to_gradient = True
    fits(model, options, recipe, setting.chunk_size, distributed)  # for the memory that it takes
    compile_if_worthwhile(model, options, recipe, setting.chunk_size, distributed, console)
    give_back_free_memory()
    with held_to_the_end():
        parallel_model = ParallelModel(model, replace(distributed, world_size=1), "none")
        optimizers = make_optimizers(
            model, setting.optimizer, 0.1, matrix_dtype=distributed.matrix_dtype
        )

    def forward_backward() -> None:
        with distributed.autocast():
            loss, _ = parallel_model(
                batch.ids, batch.targets, batch.bos_id, options.z_loss, 1 / batch.ids.numel()
            )
        loss.backward()

    def update() -> None:
        clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()

    return Seconds(
        shortest_seconds(forward_backward, distributed.device, _SECONDS_EACH),
        shortest_seconds(update, distributed.device, _SECONDS_EACH),
    )
