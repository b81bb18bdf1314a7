"""Evaluation during training: loss on the test split, samples of text, minimal pairs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from kiem.compute.memory import give_back_free_memory
from kiem.evaluation.language_model import own_language_model
from kiem.evaluation.minimal_pairs import BUILT_IN, Pair, prefers_good, read_suite, summarize
from kiem.inference.engine import complete
from kiem.inference.sampling import SamplingParams
from kiem.model.loss import IGNORE, next_token_targets, token_cross_entropy
from kiem.parallel.distributed import Distributed
from kiem.training.accessories import attempt, attempt_together
from kiem.training.options import SAMPLE_TOKENS
from kiem.training.run import Run

_MOST_SOURCES = 20
_PER_SOURCE = ("tokens_per_source", "documents_per_source", "bytes_per_source")
# With so many tokens trained for each of theirs, the minimal pairs take at most some 3 % of a run.
_TRAINED_PER_PAIR_TOKEN = 10


def evaluate(
    run: Run, distributed: Distributed, console: Console, max_chunks: int | None
) -> dict[str, Any]:
    """Measures the model on the test split; takes no random numbers and changes nothing.

    Bits per byte take the mean loss of the predicted tokens for that of all tokens: the first token
    of a chunk has nothing before it and is not predicted.

    Args:
        run: the run.
        distributed: all processes share the chunks among them.
        console: where it is said that the evaluation failed; it is then left out.
        max_chunks: how many of the test chunks, spread evenly over the split; None for all, at the
            end of the run.

    Returns:
        `test_loss` (nats per token), `test_perplexity`, `test_bpb`, and `per_source` with the `bpb`
        of the largest sources if there are several; the same in all processes. {} if it failed.
    """
    # What was too large for the memory in the middle may fit at the end, or with other chunks.
    name = "the evaluation" if max_chunks is not None else "the evaluation at the end"
    give_back_free_memory()  # training's pieces are of other sizes
    num_chunks = min(max_chunks or run.test.num_chunks, run.test.num_chunks)
    numbers = np.linspace(0, run.test.num_chunks - 1, num_chunks).round().astype(np.int64)
    own = numbers[distributed.rank :: distributed.world_size]
    totals = attempt_together(
        run, distributed, console, name, lambda: _totals(run, distributed, own)
    )
    if totals is None:
        return {}
    sums = distributed.all_reduce_sum(totals).tolist()
    found = attempt(run, console, name, lambda: _figures(run, sums))
    return {**found, "test_chunks": num_chunks} if found is not None else {}


def _totals(run: Run, distributed: Distributed, numbers: np.ndarray) -> Tensor:
    """Returns the nats and the number of the predicted tokens of test chunks.

    Returns:
        float64 [1 + sources, 2]: of all tokens, and of those of each of the largest sources.
    """
    names = _largest_sources(run)
    totals = torch.zeros(len(names) + 1, 2, dtype=torch.float64, device=distributed.device)
    special_ids = run.tokenizer.special_ids
    bos_id = special_ids["bos"] if run.options.document_mask else None
    for start in range(0, len(numbers), run.recipe.batch_size):
        rows = numbers[start : start + run.recipe.batch_size]
        ids = torch.from_numpy(run.test.read(rows)).long().to(distributed.device)
        targets = next_token_targets(ids, special_ids["bos"], special_ids["pad"]).flatten()
        counted = targets != IGNORE
        with torch.no_grad(), distributed.autocast():
            hidden = run.model.hidden_states(ids, bos_id=bos_id).flatten(0, 1)
            weight = run.model.model.embed_tokens.weight
            # All of them, then those that count: tensors of the same sizes fit where others were.
            nats = token_cross_entropy(hidden, weight, targets).double()[counted]
        figures = torch.stack([nats, torch.ones_like(nats)], dim=1)
        totals[0] += figures.sum(0)
        if run.test_sources is not None and names:
            # Shifted as the targets are: the source of the token that is predicted.
            sources = torch.from_numpy(run.test_sources.read(rows)).roll(-1, 1)
            sources = sources.to(ids.device).flatten()[counted]
            for place, number in enumerate(names.values(), start=1):
                totals[place] += figures[sources == number].sum(0)
    return totals


def _figures(run: Run, sums: list[list[float]]) -> dict[str, Any]:
    """Returns what `evaluate` does, of the sums of `_totals` over all processes."""
    test = run.manifest["splits"]["test"]
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
        for name, (nats_sum, num_targets) in zip(_largest_sources(run), of_sources, strict=True)
        if num_targets
    }
    return {**found, "per_source": per_source} if per_source else found


def _largest_sources(run: Run) -> dict[str, int]:
    """Returns name and number of the sources to measure one by one; none if there is only one."""
    test = run.manifest["splits"]["test"]
    numbers = {name: number for number, name in enumerate(test.get("source_names", ()))}
    if len(numbers) < 2:
        return {}
    largest = sorted(numbers, key=lambda name: -test["bytes_per_source"][name])[:_MOST_SOURCES]
    return {name: numbers[name] for name in largest}


def measure_minimal_pairs(run: Run, distributed: Distributed, console: Console) -> dict[str, Any]:
    """Measures the built-in minimal pairs; takes no random numbers and changes nothing.

    Args:
        run: the run.
        distributed: all processes share the pairs among them.
        console: where it is said that they are left out.

    Returns:
        `minimal_pairs`, as evaluate.py has it, the same in all processes; {} if they are left out.
    """
    if run.options.minimal_pairs == "never":
        return {}
    name = "measuring the minimal pairs"
    suite = attempt_together(run, distributed, console, name, lambda: _encoded_suite(run))
    if suite is None:
        return {}
    pairs, num_tokens = suite
    if run.options.minimal_pairs == "auto" and run.tokens < _TRAINED_PER_PAIR_TOKEN * num_tokens:
        attempt(
            run,
            console,
            name,
            lambda: console.print(
                f"The minimal pairs ({num_tokens:,} tokens) are left out of a run of "
                f"{run.tokens:,} tokens; --minimal-pairs always measures them."
            ),
        )
        return {}

    def measure() -> np.ndarray:
        model = own_language_model(run.model, run.tokenizer, run.train.chunk_size)
        with distributed.autocast():
            return prefers_good(model, pairs[distributed.rank :: distributed.world_size])

    own = attempt_together(run, distributed, console, name, measure)
    if own is None:
        return {}
    is_correct = torch.zeros(len(pairs), device=distributed.device)
    is_correct[distributed.rank :: distributed.world_size] = torch.from_numpy(own).to(is_correct)
    return {
        "minimal_pairs": summarize(
            pairs, distributed.all_reduce_sum(is_correct).bool().cpu().numpy()
        )
    }


def _encoded_suite(run: Run) -> tuple[list[Pair], int]:
    """Returns the built-in pairs and how many tokens they are."""
    pairs = read_suite((BUILT_IN,))
    sentences = [sentence for pair in pairs for sentence in (pair.good, pair.bad)]
    return pairs, sum(map(len, run.tokenizer.encode_batch(sentences)))


def sample_texts(run: Run, distributed: Distributed, console: Console, name: str) -> dict[str, Any]:
    """Lets the model continue every `--sample-prompt` a little, in the first process.

    Args:
        run, devices: the run and all processes.
        console: where it is said that this failed; the samples are then left out.
        name: what they are called there.

    Returns:
        `samples`, with `prompt` and `text` of each; none in other processes and after a failure.
    """
    if not distributed.is_main:
        return {"samples": []}
    params = SamplingParams(max_new_tokens=SAMPLE_TOKENS)

    def write(prompt: str) -> dict[str, str]:
        text = complete(run.model, run.tokenizer, prompt, params, run.options.seed)
        return {"prompt": prompt, "text": text}

    written = attempt(run, console, name, lambda: [*map(write, run.options.sample_prompt)])
    return {"samples": written or []}
