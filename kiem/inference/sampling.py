"""Sampling of the next token from logits: a penalty, filters and one generator per sequence.

A sequence does not depend on its neighbours, and has its own parameters. `choose_token` takes one
sequence and works as little as it can; `choose_tokens` takes many, in the same steps whatever their
parameters, so that a device need not be waited for. Both choose the same, up to rounding. Shapes:

    B sequences    V vocabulary entries    T tokens so far    N tokens that the filters leave
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kiem.core.errors import ExitCode, UserError

_FP32 = torch.finfo(torch.float32)
# Sorting all of 262 144 logits takes 16 ms, finding the 1024 largest 0.9 ms; they nearly always do.
_NUM_FIRST_TRIED = 1024


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen, and when a text ends. The ranges are those of InferenceOptions.

    Attributes:
        temperature: logits are divided by it; 0, and what fp32 cannot divide by (below 1.2e-38),
            takes the likeliest token.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the likeliest tokens whose probabilities add up to it; 1 keeps all
            (arXiv:1904.09751).
        min_p: keep tokens with at least this share of the likeliest one's probability; 0 keeps
            all (arXiv:2407.01082).
        repetition_penalty: above 1 makes tokens that occurred less likely (arXiv:1909.05858).
        max_new_tokens: most tokens to add; with 0 the prompt is only read.
        stop: strings that end the text, and are left out of it.
    """

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.9
    min_p: float = 0.0
    repetition_penalty: float = 1.1
    max_new_tokens: int = 128
    stop: Sequence[str] = ()

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature < _FP32.tiny


def choose_token(
    logits: Tensor, ids: Tensor, params: SamplingParams, generator: torch.Generator
) -> int:
    """Returns the next token of one sequence; takes one random number unless that is certain.

    Args:
        logits: fp32 [V].
        ids: int64 [T], the tokens so far, prompt included, on the same device.
        params: how to choose.
        generator: of the sequence, on the CPU.

    Raises:
        UserError: a logit is not a number, or the largest is infinite.
    """
    logits = penalize_repetition(logits, ids, params.repetition_penalty)
    if params.is_greedy:
        # On CPUs torch's takes thirty times as long as numpy's. Both find a NaN if there is one.
        token = int(logits.numpy().argmax() if logits.device.type == "cpu" else logits.argmax())
        _check_finite(logits[token])
        return token
    scaled, tokens = filtered(logits, params)  # N
    sums = scaled.double().softmax(0).cumsum(0).cpu()  # N
    chance = torch.rand((), generator=generator, dtype=torch.float64) * sums[-1]
    place = min(int(torch.searchsorted(sums, chance, right=True)), len(sums) - 1)
    return int(tokens[place])


def penalize_repetition(logits: Tensor, ids: Tensor, penalty: float) -> Tensor:
    """Divides positive and multiplies negative logits [V] of the tokens `ids` [T] by `penalty`.

    A quotient beyond fp32 becomes its largest number: infinities have no difference.
    """
    if penalty == 1:
        return logits
    return logits.scatter(0, ids, _penalize(logits[ids], penalty))


def _penalize(seen: Tensor, penalty: float | Tensor) -> Tensor:
    return torch.where(seen > 0, (seen / penalty).clamp(max=_FP32.max), seen * penalty)


