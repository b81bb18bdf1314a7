"""The training step: forward, backward, clip, update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from kiem.config import TrainingOptions
from kiem.optim.batch import Batch
from kiem.parallel.distributed import Distributed
from kiem.parallel.parallel_model import ParallelModel


@dataclass(frozen=True)
class Verdict:
    """What to do with the gradients of an update.

    Attributes:
        action: update the weights; skip: count the update, but leave the weights as they are; roll
            back: continue from a checkpoint instead.
        reason: why not to update.
        recent_losses: the new history of losses, if the loss enters it.
        checkpoint: to continue from.
    """

    action: Literal["update", "skip", "roll back"]
    reason: str = ""
    recent_losses: list[float] | None = None
    checkpoint: Path | None = None


@dataclass(frozen=True)
class StepResult:
    """The figures of a training step, the same in all processes.

    Attributes:
        loss: mean cross entropy of the predicted tokens, in nats.
        grad_norm: norm of the gradients before clipping.
        verdict: what was done with the gradients.
    """

    loss: float
    grad_norm: float
    verdict: Verdict


def train_step(
    model: ParallelModel,
    optimizers: Sequence[torch.optim.Optimizer],
    batches: Sequence[Batch],
    distributed: Distributed,
    options: TrainingOptions,
    learning_rate: float,
    judge: Callable[[float, float], Verdict],
) -> StepResult:
    """Updates the weights once; all processes call it, each with its own batches.

    Args:
        model, optimizers: what is trained.
        batches: this process's forward passes.
        distributed: all processes.
        options: `z_loss` and `max_grad_norm` are used.
        learning_rate: of this update.
        judge: decides by loss and gradient norm, alike in all processes, whether to update the
            weights. The gradients are still there when it is called.
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
                loss, batch_nats = model(
                    batch.ids, batch.targets, batch.document_starts, options.z_loss, scale
                )
            loss.backward()
            del loss  # what is left of its graph would lie between memory for the next pass
        nats += batch_nats

    # Clip. The norm is that of the whole gradient, also where it is sharded. Both figures come
    # together: the host waits for a GPU only once in an update.
    norm = model.clip_grad_norm(options.max_grad_norm)
    mean_nats = distributed.all_reduce_sum(nats) / num_targets
    mean_loss, grad_norm = torch.stack([mean_nats, norm]).tolist()

    # Update. With a divided optimizer each process updates its own parameters, then sends them.
    verdict = judge(mean_loss, grad_norm)
    if verdict.action == "update":
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            optimizer.step()
        model.broadcast_local_params()
    model.zero_grad()
    return StepResult(mean_loss, grad_norm, verdict)
