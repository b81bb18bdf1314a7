"""Numbers that go wrong: losses that are not finite or far above the ones before."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kiem.core.errors import ExitCode, UserError
from kiem.core.files import write_json
from kiem.model.gemma3 import Gemma3
from kiem.optim.step import Verdict
from kiem.parallel.parallel_model import full_tensor
from kiem.training.checkpoint import CHECKPOINTS
from kiem.training.resume import newest_on_all_ranks
from kiem.training.run import Run, TrainState
from kiem.training.signals import HangWatch

SPIKE_WINDOW = 128
# Losses that hardly differ, as of text learnt by heart, would make every small change a spike.
_MIN_DEVIATION = 0.01
# Between two checkpoints; more are not the fault of single chunks.
_MAX_BAD_STEPS = 10


class Anomalies:
    """Decides about the gradients of each update, alike in all processes.

    The `watch` is ended while an update is examined.
    """

    def __init__(self, run: Run, watch: HangWatch):
        self._run = run
        self._watch = watch
        self._bad_steps: set[int] = set()

    def judge(
        self, state: TrainState, numbers: np.ndarray, loss: float, grad_norm: float
    ) -> Verdict:
        """Returns what to do with the gradients of the update after `state`.

        Args:
            numbers: the chunks that the update read.

        Raises:
            UserError: a number is not finite and --on-nan is stop, or skipping does not help.
        """
        step = state.step + 1
        if state.step in self._bad_steps:
            return Verdict("skip", f"step {step} is skipped: its numbers were not finite")
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return self._judge_not_finite(state, numbers, loss, grad_norm)
        sigmas = self._run.spec.options.spike_sigmas
        limit = spike_limit(state.recent_losses, sigmas)
        recent_losses = [*state.recent_losses, min(loss, limit)][-SPIKE_WINDOW:]
        if loss > limit:
            reason = (
                f"step {step} is skipped: its loss {loss:.3f} is above {limit:.3f}, "
                f"{sigmas:g} standard deviations over the {SPIKE_WINDOW} before"
            )
            return Verdict("skip", reason, recent_losses)
        return Verdict("update", recent_losses=recent_losses)

    def _judge_not_finite(
        self, state: TrainState, numbers: np.ndarray, loss: float, grad_norm: float
    ) -> Verdict:
        self._watch.end()
        run, step = self._run, state.step + 1
        what = f"loss {loss} and gradient norm {grad_norm} are not both finite"
        path = run.spec.directory / f"not-finite-step-{step}.json"
        evidence = self._evidence(step, numbers, loss, grad_norm)
        if run.spec.distributed.is_main:
            run.log.attempt(str(path), partial(write_json, path, evidence))
        self._bad_steps.add(state.step)
        num_bad = sum(bad >= (state.saved_step or 0) for bad in self._bad_steps)
        if run.spec.options.on_nan == "stop" or num_bad > _MAX_BAD_STEPS:
            raise UserError(
                f"{what}, {num_bad} times since the checkpoint; chunks and tokens are in {path}",
                where=f"step {step}",
                fix="The weights are not changed by this update. Lower --learning-rate, use "
                "--precision fp32, or skip such updates with --on-nan skip.",
                exit_code=ExitCode.NOT_FINITE,
            )
        folder = run.spec.directory / CHECKPOINTS
        checkpoint = newest_on_all_ranks(folder, run.spec.distributed, run.log.console)
        if checkpoint is None:
            return Verdict("skip", f"step {step} is skipped: {what}")
        back = int(checkpoint.name.removeprefix("step-"))
        reason = (
            f"step {step}: {what}; back to step {back}, and then without step {step} "
            f"(chunks and tokens are in {path})"
        )
        return Verdict("roll back", reason, checkpoint=checkpoint)

    def _evidence(
        self, step: int, numbers: np.ndarray, loss: float, grad_norm: float
    ) -> dict[str, Any]:
        """Returns what is needed to examine an update: its chunks, and the loss of each."""
        run, distributed = self._run, self._run.spec.distributed
        chunks = run.spec.data.train.read(numbers)
        name = "looking at its chunks one by one"
        measure = partial(_nats_of_own_chunks, run, run.model.full_model(), chunks)
        nats = run.log.attempt_on_all_ranks(name, measure)
        if nats is None:
            nats = torch.full((len(numbers),), math.nan, device=distributed.device)
        bad = [
            name
            for name, parameter in run.model.module.named_parameters()
            if parameter.grad is not None and not bool(full_tensor(parameter.grad).isfinite().all())
        ]
        all_nats = distributed.all_reduce_sum(nats).tolist()
        return {
            "step": step,
            "loss": str(loss),
            "grad_norm": str(grad_norm),
            "parameters_with_bad_gradients": bad,
            "chunks": [
                {"chunk": int(number), "nats": str(value), "tokens": tokens.tolist()}
                for number, value, tokens in zip(numbers, all_nats, chunks, strict=True)
            ],
        }


def _nats_of_own_chunks(run: Run, model: Gemma3, chunks: np.ndarray) -> Tensor:
    """Returns the loss of each chunk that this process looks at, and 0 of others; [chunks]."""
    distributed = run.spec.distributed
    nats = torch.zeros(len(chunks), dtype=torch.float64, device=distributed.device)
    for index in range(distributed.rank, len(chunks), distributed.world_size):
        batch = run.spec.collate(chunks[index : index + 1])
        with torch.no_grad(), distributed.autocast():
            nats[index] = model(batch.ids, batch.targets, batch.bos_id)[1].double()
    return nats


def spike_limit(recent_losses: Sequence[float], sigmas: float) -> float:
    """Returns the loss above which an update is skipped.

    A loss above it enters the history as the limit itself, so that one spike does not hide the
    next, but losses that stay high are accepted after some twenty updates.

    Args:
        recent_losses: of the updates before.
        sigmas: standard deviations above their mean; 0: no limit.
    """
    if sigmas == 0 or len(recent_losses) < SPIKE_WINDOW:
        return math.inf
    mean = float(np.mean(recent_losses))
    return mean + sigmas * max(float(np.std(recent_losses)), _MIN_DEVIATION * mean)