def filtered(logits: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """Returns what temperature and filters leave of logits [V].

    The filters work one after the other, top-k, top-p, min-p, as in transformers.

    Returns:
        (scaled, tokens): fp32 [N], logits divided by the temperature and shifted so that the
        largest is 0; int64 [N], their tokens. Likeliest first, if there is any filter.

    Raises:
        UserError: a logit is not a number, or the largest is infinite.
    """
    largest = logits.max()
    _check_finite(largest)
    # Shifted first: a small temperature would make infinities of both.
    scaled = (logits - largest) / params.temperature  # V
    if params.top_k == 0 and params.top_p == 1 and params.min_p == 0:
        return scaled, torch.arange(len(scaled), device=scaled.device)
    if params.top_k < _NUM_FIRST_TRIED < len(scaled):
        likeliest, tokens = scaled.topk(_NUM_FIRST_TRIED)
        num_kept = _num_kept(likeliest, scaled, params)
        if num_kept < _NUM_FIRST_TRIED:
            return likeliest[:num_kept], tokens[:num_kept]
    ordered, tokens = scaled.sort(descending=True)  # V
    num_kept = _num_kept(ordered, scaled, params)
    return ordered[:num_kept], tokens[:num_kept]


def _num_kept(likeliest: Tensor, scaled: Tensor, params: SamplingParams) -> int:
    """Returns how many of the likeliest tokens the filters leave; if all, maybe more of the rest.

    Args:
        likeliest: the largest of `scaled`, in order.
        scaled: fp32 [V], all of them.
        params: how to choose.
    """
    rivals = scaled
    if 0 < params.top_k < len(likeliest):
        smallest = likeliest[params.top_k - 1]
        likeliest, rivals = likeliest[likeliest >= smallest], scaled[scaled >= smallest]
    if params.top_p < 1:
        probabilities = likeliest.exp() / rivals.exp().sum()
        before = probabilities.cumsum(0) - probabilities
        likeliest = likeliest[before < max(params.top_p, _FP32.tiny)]
    if params.min_p > 0:
        likeliest = likeliest[likeliest >= math.log(params.min_p)]
    return len(likeliest)


def choice_numbers(params: SamplingParams, vocab_size: int) -> list[float]:
    """Returns what `choose_tokens` needs of a sequence's parameters, always as many numbers.

    They are temperature, penalty, whether there is any filter, and of the filters: how many tokens
    top-k leaves, the share that top-p leaves, and the smallest logit that min-p leaves.
    """
    is_filtered = params.top_k != 0 or params.top_p != 1 or params.min_p != 0
    return [
        0.0 if params.is_greedy else params.temperature,
        params.repetition_penalty,
        float(is_filtered),
        float(min(params.top_k or vocab_size, vocab_size)),
        max(params.top_p, _FP32.tiny) if params.top_p < 1 else math.inf,
        math.log(params.min_p) if params.min_p > 0 else -math.inf,
    ]


def choose_tokens(
    logits: Tensor, ids: Tensor, numbers: Tensor, chances: Tensor, samples: bool
) -> Tensor:
    """Returns the next token of several sequences, as `choose_token` does of one.

    Args:
        logits: fp32 [B, V].
        ids: int64 [B, T], the tokens so far; shorter sequences repeat one of theirs.
        numbers: float64 [B, 6], the `choice_numbers` of each.
        chances: float64 [B], the random number of each, from 0 to 1.
        samples: whether any of them has a temperature.

    Returns:
        int64 [B]; -1 where a logit is not a number, or the largest is infinite.
    """
    temperature, penalty, *filters = numbers[:, :, None].unbind(1)  # B 1
    penalty = penalty.float()
    seen = logits.gather(1, ids)  # B T
    seen = torch.where(penalty == 1, seen, _penalize(seen, penalty))
    logits = logits.scatter(1, ids, seen)
    likeliest = logits.argmax(1, keepdim=True)  # B 1
    largest = logits.gather(1, likeliest)
    tokens = likeliest
    if samples:
        divisor = torch.where(temperature == 0, 1.0, temperature).float()
        sampled = _sample_rows((logits - largest) / divisor, filters, chances[:, None])
        tokens = torch.where(temperature == 0, likeliest, sampled)
    return torch.where(largest.isfinite(), tokens, -1)[:, 0]


def _sample_rows(scaled: Tensor, filters: list[Tensor], chances: Tensor) -> Tensor:
    """Returns a token for each row of logits whose largest is 0, [B, 1].

    Args:
        scaled: fp32 [B, V].
        filters: the other `choice_numbers`, each float64 [B, 1].
        chances: float64 [B, 1].
    """
    is_filtered, top_k, top_p, smallest = filters
    ordered, tokens = scaled.sort(stable=True, dim=1, descending=True)  # B V
    of_top_k = ordered >= ordered.gather(1, top_k.long() - 1)  # equal ones, too
    # Without any filter tokens stay in the order of the vocabulary.
    ordered = torch.where(is_filtered == 0, scaled, ordered)
    tokens = torch.where(
        is_filtered == 0, torch.arange(tokens.shape[1], device=tokens.device), tokens
    )
    weights = ordered.double().exp()
    sums = weights.cumsum(1)  # B V

    def sum_of(is_kept: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the place of the last token that is kept, and the sum up to it, each [B, 1]."""
        last = (is_kept.sum(1, keepdim=True) - 1).clamp(min=0)
        return last, sums.gather(1, last)

    _, total = sum_of(of_top_k)
    is_kept = of_top_k & (sums - weights < top_p * total) & (ordered >= smallest)
    last, total = sum_of(is_kept)
    places = torch.searchsorted(sums, chances * total, right=True).minimum(last)
    return tokens.gather(1, places)


def _check_finite(logit: Tensor) -> None:
    if not math.isfinite(logit):
        raise not_a_number()


def not_a_number() -> UserError:
    """Returns the error of a sequence for which the model's output is not a number."""
    return UserError(
        "the model's output is not a number",
        fix="Its weights are damaged, or its training went wrong: look at its report.html.",
        exit_code=ExitCode.NOT_FINITE,
    )
