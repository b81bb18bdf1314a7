"""Plans of a training, `training.py --plan`: its memory, time and cost, before anything starts."""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from dataclasses import dataclass, replace
from itertools import product
from typing import get_args

import torch
from rich.console import Console
from rich.table import Table

from kiem.compute.memory import peak_memory_bytes
from kiem.config import TrainingOptions
from kiem.core.console import warn
from kiem.core.files import format_bytes
from kiem.data.mixture import Mixture, describe_reads, read_mixture, warnings_of_epochs
from kiem.data.order import chunk_numbers, count_chunks
from kiem.model.config import name_of, preset, read_config
from kiem.model.gemma3 import Recompute
from kiem.model.io import find_model
from kiem.optim.batch import Collator
from kiem.optim.optimizer import make_optimizers
from kiem.optim.step import Verdict, train_step
from kiem.parallel.distributed import Distributed
from kiem.parallel.parallel_model import ParallelModel, Shard
from kiem.planning.memory_estimate import (
    GPU_USABLE_SHARE,
    Setting,
    estimate_memory,
    largest_batch,
    setting_of,
    usable_bytes,
)
from kiem.planning.print_forecast import Budget, find_ladder, print_forecast
from kiem.planning.probe import Probe
from kiem.planning.recipe import (
    GPU_PASS_TOKENS,
    Recipe,
    build_model,
    check_options,
    resolve_recipe,
)
from kiem.planning.time_estimate import GPUS, Gpu, calculate_step_seconds

_GPU_PROGRAM_BYTES = 600_000_000  # of a driver and its libraries
_TIMING_SECONDS = 5.0


@dataclass(frozen=True)
class TrainingPlan:
    """What a training will need.

    Attributes:
        mixture, recipe, setting: what is trained on what, and how.
        usable: bytes that tensors may take on a device.
        step_seconds: time of an update after the batch's warm-up; None if it does not fit into
            this machine.
        pass_seconds: by how much each further pass makes an update longer.
        program_bytes: memory beside the tensors, where that was measured.
    """

    mixture: Mixture
    recipe: Recipe
    setting: Setting
    usable: int
    step_seconds: float | None = None
    pass_seconds: float = 0.0
    program_bytes: int = 0

    @property
    def tokens_per_step(self) -> int:
        """Tokens in an update after the batch's warm-up."""
        return self.recipe.chunks_per_step * self.setting.chunk_size

    @property
    def num_steps(self) -> int | None:
        """Updates; None if minutes limit them and the time of one is not known."""
        limits = [self.recipe.max_steps] if self.recipe.max_steps is not None else []
        if self.recipe.max_seconds is not None and self.step_seconds is not None:
            most = self.recipe.batch_warmup_steps
            most += math.ceil(self.recipe.max_seconds / self.step_seconds)
            limits.append(bisect_left(range(most), self.recipe.max_seconds, key=self.seconds))
        return min(limits, default=None)

    def tokens(self, num_steps: int) -> int:
        """Returns the tokens of the first updates."""
        recipe = self.recipe
        num_chunks = count_chunks(num_steps, recipe.chunks_per_step, recipe.batch_warmup_steps)
        return num_chunks * self.setting.chunk_size

    def seconds(self, num_steps: int) -> float:
        """Returns the time of the first updates."""
        assert self.step_seconds is not None
        num_missing = num_steps * self.tokens_per_step - self.tokens(num_steps)
        passes_missing = self.recipe.accumulation * num_missing / self.tokens_per_step
        return num_steps * self.step_seconds - passes_missing * self.pass_seconds


