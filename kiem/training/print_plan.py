"""`training.py --plan`: what a training will need and cost, before anything starts."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import psutil
import torch
from rich.console import Console
from rich.table import Table

from kiem.config import TrainingOptions
from kiem.core.files import format_bytes
from kiem.data.chunks import open_split, read_manifest, read_tokenizer
from kiem.model.config_json import read_config
from kiem.model.gemma3 import Recompute
from kiem.model.io import find_model
from kiem.model.presets import Gemma3Config, name_of, preset
from kiem.parallel.distributed import Distributed
from kiem.parallel.parallel_model import Shard
from kiem.planning.gpus import GPUS, Gpu
from kiem.planning.memory import (
    GPU_BASE_BYTES,
    GPU_USABLE_SHARE,
    Memory,
    Seconds,
    Setting,
    calculate_seconds,
    memory_of,
)
from kiem.planning.recipe import Recipe, defaults_for, resolve_recipe, what_to_recompute
from kiem.planning.time_step import time_step
from kiem.training.options import check_devices, check_options

_PARTS = {
    "base": "program and libraries",
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer's moments",
    "compute_copy": "weights in bf16",
    "activations": "activations",
    "logits": "logits of a block of tokens",
    "temporary": "other temporary tensors",
}


@dataclass(frozen=True)
class Hardware:
    """What is planned for.

    Attributes:
        description: for people.
        usable_bytes: memory that a device's process may take.
        base_bytes: what of it the program takes before it makes a model.
    """

    description: str
    usable_bytes: int
    base_bytes: int


@dataclass(frozen=True)
class Plan:
    """What a training will need.

    Attributes:
        recipe: the settled numbers.
        setting: what decides about memory and time.
        hardware: on what.
        memory: of a device.
        seconds: of the parts of an update.
    """

    recipe: Recipe
    setting: Setting
    hardware: Hardware
    memory: Memory
    seconds: Seconds

    @property
    def tokens_per_step(self) -> int:
        """Tokens in an update."""
        return self.recipe.chunks_per_step * self.setting.chunk_size

    @property
    def step_seconds(self) -> float:
        """Time of an update."""
        passes = self.recipe.accumulation * self.seconds.forward_backward
        return passes + self.seconds.update + self.seconds.exchange

    @property
    def num_steps(self) -> int:
        """Updates."""
        most = [] if self.recipe.max_steps is None else [self.recipe.max_steps]
        if self.recipe.max_seconds is not None:
            most.append(math.ceil(self.recipe.max_seconds / self.step_seconds))
        return min(most)


def make_plan(options: TrainingOptions, distributed: Distributed, console: Console) -> Plan:
    """Plans a training.

    Args:
        options: all options of training.py.
        distributed: this machine's, which are planned for without `--gpu`.
        console: where it goes if the layers cannot be compiled.

    Raises:
        UserError: an option, the data or the model is wrong.
    """
    check_options(options)
    manifest = read_manifest(options.dataset_path)
    tokenizer = read_tokenizer(options.dataset_path, manifest)
    config = (
        preset(options.model, tokenizer.num_rows)
        if options.init_from is None
        else read_config(find_model(options.init_from))
    )
    gpu = GPUS[options.gpu] if options.gpu else None
    if gpu is not None:
        precision: Literal["fp32", "bf16"] = "fp32" if options.precision == "fp32" else "bf16"
        where = torch.device("cuda")
        distributed = replace(
            distributed, world_size=options.num_gpus or 1, device=where, precision=precision
        )
    check_devices(options, distributed)
    hardware = _planned_hardware(gpu, distributed)
    num_chunks, chunk_size = (
        manifest["splits"]["train"]["chunks"],
        manifest["options"]["chunk_size"],
    )
    setting = setting_of(config, options, distributed, chunk_size)
    recipe = resolve_recipe(
        options,
        defaults_for(config, distributed.device.type == "cuda"),
        num_chunks,
        chunk_size,
        distributed.world_size,
        partial(largest_batch, setting, hardware),
    )
    setting = replace(setting, batch_size=recipe.batch_size)
    if gpu:
        seconds = calculate_seconds(setting, gpu)
    else:
        chunks = open_split(options.dataset_path, manifest, "train")
        rehearsal = time_step(
            setting, options, recipe, chunks, tokenizer.special_ids, distributed, console
        )
        seconds = rehearsal.seconds
        if rehearsal.base_bytes is not None:
            hardware = replace(hardware, base_bytes=rehearsal.base_bytes)
    memory = memory_of(setting, hardware.base_bytes)
    return Plan(recipe, setting, hardware, memory, seconds)


def setting_of(
    config: Gemma3Config, options: TrainingOptions, distributed: Distributed, chunk_size: int
) -> Setting:
    """Returns what the options settle but the batch size, which is 1 here."""
    return Setting(
        config=config,
        chunk_size=chunk_size,
        batch_size=1,
        bf16=distributed.precision == "bf16",
        recompute=what_to_recompute(options, config),
        document_mask=options.document_mask,
        optimizer=options.optimizer,
        world_size=distributed.world_size,
        shard=options.shard,
    )


def print_plan(options: TrainingOptions, distributed: Distributed, console: Console) -> None:
    """Prints the plan of a training; arguments and errors as of `make_plan`."""
    plan = make_plan(options, distributed, console)
    config, setting = plan.setting.config, plan.setting
    precision = "bf16" if setting.bf16 else "fp32"
    source = (
        "All figures are calculated: memory from tensor sizes, time from published peaks."
        if options.gpu
        else "Tensors are calculated; what the program takes beside them, and time, are measured."
    )
    console.print(
        f"{name_of(config)}: {config.num_parameters():,} parameters, vocabulary of "
        f"{config.vocab_size:,}; {setting.world_size} x {plan.hardware.description} in {precision}"
    )
    console.print(source)
    console.print(_memory_table(plan))
    console.print(_ways_table(plan))
    console.print(_time_table(plan, options.price))


def _planned_hardware(gpu: Gpu | None, distributed: Distributed) -> Hardware:
    if gpu is not None:
        usable_bytes = int(gpu.memory_bytes * GPU_USABLE_SHARE)
        return Hardware(
            f"{gpu.name} of {gpu.memory_bytes / 1e9:g} GB", usable_bytes, GPU_BASE_BYTES
        )
    return hardware_here(distributed)


def hardware_here(distributed: Distributed) -> Hardware:
    """Returns what this process has to itself."""
    if distributed.device.type == "cuda":
        free_bytes, _ = torch.cuda.mem_get_info(distributed.device)
        return Hardware(distributed.name, int(free_bytes * GPU_USABLE_SHARE), 0)
    here = psutil.Process().memory_info().rss
    usable_bytes = psutil.virtual_memory().available // distributed.world_size + here
    return Hardware(distributed.name, usable_bytes, here)


def _memory_table(plan: Plan) -> Table:
    table = Table(title="memory of a device", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for part, num_bytes in vars(plan.memory).items():
        table.add_row(_PARTS[part], format_bytes(num_bytes))
    usable = plan.hardware.usable_bytes
    verdict = "fits into" if plan.memory.total <= usable else "DOES NOT FIT into"
    table.add_section()
    table.add_row(f"in all; {verdict} {format_bytes(usable)}", format_bytes(plan.memory.total))
    return table


def _ways_table(plan: Plan) -> Table:
    """What fits: for each way to save memory the largest batch that does, with the same update."""
    setting, hardware = plan.setting, plan.hardware
    num_chunks = plan.recipe.batch_size * plan.recipe.accumulation
    table = Table(title="what fits", title_justify="left")
    for title in ("--activation-checkpointing", "--shard", "batch size x accumulation"):
        table.add_column(title)
    table.add_column("memory", justify="right")
    recomputes: tuple[Recompute, ...] = ("none", "selective", "full")
    shards: tuple[Shard, ...] = ("none",)
    if setting.world_size > 1:
        shards = ("none", "optimizer", "parameters")
        if setting.optimizer == "muon":  # which needs whole matrices
            shards = shards[:2]
    for recompute in recomputes:
        for shard in shards:
            way = replace(setting, recompute=recompute, shard=shard)
            size = largest_batch(way, hardware, setting.batch_size)
            memory = memory_of(replace(way, batch_size=size or 1), hardware.base_bytes)
            cut = f"{size} x {num_chunks // size}" if size else "not even 1"
            table.add_row(recompute, shard, cut, format_bytes(memory.total))
    return table


def _time_table(plan: Plan, price: float | None) -> Table:
    recipe = plan.recipe
    hours = plan.num_steps * plan.step_seconds / 3600
    table = Table(title="time", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    cut = f"{recipe.batch_size} x {recipe.accumulation} x {plan.setting.world_size}"
    table.add_row("batch size x accumulation x devices", cut)
    table.add_row("tokens per update", f"{plan.tokens_per_step:,}")
    table.add_row("updates", f"{plan.num_steps:,}")
    table.add_row("tokens", f"{plan.num_steps * plan.tokens_per_step:,}")
    table.add_row("tokens per second", f"{plan.tokens_per_step / plan.step_seconds:,.0f}")
    table.add_row("hours", f"{hours:,.2f}")
    if price is not None:
        table.add_row("cost", f"{hours * price:,.2f}")
    return table


def largest_batch(setting: Setting, hardware: Hardware, wanted: int) -> int:
    """Returns the largest number of chunks in a pass, `wanted` or its half and so on, that fits.

    0 if not even one chunk does.
    """
    size = wanted
    while size:
        memory = memory_of(replace(setting, batch_size=size), hardware.base_bytes)
        if memory.total <= hardware.usable_bytes:
            return size
        size //= 2
    return 0
