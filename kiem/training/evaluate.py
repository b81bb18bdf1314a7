"""Evaluation during training: loss on the test split, samples of text, minimal pairs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from rich.console import Console

from kiem.evaluation.language_model import own_language_model
from kiem.evaluation.minimal_pairs import BUILT_IN, prefers_good, read_suite, summarize
from kiem.inference.sampling import Sampling
from kiem.inference.streaming import complete
from kiem.model.gemma3 import next_token_targets
from kiem.model.loss import IGNORE
from kiem.training.devices import Devices
from kiem.training.run import Run

_SAMPLE_TOKENS = 40
# With so many tokens trained for each of theirs, the minimal pairs take at most some 3 % of a run.
_TRAINED_PER_PAIR_TOKEN = 10


def evaluate(run: Run, devices: Devices, max_chunks: int | None) -> dict[str, Any]:
    """Measures the model on the test split; takes no random numbers and changes nothing.

    Bits per byte take the mean loss of the predicted tokens for that of all tokens: the first token
    of a chunk has nothing before it and is not predicted.

    Args:
        run: the run.
        devices: all processes share the chunks among them.
        max_chunks: how many of the test chunks, spread evenly over the split; None for all.

    Returns:
        `test_loss` (nats per token), `test_perplexity`, `test_bpb`, the same in all processes.
    """
    total = torch.zeros(2, dtype=torch.float64, device=devices.device)
    num_chunks = min(max_chunks or run.test.num_chunks, run.test.num_chunks)
    numbers = np.linspace(0, run.test.num_chunks - 1, num_chunks).round().astype(np.int64)
    own = numbers[devices.rank :: devices.world_size]
    special_ids = run.tokenizer.special_ids
    bos_id = special_ids["bos"] if run.options.document_mask else None
    for start in range(0, len(own), run.recipe.batch_size):
        chunks = run.test.read(own[start : start + run.recipe.batch_size])
        ids = torch.from_numpy(chunks).long().to(devices.device)
        targets = next_token_targets(ids, special_ids["bos"], special_ids["pad"])
        with torch.no_grad(), devices.autocast():
            _, nats = run.model(ids, targets, bos_id)
        total += torch.stack([nats.double(), (targets != IGNORE).sum().double()])
    nats_sum, num_targets = devices.sum(total).tolist()
    loss = nats_sum / num_targets
    test = run.manifest["splits"]["test"]
    predictable_tokens = test["tokens"] - test["documents"]  # all but <bos>
    return {
        "test_loss": loss,
        "test_perplexity": math.exp(min(loss, 700.0)),
        "test_bpb": loss * predictable_tokens / (math.log(2) * test["bytes"]),
        "test_chunks": num_chunks,
    }


def measure_minimal_pairs(run: Run, devices: Devices, console: Console) -> dict[str, Any]:
    """Measures the built-in minimal pairs; takes no random numbers and changes nothing.

    Args:
        run: the run.
        devices: all processes share the pairs among them.
        console: where it is said that they are left out.

    Returns:
        `minimal_pairs`, as evaluate.py has it, the same in all processes; {} if they are left out.
    """
    if run.options.minimal_pairs == "never":
        return {}
    pairs = read_suite((BUILT_IN,))
    sentences = [sentence for pair in pairs for sentence in (pair.good, pair.bad)]
    num_tokens = sum(map(len, run.tokenizer.encode_batch(sentences)))
    if run.options.minimal_pairs == "auto" and run.tokens < _TRAINED_PER_PAIR_TOKEN * num_tokens:
        console.print(
            f"The minimal pairs ({num_tokens:,} tokens) are left out of a run of {run.tokens:,} "
            "tokens; --minimal-pairs always measures them."
        )
        return {}
    model = own_language_model(run.model, run.tokenizer, run.train.chunk_size)
    is_correct = torch.zeros(len(pairs), device=devices.device)
    with devices.autocast():
        own = prefers_good(model, pairs[devices.rank :: devices.world_size])
    is_correct[devices.rank :: devices.world_size] = torch.from_numpy(own).to(is_correct)
    return {"minimal_pairs": summarize(pairs, devices.sum(is_correct).bool().cpu().numpy())}


def sample_texts(run: Run, devices: Devices) -> list[dict[str, str]]:
    """Returns short continuations of `--sample-prompt`; none in all but the first process.

    Returns:
        For each prompt, `prompt` and the `text` that the model continues it with.
    """
    if not devices.is_first:
        return []
    how: dict[str, Any] = {"max_new_tokens": _SAMPLE_TOKENS, "sampling": Sampling()}
    return [
        {
            "prompt": prompt,
            "text": complete(run.model, run.tokenizer, prompt, seed=run.options.seed, **how),
        }
        for prompt in run.options.sample_prompt
    ]
