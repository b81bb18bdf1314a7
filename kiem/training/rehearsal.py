"""What an update takes here: true passes of a model of the same shape with fewer layers."""

from __future__ import annotations

from dataclasses import dataclass, replace

from rich.console import Console
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from kiem.config import TrainingOptions
from kiem.data.chunks import Chunks
from kiem.memory import (
    give_back_free_memory,
    held_to_the_end,
    keep_freed_memory,
    peak_memory_bytes,
)
from kiem.model.gemma3 import Gemma3
from kiem.model.initialize import initialize
from kiem.model.loss import next_token_targets
from kiem.speed import shortest_seconds
from kiem.training.batches import Order, micro_batches
from kiem.training.compiling import compile_if_worthwhile, is_wanted
from kiem.training.devices import Devices
from kiem.training.fit import fits
from kiem.training.optimizer import make_optimizers
from kiem.training.plan import Seconds, Setting, memory_of
from kiem.training.recipe import Recipe
from kiem.training.sharding import Sharing

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


def rehearse(
    setting: Setting,
    options: TrainingOptions,
    recipe: Recipe,
    chunks: Chunks,
    special_ids: dict[str, int],
    devices: Devices,
    console: Console,
) -> Rehearsal:
    """Does some passes and updates on this process's device, as the training would.

    Args:
        setting, options, recipe: what is trained how.
        chunks: of the training split.
        special_ids: the tokenizer's control ids.
        devices: where, and in which precision.
        console: where it is said if the layers cannot be compiled.
    """
    keep_freed_memory()
    wanted = is_wanted(setting.config, options, recipe, setting.chunk_size, devices)
    options = replace(options, compile="always" if wanted else "never")
    num_layers = setting.config.num_hidden_layers
    most = min(num_layers, _MOST_LAYERS)

    one_pass = setting.batch_size * devices.world_size
    numbers = Order(chunks.num_chunks, options.seed).chunks(0, one_pass)
    ids = micro_batches(chunks, numbers, setting.batch_size, devices)[0]
    targets = next_token_targets(ids, special_ids["bos"], special_ids["pad"])
    bos_id = special_ids["bos"] if setting.document_mask else None

    def rehearse_layers(number: int) -> Seconds:
        config = replace(setting.config, num_hidden_layers=number)
        fewer = replace(setting, config=config)
        return _time(fewer, options, recipe, (ids, targets, bos_id), devices, console)

    several = rehearse_layers(most)
    base_bytes = None
    if devices.device.type == "cpu":  # elsewhere the peak is that of tensors
        config = replace(setting.config, num_hidden_layers=most)
        tensors = memory_of(replace(setting, config=config, world_size=1, shard="none"), 0)
        base_bytes = max(0, peak_memory_bytes(devices.device) - tensors.total)
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
    batch: tuple[Tensor, Tensor, int | None],
    devices: Devices,
    console: Console,
) -> Seconds:
    with devices.device:
        model = Gemma3(setting.config)
    initialize(model, seed=0)  # with larger logits, numbers too small for full speed come up
    model.recompute = setting.recompute
    model.model.embed_tokens.adds_to_gradient = True
    fits(model, options, recipe, setting.chunk_size, devices)  # for the memory that it takes
    compile_if_worthwhile(model, options, recipe, setting.chunk_size, devices, console)
    give_back_free_memory()
    with held_to_the_end():
        sharing = Sharing(model, replace(devices, world_size=1), "none")
        optimizers = make_optimizers(
            model, setting.optimizer, 0.1, matrix_dtype=devices.matrix_dtype
        )

    def forward_backward() -> None:
        with devices.autocast():
            loss, _ = sharing.wrapped(*batch, options.z_loss, 1 / batch[0].numel())
        loss.backward()

    def update() -> None:
        clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()

    return Seconds(
        shortest_seconds(forward_backward, devices.device, _SECONDS_EACH),
        shortest_seconds(update, devices.device, _SECONDS_EACH),
    )