def make_plan(options: TrainingOptions, distributed: Distributed, console: Console) -> TrainingPlan:
    """Plans a training: calculates with `--gpu`, else times true updates if they fit.

    Raises:
        UserError: an option, the data or the model is wrong.
    """
    # Hardware.
    gpu = GPUS[options.gpu] if options.gpu else None
    if gpu is None:
        usable = usable_bytes(distributed)
    else:
        usable = int(gpu.memory_bytes * GPU_USABLE_SHARE) - _GPU_PROGRAM_BYTES
        distributed = replace(
            distributed,
            world_size=options.num_gpus or 1,
            device=torch.device("cuda"),
            precision="fp32" if options.precision == "fp32" else "bf16",
        )

    # Model and data.
    check_options(options, distributed.world_size)
    mixture = read_mixture(options)
    tokenizer = mixture.tokenizer
    if options.init_from is None:
        config = preset(options.model, tokenizer.num_rows)
    else:
        config = read_config(find_model(options.init_from))
    chunk_size = mixture.manifest["options"]["chunk_size"]
    setting = setting_of(config, options, distributed, chunk_size)

    # Recipe.
    recipe = resolve_recipe(options, setting, mixture.num_chunks, usable)
    setting = replace(setting, batch_size=recipe.batch_size, recompute=recipe.recompute)
    plan = TrainingPlan(mixture, recipe, setting, usable)

    # Time.
    if gpu is not None:
        step_seconds = calculate_step_seconds(setting, recipe.accumulation, gpu)
        one, two = (calculate_step_seconds(setting, num_passes, gpu) for num_passes in (1, 2))
        return replace(plan, step_seconds=step_seconds, pass_seconds=two - one)
    if estimate_memory(_alone(setting)).total > usable:
        return plan
    return _measure(plan, options, distributed, console)


def _alone(setting: Setting) -> Setting:
    return replace(setting, world_size=1, shard="none")


def _measure(
    plan: TrainingPlan,
    options: TrainingOptions,
    distributed: Distributed,
    console: Console,
) -> TrainingPlan:
    """Returns the plan with what updates on this device alone take, with passes that fit."""
    # Prepare the model as the training would.
    mixture, tokenizer = plan.mixture, plan.mixture.tokenizer
    model = build_model(options, tokenizer)[0].to(distributed.device)
    alone = replace(distributed, rank=0, world_size=1)
    probe = Probe(model, options, _alone(plan.setting), alone, console)
    recipe = probe.prepare(plan.recipe)
    parallel_model = ParallelModel(model, alone, "none")
    optimizers = make_optimizers(
        model, options.optimizer, options.weight_decay, matrix_dtype=distributed.matrix_dtype
    )
    collate = Collator(
        tokenizer.bos_id, tokenizer.pad_id, options.document_mask, distributed.device
    )
    order = mixture.order(options, recipe.batch_size, None)
    batch = collate(mixture.train_chunks().read(chunk_numbers(order, 0)))

    def step(num_passes: int) -> float:
        started = time.perf_counter()
        batches, judge = [batch] * num_passes, lambda *_: Verdict("update")
        train_step(parallel_model, optimizers, batches, alone, options, 0.0, judge)
        if distributed.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    # Time updates of one and of two passes; each further pass takes as long as the second.
    step(1)  # prepares what stays
    one = two = math.inf
    deadline = time.monotonic() + _TIMING_SECONDS
    while two == math.inf or time.monotonic() < deadline:
        one, two = min(one, step(1)), min(two, step(2))
    pass_seconds = max(0.0, two - one)
    step_seconds = one + (recipe.accumulation - 1) * pass_seconds

    setting = replace(plan.setting, batch_size=recipe.batch_size, recompute=recipe.recompute)
    program_bytes = 0
    if distributed.device.type == "cpu":  # elsewhere the peak is that of tensors
        tensor_bytes = estimate_memory(_alone(setting)).total
        program_bytes = max(0, peak_memory_bytes(distributed.device) - tensor_bytes)
    return TrainingPlan(
        mixture, recipe, setting, plan.usable, step_seconds, pass_seconds, program_bytes
    )


