"""The "loss looks wrong" doctor: signs that a run learns less than it could, and why."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from kiem.training.run import Run

_SAMPLE_CHUNKS = 256
# An untrained model knows nothing: its loss is that of a blind guess, plus a little for its noise.
_MOST_ABOVE_GUESS = 1.0
_MOST_BELOW_GUESS = 0.3
# When a model should have learnt more than how often each token occurs.
_STUCK_AFTER_STEPS = 300
_STUCK_AFTER_SHARE = 0.2
_STUCK_WINDOW = 128
_STUCK_SHARE = 0.98
_MOST_PADDING = 0.1
_LEAST_USED = 0.5


def warnings_before(run: Run) -> Iterator[str]:
    """Yields what about data and length of a run makes its result worse than it could be."""
    train, recipe = run.manifest["splits"]["train"], run.recipe
    if run.train.num_chunks < recipe.chunks_per_step:
        yield (
            f"one update reads {recipe.chunks_per_step} chunks, but there are only "
            f"{run.train.num_chunks}: each is read several times in every update"
        )
    num_parameters = run.model.config.num_parameters()
    if train["tokens"] < num_parameters:
        yield (
            f"{train['tokens']:,} tokens of text for {num_parameters:,} parameters; about 20 for "
            "each are usual (arXiv:2203.15556): a smaller model may do better"
        )
    if recipe.max_steps is not None:
        used = recipe.max_steps * recipe.chunks_per_step / run.train.num_chunks
        if used < _LEAST_USED:
            yield (
                f"the run ends when it has read {used:.0%} of the chunks: the others are never "
                "learnt from"
            )
    padding = train["padding_tokens"] / (run.train.num_chunks * run.train.chunk_size)
    if padding > _MOST_PADDING:
        yield f"{padding:.0%} of the chunks is padding: time in which nothing is learnt"
    yield from _wrong_borders(run, _sample(run))


def _wrong_borders(run: Run, chunks: np.ndarray) -> Iterator[str]:
    """Looks for documents that do not begin with exactly one <bos>; `chunks` is [N, T]."""
    ids = run.tokenizer.special_ids
    first, second = chunks[:, :-1], chunks[:, 1:]
    num_doubled = int(((first == ids["bos"]) & (second == ids["bos"])).sum())
    begins = (second == ids["bos"]) | (second == ids["pad"])
    num_missing = int(((first == ids["eos"]) & ~begins).sum())
    if num_doubled:
        yield (
            f"{num_doubled} documents in {len(chunks)} chunks begin with <bos> twice: the model "
            "learns to expect that, and is worse where it comes once"
        )
    if num_missing or not (chunks == ids["bos"]).any():
        yield (
            f"documents in {len(chunks)} chunks lack <bos> at their beginning: the model will not "
            "know it when it is asked to write"
        )


def warnings_after_update(run: Run, loss: float) -> Iterator[str]:
    """Yields what is wrong with the training loss of the update that was just done."""
    guess = math.log(run.model.config.vocab_size)
    is_new = run.step == 1 and run.options.init_from is None
    if is_new and not guess - _MOST_BELOW_GUESS < loss < guess + _MOST_ABOVE_GUESS:
        yield (
            f"the first loss is {loss:.2f}, but a model that knows nothing about a vocabulary of "
            f"{run.model.config.vocab_size:,} has about {guess:.2f}: its first weights or its data "
            "are not what they should be"
        )
    due = max(_STUCK_AFTER_STEPS, math.ceil((run.recipe.max_steps or 0) * _STUCK_AFTER_SHARE))
    if run.step == due:
        mean = float(np.mean(run.recent_losses[-_STUCK_WINDOW:]))
        entropy = _unigram_entropy(_sample(run), run.tokenizer.special_ids)
        if mean > _STUCK_SHARE * entropy:
            yield (
                f"after {run.step:,} updates the loss is {mean:.2f}; knowing only how often each "
                f"token occurs gives {entropy:.2f}: the model learns nothing from what stands "
                "before a token. The learning rate may be far too high or too low"
            )


def _unigram_entropy(chunks: np.ndarray, special_ids: dict[str, int]) -> float:
    """Returns the loss in nats of predicting each token by its share of all alone.

    That of a sample is a little lower than that of all text.
    """
    counts = np.bincount(chunks.reshape(-1))
    for name in ("bos", "pad"):  # neither is predicted
        if special_ids[name] < len(counts):
            counts[special_ids[name]] = 0
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def _sample(run: Run) -> np.ndarray:
    """Returns chunks from all over the training split, int32 [N, T]."""
    number = min(_SAMPLE_CHUNKS, run.train.num_chunks)
    places = np.linspace(0, run.train.num_chunks - 1, number).astype(np.int64)
    return run.train.read(places)
