"""Checks of a run: options that contradict each other, and signs that it learns less than it could.

The sanity checks explain a loss that looks wrong.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import numpy as np

from kiem.config import TrainingOptions
from kiem.core.errors import bad_option
from kiem.model.config import Gemma3Config
from kiem.tokenizer.tokenizer import Tokenizer
from kiem.training.log import try_before
from kiem.training.run import Run, TrainState

# Tokens that the model adds to a `--sample-prompt`.
SAMPLE_TOKENS = 40
_SAMPLE_CHUNKS = 256
# An untrained model has the loss of a blind guess, plus a little for its noise.
_MAX_ABOVE_GUESS = 1.0
_MAX_BELOW_GUESS = 0.3
# When a model should know more than how often each token occurs.
_STUCK_AFTER_STEPS = 300
_STUCK_AFTER_SHARE = 0.2
_STUCK_WINDOW = 128
_STUCK_SHARE = 0.98
_MAX_PADDING = 0.1
_MIN_USED = 0.5


def check_sample_prompts(
    options: TrainingOptions, tokenizer: Tokenizer, config: Gemma3Config
) -> None:
    """Checks that the model can continue every `--sample-prompt`.

    Raises:
        UserError: a prompt is not text, is too long, or has tokens that the model does not know.
    """
    most = config.max_position_embeddings - SAMPLE_TOKENS - 1  # <bos> stands before it
    for number, prompt in enumerate(options.sample_prompt, start=1):
        where = f"--sample-prompt, text {number}"
        ids = try_before(where, partial(tokenizer.encode, prompt))
        if len(ids) > most:
            what = f"{len(ids):,} tokens; the model reads at most {most:,} before its own"
        elif max(ids, default=0) >= config.vocab_size:
            what = f"token {max(ids)} is not among the model's {config.vocab_size:,}"
        else:
            continue
        raise bad_option(where, what, "Give another text.")


def warnings_before(run: Run) -> Iterator[str]:
    """Yields what in the data or the length of a run makes its result worse than it could be."""
    train, recipe = run.spec.data.manifest["splits"]["train"], run.spec.recipe
    num_chunks = run.spec.data.train.num_chunks
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
        used = recipe.max_steps * recipe.chunks_per_step / num_chunks
        if used < _MIN_USED:
            yield f"the run ends after {used:.0%} of the chunks: the others are never learnt from"
    padding = train["padding_tokens"] / (num_chunks * run.spec.data.train.chunk_size)
    if padding > _MAX_PADDING:
        yield f"{padding:.0%} of the chunks is padding: time in which nothing is learnt"
    yield from _wrong_borders(_sample(run), run.spec.data.tokenizer.special_ids)


def _wrong_borders(chunks: np.ndarray, special_ids: dict[str, int]) -> Iterator[str]:
    """Looks for documents that do not begin with exactly one <bos>; `chunks` is [N, T]."""
    bos_id = special_ids["bos"]
    first, second = chunks[:, :-1], chunks[:, 1:]
    num_doubled = int(((first == bos_id) & (second == bos_id)).sum())
    begins = (second == bos_id) | (second == special_ids["pad"])
    num_missing = int(((first == special_ids["eos"]) & ~begins).sum())
    if num_doubled:
        yield (
            f"{num_doubled} documents in {len(chunks)} chunks begin with <bos> twice: the model "
            "learns to expect that, and is worse where it comes once"
        )
    if num_missing or not (chunks == bos_id).any():
        yield (
            f"documents in {len(chunks)} chunks lack <bos> at their beginning: the model will not "
            "know it when it generates text"
        )


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
        mean = float(np.mean(state.recent_losses[-_STUCK_WINDOW:]))
        entropy = _unigram_entropy(_sample(run), run.spec.data.tokenizer.special_ids)
        if mean > _STUCK_SHARE * entropy:
            yield (
                f"after {state.step:,} updates the loss is {mean:.2f}; knowing only how often each "
                f"token occurs gives {entropy:.2f}: the model learns nothing from the tokens "
                "before. The learning rate may be far too high or too low"
            )


def _unigram_entropy(chunks: np.ndarray, special_ids: dict[str, int]) -> float:
    """Returns the loss in nats of predicting each token by its frequency alone.

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
    number = min(_SAMPLE_CHUNKS, run.spec.data.train.num_chunks)
    places = np.linspace(0, run.spec.data.train.num_chunks - 1, number).astype(np.int64)
    return run.spec.data.train.read(places)
