"""From logits to the next token: penalties, filters and one generator per sequence.

Shapes: B sequences, V vocabulary entries, T tokens so far.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kiem.randomness import derive_seed


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: logits are divided by it; 0 takes the likeliest token.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the likeliest tokens whose probabilities add up to it; 1 keeps all.
        repetition_penalty: above 1 makes tokens that occurred less likely (arXiv:1909.05858).
    """

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.9
    repetition_penalty: float = 1.1


def generator_seed(seed: int, prompt_number: int, sequence: int) -> int:
    """Returns the seed of one sequence's own generator: no sequence depends on its neighbours."""
    return derive_seed(seed, "sample", prompt_number, sequence)


def choose(
    logits: Tensor, ids: Tensor, sampling: Sampling, chances: list[torch.Generator]
) -> Tensor:
    """Returns the next token of each sequence, int64 [B], on the CPU.

    Args:
        logits: fp32 [B, V].
        ids: int64 [B, T], the tokens so far, prompt included.
        sampling: how to choose.
        chances: one generator a sequence.
    """
    logits = penalize_repetition(logits, ids, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return logits.argmax(-1).cpu()
    logits = keep_top_k(logits / sampling.temperature, sampling.top_k)
    probabilities = keep_top_p(logits, sampling.top_p).softmax(-1).cpu()
    chosen = [
        torch.multinomial(row, 1, generator=chance)
        for row, chance in zip(probabilities, chances, strict=True)
    ]
    return torch.cat(chosen)


def penalize_repetition(logits: Tensor, ids: Tensor, penalty: float) -> Tensor:
    """Divides positive and multiplies negative logits of tokens that occurred by `penalty`."""
    if penalty == 1:
        return logits
    seen = logits.gather(1, ids)
    return logits.scatter(1, ids, torch.where(seen < 0, seen * penalty, seen / penalty))


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Sets all but the k largest logits of each row to minus infinity; 0 keeps all."""
    if k == 0 or k >= logits.shape[-1]:
        return logits
    smallest_kept = logits.topk(k).values[..., -1:]
    return logits.masked_fill(logits < smallest_kept, -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keeps the fewest tokens whose probabilities reach `p` (arXiv:1904.09751); others to -inf."""
    if p >= 1:
        return logits
    ordered, order = logits.sort(descending=True)
    probabilities = ordered.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    dropped = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before >= p)
    return logits.masked_fill(dropped, -torch.inf)
