"""The training step: forward, backward, clip, update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from kiem.optim.batch import Batch
from kiem.parallel.distributed import Distributed
from kiem.parallel.parallel_model import ParallelModel


@dataclass(frozen=True)
class StepResult:
    """The figures of a training step, the same in all processes.

    Attributes:
        loss: mean cross entropy of the predicted tokens, in nats.
        grad_norm: norm of the gradients before clipping.
        is_updated: whether the weights were changed.
    """

    loss: float
    grad_norm: float
    is_updated: bool


def train_step(
    model: ParallelModel,
    optimizers: Sequence[torch.optim.Optimizer],
    batches: Sequence[Batch],
    distributed: Distributed,
    *,
    learning_rate: float,
    max_grad_norm: float,
    z_loss: float,
    accept: Callable[[float, float], bool],
) -> StepResult:
    """Updates the weights once; all processes call it, each with its own batches.

    Args:
        model, optimizers: what is trained.
        batches: this process's forward passes.
        distributed: all processes.
        learning_rate: of this update.
        max_grad_norm: gradients with a larger norm are scaled down to it.
        z_loss: weight of the squared log-normalizer in the loss.
        accept: says by loss and gradient norm whether to update the weights, alike in all
            processes. The gradients are still there when it is called.
    """
    # Each summed loss is divided by the number of targets in the whole update, so the result does
    # not depend on the number of passes and processes (transformers#34191). DDP and FSDP average
    # gradients over the processes; the factor world_size undoes that.
    num_targets = torch.stack([batch.num_targets for batch in batches]).sum()
    num_targets = distributed.all_reduce_sum(num_targets)
    scale = distributed.world_size / num_targets

    # Forward and backward. DDP exchanges gradients in the last pass only; FSDP gathers each layer's
    # weights for every pass, and sends each gradient to the owners of its shards at once.
    nats = torch.zeros((), device=distributed.device)
    for index, batch in enumerate(batches):
        is_last = index == len(batches) - 1
        with nullcontext() if is_last else model.no_sync():
            with distributed.autocast():
                loss, batch_nats = model(batch.ids, batch.targets, batch.bos_id, z_loss, scale)
            loss.backward()
            del loss  # what is left of its graph would lie between memory for the next pass
        nats += batch_nats

    # Clip. The norm is that of the whole gradient, also where it is sharded.
    grad_norm = model.clip_grad_norm(max_grad_norm)
    mean_loss = float(distributed.all_reduce_sum(nats) / num_targets)

    # Update. With a divided optimizer each process updates its own parameters, then sends them.
    is_updated = accept(mean_loss, grad_norm)
    if is_updated:
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            optimizer.step()
        model.broadcast_local_params()
    model.zero_grad()
    return StepResult(mean_loss, grad_norm, is_updated)
