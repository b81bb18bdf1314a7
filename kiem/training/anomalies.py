"""Numbers that go wrong: losses that are not finite or far above the ones before, or odd data."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np

from kiem.core.errors import ExitCode, UserError
from kiem.core.files import write_json
from kiem.data.mixture import warnings_of_epochs, warnings_of_splits
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
# An untrained model has the loss of a blind guess, plus a little for its noise.
_MAX_ABOVE_GUESS = 1.0
_MAX_BELOW_GUESS = 0.3
# When a model should know more than how often each token occurs.
_STUCK_AFTER_STEPS = 300
_STUCK_AFTER_SHARE = 0.2
_STUCK_SHARE = 0.98
_SAMPLE_CHUNKS = 256
_MAX_PADDING = 0.1
_MIN_USED = 0.5


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
        evidence = {
            "step": step,
            "loss": str(loss),
            "grad_norm": str(grad_norm),
            "parameters_with_bad_gradients": [
                name
                for name, parameter in run.model.module.named_parameters()
                if parameter.grad is not None
                and not bool(full_tensor(parameter.grad).isfinite().all())
            ],
            "chunks": [
                {"chunk": int(number), "tokens": tokens.tolist()}
                for number, tokens in zip(numbers, run.spec.data.train.read(numbers), strict=True)
            ],
        }
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


def warnings_before(run: Run) -> Iterator[str]:
    """Yields what in the data or the length of a run makes its result worse than it could be."""
    train, recipe = run.spec.data.manifest["splits"]["train"], run.spec.recipe
    num_chunks = train["chunks"]
    if num_chunks < recipe.chunks_per_step:
        yield (
            f"one update reads {recipe.chunks_per_step} chunks, but there are only {num_chunks}: "
            "each is read several times in every update"
        )
    num_parameters = run.spec.config.num_parameters()
    if train["tokens"] < num_parameters:
        yield (
            f"{train['tokens']:,} tokens of text for {num_parameters:,} parameters; about 20 for "
            "each are usual (arXiv:2203.15556): a smaller model may do better"
        )
    if recipe.max_steps is not None:
        used = run.spec.order.count_chunks(recipe.max_steps) / num_chunks
        if used < _MIN_USED and len(run.spec.data.mixture.parts) == 1:
            yield f"the run ends after {used:.0%} of the chunks: the others are never learnt from"
        yield from warnings_of_epochs(run.spec.order, recipe.max_steps)
    yield from warnings_of_splits(run.spec.data.mixture)
    padding = train["padding_tokens"] / (num_chunks * run.spec.data.train.chunk_size)
    if padding > _MAX_PADDING:
        yield f"{padding:.0%} of the chunks is padding: time in which nothing is learnt"


def warnings_after_update(run: Run, state: TrainState, loss: float) -> Iterator[str]:
    """Yields what is wrong with the training loss of the update that was just done."""
    vocab_size = run.spec.config.vocab_size
    guess = math.log(vocab_size)
    is_new = state.step == 1 and run.spec.options.init_from is None
    if is_new and not guess - _MAX_BELOW_GUESS < loss < guess + _MAX_ABOVE_GUESS:
        yield (
            f"the first loss is {loss:.2f}, but an untrained model with a vocabulary of "
            f"{vocab_size:,} has about {guess:.2f}: its first weights or its data are wrong"
        )
    max_steps = run.spec.recipe.max_steps or 0
    if state.step == max(_STUCK_AFTER_STEPS, math.ceil(max_steps * _STUCK_AFTER_SHARE)):
        mean = float(np.mean(state.recent_losses[-SPIKE_WINDOW:]))
        entropy = _unigram_entropy(run)
        if mean > _STUCK_SHARE * entropy:
            yield (
                f"after {state.step:,} updates the loss is {mean:.2f}; knowing only how often each "
                f"token occurs gives {entropy:.2f}: the model learns nothing from the tokens "
                "before. The learning rate may be far too high or too low"
            )


def _unigram_entropy(run: Run) -> float:
    """Returns the loss in nats of predicting each token by its frequency in a sample of chunks."""
    train, special_ids = run.spec.data.train, run.spec.data.tokenizer.special_ids
    number = min(_SAMPLE_CHUNKS, train.num_chunks)
    places = np.linspace(0, train.num_chunks - 1, number).astype(np.int64)
    counts = np.bincount(train.read(places).reshape(-1), minlength=run.spec.config.vocab_size)
    counts[[special_ids["bos"], special_ids["pad"]]] = 0  # neither is predicted
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())
