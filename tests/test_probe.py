"""What passes before a run find out: what a token costs, what fits, what can be compiled."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed, TorchDynamoException
from torch._inductor.exc import InductorError
from torch.utils.flop_counter import FlopCounterMode

from kiem.compute.attention import causal_mask
from kiem.compute.memory import forget_peak_memory, peak_memory_bytes
from kiem.config import TrainingOptions
from kiem.core.errors import ExitCode, UserError
from kiem.model.config import preset
from kiem.model.gemma3 import Context, DecoderLayer, Gemma3, Recompute, run_layer
from kiem.optim.batch import Collator
from kiem.optim.optimizer import make_optimizers
from kiem.optim.step import Verdict, train_step
from kiem.parallel.distributed import Distributed
from kiem.parallel.parallel_model import ParallelModel
from kiem.planning.memory_estimate import estimate_memory, setting_of, usable_bytes
from kiem.planning.probe import Probe
from kiem.planning.recipe import Recipe
from kiem.planning.time_estimate import flops_per_token

OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


class HardToCompile(Gemma3):
    """A model whose layers cannot be compiled for more than `most`: `failure` is raised.

    A chunk counts by what is recomputed.
    """

    most = 0
    chunk_cost: ClassVar[dict[Recompute, int]] = {"none": 1, "selective": 1, "full": 1}
    failure: Exception = OUT_OF_MEMORY

    def compile_layers(self) -> None:
        def run(layer: DecoderLayer, x: Tensor, context: Context, recompute: Recompute) -> Tensor:
            if len(x) * self.chunk_cost[recompute] > self.most:
                if isinstance(self.failure, TorchDynamoException):
                    raise self.failure
                raise InductorError(self.failure, None)
            return run_layer(layer, x, context, recompute)

        self.run_layer = run


def prepare(
    model: HardToCompile,
    batch_size: int,
    compiling: str = "always",
    batch_warmup_steps: int = 0,
    chunk_size: int = 32,
    device_type: str = "cpu",
) -> tuple[Recipe, bool]:
    """Returns the recipe for passes that fit, and whether the layers are compiled."""
    options = TrainingOptions(dataset_path=(Path(),), compile=compiling)  # type: ignore[arg-type]
    distributed = Distributed(0, 1, torch.device("cpu"), "fp32", 1e12)
    setting = setting_of(model.config, options, distributed, chunk_size)
    setting = replace(setting, device_type=device_type)
    probe = Probe(model, options, setting, distributed, Console())
    passes = 4 if batch_warmup_steps else 3
    recipe = Recipe(batch_size, passes, passes * batch_size, 1e-3, 10, None, "none")
    recipe = probe.prepare(replace(recipe, batch_warmup_steps=batch_warmup_steps))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.recompute == recipe.recompute
    return recipe, probe.is_compiled


@pytest.fixture
def model() -> HardToCompile:
    return HardToCompile(preset("gemma3-micro", 1000))


def test_out_of_memory_while_compiling_halves_the_passes(
    model: HardToCompile, capsys: pytest.CaptureFixture[str]
) -> None:
    model.most = 2
    recipe, is_compiled = prepare(model, 8)
    assert (recipe.batch_size, recipe.accumulation, recipe.chunks_per_step) == (2, 12, 24)
    assert is_compiled
    said = " ".join(capsys.readouterr().out.split())
    assert "--batch-size 2 --gradient-accumulation-steps 12" in said


def test_smaller_passes_still_divide_the_smallest_updates(model: HardToCompile) -> None:
    model.most = 2
    recipe, _ = prepare(model, 5, batch_warmup_steps=8)
    assert (recipe.batch_size, recipe.accumulation) == (1, 20)  # 2 x 10 has no quarter


@pytest.mark.parametrize(
    ("most", "batch_size", "recompute"), [(20, 8, "selective"), (4, 4, "full")]
)
def test_a_gpu_recomputes_before_its_passes_become_small(
    model: HardToCompile, most: int, batch_size: int, recompute: Recompute
) -> None:
    """Passes of 16, 8 and 4 chunks, the last of which have fewer tokens than a GPU should get."""
    model.most = most
    model.chunk_cost = {"none": 4, "selective": 2, "full": 1}
    recipe, is_compiled = prepare(model, 16, chunk_size=512, device_type="cuda")
    assert (recipe.batch_size, recipe.recompute) == (batch_size, recompute)
    assert recipe.batch_size * recipe.accumulation == recipe.chunks_per_step == 48
    assert is_compiled


def test_with_nothing_left_to_save_memory_it_is_an_error(
    model: HardToCompile, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError) as caught:
        prepare(model, 2)
    assert caught.value.exit_code == ExitCode.OUT_OF_MEMORY
    assert "--activation-checkpointing full" in capsys.readouterr().out


@pytest.mark.parametrize(
    "failure",
    [
        RuntimeError("Failed to find C compiler"),
        torch.OutOfMemoryError("out of resource"),
        BackendCompilerFailed(run_layer, ValueError("Failed\nat length"), None),
        TorchDynamoException(),
    ],
)
def test_what_cannot_be_compiled_is_not_made_smaller(
    model: HardToCompile, failure: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    model.failure = failure
    recipe, is_compiled = prepare(model, 8)
    assert recipe.batch_size == 8
    assert not is_compiled
    said = " ".join(capsys.readouterr().out.split())
    reason = getattr(failure, "inner_exception", failure)
    first_line = f"{type(reason).__name__}: {reason}".split("\n")[0].strip()
    assert "training goes on without --compile" in said
    assert said.endswith(first_line)


def test_flops_are_those_that_torch_counts() -> None:
    config = preset("gemma3-micro", 1000)
    model = Gemma3(config)
    ids = torch.randint(0, 1000, (2, 200), generator=torch.Generator().manual_seed(0))
    # The loss multiplies into a buffer, which torch does not count; so the logits do instead.
    with FlopCounterMode(display=False) as counter:
        model.logits(model.hidden_states(ids)).sum().backward()
    counts = counter.get_flop_counts()["Global"]
    products = sum(counts[op] for op in counts if "mm" in str(op))
    positions = torch.arange(200)
    query_width = config.num_attention_heads * config.head_dim
    seen = 0
    for layer in range(config.num_hidden_layers):
        window = config.sliding_window if config.is_sliding(layer) else None
        seen += int(causal_mask(positions, positions, window).sum())
    # Scores and their sum of values, two operations each, and twice as many for the gradients.
    attention = 2 * 2 * 3 * query_width * seen / 200
    # The norms' gains are counted as if they were matrices.
    expected = products / ids.numel() + attention
    assert flops_per_token(config, 200) == pytest.approx(expected, rel=0.01)
    without_window = replace(config, sliding_window=10**6)
    assert flops_per_token(without_window, 200) > flops_per_token(config, 200)


@pytest.mark.gpu
def test_what_is_usable_includes_what_the_process_holds() -> None:
    distributed = Distributed(0, 1, torch.device("cuda", 0), "bf16", 1e12)
    before = usable_bytes(distributed)
    held = torch.zeros(1 << 30, dtype=torch.uint8, device=distributed.device)
    assert usable_bytes(distributed) == pytest.approx(before, rel=0.01)
    assert peak_memory_bytes(distributed.device) >= held.nbytes
    del held
    forget_peak_memory(distributed.device)
    assert peak_memory_bytes(distributed.device) < 1 << 30


@pytest.mark.gpu
def test_layers_are_compiled_in_fp32_without_a_warning() -> None:
    model, device = Gemma3(preset("gemma3-micro", 1000)), torch.device("cuda", 0)
    distributed = Distributed(0, 1, device, "fp32", 1e12)
    options = TrainingOptions(dataset_path=(Path(),))
    setting = setting_of(model.config, options, distributed, 64)
    probe = Probe(model.to(device), options, setting, distributed, Console())
    probe.prepare(Recipe(2, 1, 2, 1e-3, 10, None, "none"))
    assert probe.is_compiled


@pytest.mark.gpu
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_the_estimate_is_the_measured_peak(recompute: Recompute) -> None:
    """gemma3-270m in compiled passes of 8 chunks, beside the moments of Muon."""
    config, device = preset("gemma3-270m", 262_144), torch.device("cuda", 0)
    options = TrainingOptions(dataset_path=(Path(),), activation_checkpointing=recompute)
    distributed = Distributed(0, 1, device, "bf16", 1e12)
    setting = setting_of(config, options, distributed, 1024)
    setting = replace(setting, batch_size=8, recompute=recompute)
    model = Gemma3(config).to(device)
    model.model.embed_tokens.adds_to_gradient = True
    probe = Probe(model, options, setting, distributed, Console())
    assert probe.prepare(Recipe(8, 1, 8, 1e-3, 10, None, recompute)).batch_size == 8
    assert probe.is_compiled
    parallel_model = ParallelModel(model, distributed, "none")
    optimizers = make_optimizers(model, "muon", 0.1, matrix_dtype=distributed.matrix_dtype)
    batch = Collator(0, 1, True, device)(np.full((8, 1024), 2, np.int32))
    for _ in range(2):
        train_step(
            *(parallel_model, optimizers, [batch, batch], distributed, options, 1e-3),
            lambda *_: Verdict("update"),
        )
    expected = estimate_memory(setting).total
    assert peak_memory_bytes(device) == pytest.approx(expected, rel=0.1)
