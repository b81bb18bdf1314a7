"""Evaluation during training: loss on the test split, samples of text, minimal pairs.

Nothing here takes random numbers or changes the model. The functions take the model apart from the
run: with `--shard parameters` it is gathered for them. After a signal they end early, between two
batches and in all processes, and what they return is incomplete.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from kiem.compute.memory import give_back_free_memory
from kiem.config import TrainingOptions
from kiem.core.errors import bad_option
from kiem.evaluation.language_model import own_language_model
from kiem.evaluation.minimal_pairs import BUILT_IN, prefers_good, read_suite, summarize
from kiem.inference.engine import complete
from kiem.inference.sampling import SamplingParams
from kiem.model.config import Gemma3Config
from kiem.model.gemma3 import Gemma3
from kiem.model.loss import IGNORE, token_cross_entropy
from kiem.tokenizer.tokenizer import Tokenizer
from kiem.training.log import try_before
from kiem.training.run import Run, TrainState

T = TypeVar("T")
# Tokens that the model adds to a `--sample-prompt`.
_SAMPLE_TOKENS = 40
_MAX_SOURCES = 20
_PER_SOURCE = ("tokens_per_source", "documents_per_source", "bytes_per_source")
# In shorter runs the minimal pairs, some 10 000 tokens, would take more than 3 % of the time.
_MIN_TOKENS_FOR_PAIRS = 100_000
_PAIRS_PER_BATCH = 32  # some 800 tokens, so that a signal need not wait long
_PAIRS = "measuring the minimal pairs"


def evaluate(run: Run, model: Gemma3, max_chunks: int | None) -> dict[str, Any]:
    """Measures the model on the test split; all processes take a part of it.

    Bits per byte take the mean loss of the predicted tokens for that of all tokens: the first token
    of a chunk has nothing before it and is not predicted.

    Args:
        run: the run.
        model: its model, whole in each process.
        max_chunks: number of test chunks, spread evenly over the split; None: all, at the end.

    Returns:
        `test_loss` (nats per token), `test_perplexity`, `test_bpb`, `test_chunks`, and `per_source`
        with the `bpb` of the largest sources if there are several; the same in all processes. {}
        after a failure, of which it warns.
    """
    # What was too large for the memory before may fit at the end, or with other chunks.
    name = "the evaluation" if max_chunks is not None else "the evaluation at the end"
    distributed = run.spec.distributed
    give_back_free_memory()  # training's blocks have other sizes
    num_chunks = min(max_chunks or run.spec.data.test.num_chunks, run.spec.data.test.num_chunks)
    numbers = np.linspace(0, run.spec.data.test.num_chunks - 1, num_chunks).round().astype(np.int64)
    totals = _in_batches(
        run, name, numbers, run.spec.recipe.batch_size, partial(_totals, run, model)
    )
    if totals is None:
        return {}
    sums = distributed.all_reduce_sum(torch.stack(totals).sum(0)).tolist()
    found = run.log.attempt(name, lambda: _figures(run.spec.data.manifest["splits"]["test"], sums))
    return {**found, "test_chunks": num_chunks} if found is not None else {}


def _in_batches(
    run: Run, name: str, numbers: np.ndarray, batch_size: int, measure: Callable[[np.ndarray], T]
) -> list[T] | None:
    """Returns what `measure` returns for batches of this process's part of `numbers`.

    All processes take as many batches, of which the last can be empty. None after a signal, or a
    failure, of which it warns with the `name`.
    """
    distributed, found = run.spec.distributed, list[T]()
    num_of_all = batch_size * distributed.world_size
    for start in range(0, len(numbers), num_of_all):
        if run.signals.is_asked():
            return None
        own = numbers[start : start + num_of_all][distributed.rank :: distributed.world_size]
        of_batch = run.log.attempt_on_all_ranks(name, partial(measure, own))
        if of_batch is None:
            return None
        found.append(of_batch)
    return found


def _totals(run: Run, model: Gemma3, rows: np.ndarray) -> Tensor:
    """Returns nats and number of the predicted tokens of test chunks, in all and by source.

    float64 [1 + sources, 2], of the largest sources.
    """
    device = run.spec.distributed.device
    sources = _largest_sources(run.spec.data.manifest["splits"]["test"])
    totals = torch.zeros(len(sources) + 1, 2, dtype=torch.float64, device=device)
    if not len(rows):
        return totals
    batch = run.spec.collate(run.spec.data.test.read(rows))
    targets = batch.targets.flatten()
    counted = targets != IGNORE
    with torch.no_grad(), run.spec.distributed.autocast():
        hidden = model.hidden_states(batch.ids, document_starts=batch.document_starts)
        weight = model.model.embed_tokens.weight
        # All of them, then those that count: tensors of the same sizes fit where others were.
        nats = token_cross_entropy(hidden.flatten(0, 1), weight, targets).double()[counted]
    figures = torch.stack([nats, torch.ones_like(nats)], dim=1)
    totals[0] = figures.sum(0)
    if run.spec.data.test_sources is not None and sources:
        # Shifted as the targets are: the source of the token that is predicted.
        of_tokens = torch.from_numpy(run.spec.data.test_sources.read(rows)).roll(-1, 1)
        of_tokens = of_tokens.to(device).flatten()[counted]
        for place, number in enumerate(sources.values(), start=1):
            totals[place] = figures[of_tokens == number].sum(0)
    return totals


def _figures(test: dict[str, Any], sums: list[list[float]]) -> dict[str, Any]:
    """Returns the figures of the `test` split from the sums of `_totals` over all processes."""
    (nats_sum, num_targets), *of_sources = sums
    loss = nats_sum / num_targets

    def bpb(loss: float, tokens: int, documents: int, num_bytes: int) -> float:
        return loss * (tokens - documents) / (math.log(2) * num_bytes)  # all tokens but <bos>

    found: dict[str, Any] = {
        "test_loss": loss,
        "test_perplexity": math.exp(min(loss, 700.0)),
        "test_bpb": bpb(loss, test["tokens"], test["documents"], test["bytes"]),
    }
    per_source = {
        name: {"bpb": bpb(nats_sum / num_targets, *(test[key][name] for key in _PER_SOURCE))}
        for name, (nats_sum, num_targets) in zip(_largest_sources(test), of_sources, strict=True)
        if num_targets
    }
    return {**found, "per_source": per_source} if per_source else found


def _largest_sources(test: dict[str, Any]) -> dict[str, int]:
    """Returns name and number of the sources to measure one by one; none if there is only one."""
    numbers = {name: number for number, name in enumerate(test.get("source_names", ()))}
    if len(numbers) < 2:
        return {}
    largest = sorted(numbers, key=lambda name: -test["bytes_per_source"][name])[:_MAX_SOURCES]
    return {name: numbers[name] for name in largest}


def measure_minimal_pairs(run: Run, state: TrainState, model: Gemma3) -> dict[str, Any]:
    """Returns `minimal_pairs` as evaluate.py does, the same in all processes; {} if left out."""
    choice, distributed, log = run.spec.options.minimal_pairs, run.spec.distributed, run.log
    if choice == "never":
        return {}
    if choice == "auto" and state.tokens < _MIN_TOKENS_FOR_PAIRS:
        message = f"The minimal pairs are left out of a run of {state.tokens:,} tokens; "
        message += "--minimal-pairs always measures them."
        log.attempt(_PAIRS, partial(log.console.print, message))
        return {}
    pairs, data = log.attempt_on_all_ranks(_PAIRS, lambda: read_suite((BUILT_IN,))), run.spec.data
    if pairs is None:
        return {}
    language_model = own_language_model(model, data.tokenizer, data.train.chunk_size)

    def measure(numbers: np.ndarray) -> np.ndarray:
        with distributed.autocast():
            return prefers_good(language_model, [pairs[number] for number in numbers])

    own = _in_batches(run, _PAIRS, np.arange(len(pairs)), _PAIRS_PER_BATCH, measure)
    if own is None:
        return {}
    is_correct = np.empty(len(pairs), dtype=bool)
    for rank, part in enumerate(distributed.all_gather(np.concatenate(own).tolist())):
        is_correct[rank :: distributed.world_size] = part
    return {"minimal_pairs": summarize(pairs, is_correct)}


def check_sample_prompts(
    options: TrainingOptions, tokenizer: Tokenizer, config: Gemma3Config
) -> None:
    """Checks that the model can continue every `--sample-prompt`.

    Raises:
        UserError: a prompt is not text or is too long.
    """
    most = config.max_position_embeddings - _SAMPLE_TOKENS - 1  # <bos> stands before it
    for number, prompt in enumerate(options.sample_prompt, start=1):
        where = f"--sample-prompt, text {number}"
        ids = try_before(where, partial(tokenizer.encode, prompt))
        if len(ids) > most:
            what = f"{len(ids):,} tokens; the model reads at most {most:,} before its own"
            raise bad_option(where, what, "Give a shorter text.")


def sample_texts(run: Run, model: Gemma3, name: str) -> dict[str, Any]:
    """Returns `samples`: `prompt` and `text` for every `--sample-prompt`.

    There are none in other processes than the main one, and no more after a failure; `name` is what
    they are called in the warning of it.
    """
    options, tokenizer = run.spec.options, run.spec.data.tokenizer
    params = SamplingParams(max_new_tokens=_SAMPLE_TOKENS)
    samples = []
    for prompt in options.sample_prompt:
        is_stopping = run.signals.is_asked()  # all processes ask
        if not is_stopping and run.spec.distributed.is_main:
            write = partial(complete, model, tokenizer, prompt, params, options.seed)
            text = run.log.attempt(name, write)
            if text is not None:
                samples.append({"prompt": prompt, "text": text})
    return {"samples": samples}