def print_plan(options: TrainingOptions, distributed: Distributed, console: Console) -> None:
    """Prints the plan of a training; errors as of `make_plan`."""
    plan = make_plan(options, distributed, console)
    config, setting = plan.setting.config, plan.setting
    console.print(
        f"{name_of(config)}: {config.num_parameters():,} parameters, vocabulary of "
        f"{config.vocab_size:,}; {setting.world_size} x "
        f"{GPUS[options.gpu].name if options.gpu else distributed.name} in "
        f"{'bf16' if setting.bf16 else 'fp32'}"
    )
    memory = estimate_memory(setting)
    verdict = "fit into" if memory.total <= plan.usable else "DO NOT FIT into"
    table = _table("memory of a device, calculated")
    for part, num_bytes in vars(memory).items():
        table.add_row(part, format_bytes(num_bytes))
    table.add_section()
    table.add_row(f"tensors; {verdict} {format_bytes(plan.usable)}", format_bytes(memory.total))
    if plan.program_bytes:
        table.add_row("program beside them, measured", format_bytes(plan.program_bytes))
    console.print(table)
    console.print(_fitting_table(plan, GPUS[options.gpu] if options.gpu else None))
    if plan.step_seconds is None:
        console.print("The training does not fit into this machine, so its time is not measured.")
    else:
        how = "calculated from published figures" if options.gpu else "measured"
        console.print(_time_table(f"time, {how}", plan, options.price))
        if options.init_from is None:  # no ladder tells how much a trained model learns
            assert plan.num_steps is not None
            text_tokens = plan.mixture.num_chunks * setting.chunk_size
            num_tokens = plan.tokens(plan.num_steps)
            budget = Budget(config, num_tokens, text_tokens, setting.chunk_size)
            print_forecast(budget, find_ladder(options), console)
    recipe = plan.recipe
    order = plan.mixture.order(
        options, recipe.chunks_per_step, recipe.max_steps, recipe.batch_warmup_steps
    )
    console.print(f"the training reads {describe_reads(order, plan.num_steps)}")
    for warning in warnings_of_epochs(order, plan.num_steps or 0):
        warn(console, warning)


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    return table


def _fitting_table(plan: TrainingPlan, gpu: Gpu | None) -> Table:
    """Returns the largest batch that fits for each way to save memory, and its speed on a GPU."""
    setting, num_chunks = plan.setting, plan.recipe.batch_size * plan.recipe.accumulation
    most = setting.batch_size
    if setting.device_type == "cuda":
        most = max(most, min(num_chunks, GPU_PASS_TOKENS // setting.chunk_size))
    table = Table(title="what fits", title_justify="left")
    for title in ("--activation-checkpointing", "--shard", "batch size x accumulation"):
        table.add_column(title)
    table.add_column("memory", justify="right")
    if gpu is not None:
        table.add_column("tokens/s", justify="right")
    for recompute, shard in product(get_args(Recompute), get_args(Shard)):
        if shard != "none" and setting.world_size == 1:
            continue
        way = replace(setting, recompute=recompute, shard=shard)
        size = largest_batch(way, plan.usable, most)
        way = replace(way, batch_size=size or 1)
        passes = f"{size} x {num_chunks // size}" if size else "not even 1"
        row = [recompute, shard, passes, format_bytes(estimate_memory(way).total)]
        if gpu is not None and size:
            seconds = calculate_step_seconds(way, num_chunks // size, gpu)
            row.append(f"{plan.tokens_per_step / seconds:,.0f}")
        table.add_row(*row)
    return table


def _time_table(title: str, plan: TrainingPlan, price: float | None) -> Table:
    recipe, num_steps = plan.recipe, plan.num_steps
    assert num_steps is not None
    seconds, num_tokens = plan.seconds(num_steps), plan.tokens(num_steps)
    hours = seconds / 3600
    passes = f"{recipe.batch_size} x {recipe.accumulation} x {plan.setting.world_size}"
    table = _table(title)
    table.add_row("batch size x accumulation x devices", passes)
    table.add_row("tokens per update", f"{plan.tokens_per_step:,}")
    if recipe.batch_warmup_steps:
        table.add_row("smaller updates at the start", f"{recipe.batch_warmup_steps:,}")
    rate = f"{recipe.learning_rate:g}, {recipe.learning_rate_from}"
    table.add_row("highest learning rate", rate)
    table.add_row("updates", f"{num_steps:,}")
    table.add_row("tokens", f"{num_tokens:,}")
    table.add_row("tokens per second", f"{num_tokens / seconds:,.0f}")
    table.add_row("hours", f"{hours:,.2f}")
    if price is not None:
        table.add_row("cost", f"{hours * price:,.2f}")
    return table
