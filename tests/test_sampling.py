"""The choice of tokens: the same filters as transformers', and the probabilities they promise."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from kiem.core.errors import UserError
from kiem.inference.sampling import (
    SamplingParams,
    choice_numbers,
    choose_token,
    choose_tokens,
    filtered,
    penalize_repetition,
)


def reference(logits: torch.Tensor, sampling: SamplingParams) -> torch.Tensor:
    """Returns the probabilities [V] that transformers chooses with."""
    steps = [TemperatureLogitsWarper(sampling.temperature)]
    if sampling.top_k:
        steps.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        steps.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        steps.append(MinPLogitsWarper(sampling.min_p))
    no_ids = torch.empty(1, 0, dtype=torch.int64)
    return LogitsProcessorList(steps)(no_ids, logits[None]).softmax(-1)[0]


def ours(logits: torch.Tensor, sampling: SamplingParams) -> torch.Tensor:
    scaled, tokens = filtered(logits, sampling)
    return torch.zeros(len(logits)).scatter(0, tokens, scaled.softmax(0))


@pytest.mark.parametrize("num_rows", [200, 5000])
def test_filters_equal_transformers(num_rows: int) -> None:
    """Alone and together; the larger vocabulary is searched in part first, and may be in whole."""
    generator = torch.Generator().manual_seed(num_rows)
    ways = itertools.product(
        (0.7, 1.5), (0, 1, 5, 199, 3000, 9999), (0.01, 0.5, 0.9, 0.999, 1.0), (0, 0.001, 0.1, 1)
    )
    for temperature, top_k, top_p, min_p in ways:
        logits = torch.randn(num_rows, generator=generator) * 2
        sampling = SamplingParams(temperature, top_k, top_p, min_p)
        found, expected = ours(logits, sampling), reference(logits, sampling)
        assert torch.equal(found > 0, expected > 0), sampling
        torch.testing.assert_close(found, expected, msg=str(sampling))


def test_filters_equal_transformers_with_gemmas_vocabulary() -> None:
    generator = torch.Generator().manual_seed(0)
    for scale, top_p in ((1.0, 0.9), (3.0, 0.9), (6.0, 0.5)):
        logits = torch.randn(262_144, generator=generator) * scale
        sampling = SamplingParams(1.0, top_p=top_p)
        found, expected = ours(logits, sampling), reference(logits, sampling)
        # Both add up 262 144 numbers, in another order: the border may move by one token.
        assert abs(int((found > 0).sum()) - int((expected > 0).sum())) <= 1 + (scale == 1.0) * 20
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-3)


def test_of_equal_logits_top_k_keeps_all() -> None:
    logits = torch.tensor([1.0, 3.0, 2.0, 2.0, 0.0])
    assert (ours(logits, SamplingParams(1.0, top_k=2, top_p=1)) > 0).tolist() == [0, 1, 1, 1, 0]


def test_repetition_penalty_equals_transformers() -> None:
    logits = torch.randn(50, 200, generator=torch.Generator().manual_seed(0)) * 3
    ids = torch.randint(0, 200, (50, 30), generator=torch.Generator().manual_seed(1))
    for penalty in (0.8, 1.0, 1.3):
        expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits)
        rows = [penalize_repetition(*row, penalty) for row in zip(logits, ids, strict=True)]
        torch.testing.assert_close(torch.stack(rows), expected)


@pytest.mark.parametrize(
    "sampling",
    [SamplingParams(1.0, top_p=1), SamplingParams(0.7, 5), SamplingParams(1.2, 0, 0.8, 0.05)],
)
def test_tokens_come_as_often_as_they_should(sampling: SamplingParams) -> None:
    """Chi-squared over 4000 choices: below the value that chance exceeds once in 10 000 times."""
    logits = torch.tensor([2.0, -1.0, 0.0, 1.0, 1.5, 0.5, -3.0])
    generator = torch.Generator().manual_seed(7)
    no_ids = torch.empty(0, dtype=torch.int64)
    chosen = torch.tensor([choose_token(logits, no_ids, sampling, generator) for _ in range(4000)])
    counts = torch.bincount(chosen, minlength=7)
    expected = reference(logits, sampling) * 4000
    possible = expected > 0
    assert counts[~possible].sum() == 0
    statistic = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    assert statistic < 27.9  # 6 degrees of freedom


def test_the_coldest_choice_is_the_likeliest_and_the_hottest_is_any() -> None:
    logits = torch.tensor([0.0, 5.0, -5.0, 4.9])
    no_ids = torch.empty(0, dtype=torch.int64)
    generator = torch.Generator().manual_seed(0)
    for temperature in (0, 1e-30, 1e-6):
        assert choose_token(logits, no_ids, SamplingParams(temperature, top_p=1), generator) == 1
    hot = {
        choose_token(logits, no_ids, SamplingParams(100, top_p=1), generator) for _ in range(100)
    }
    assert hot == {0, 1, 2, 3}


def test_the_same_seed_chooses_the_same() -> None:
    """With another filter only what the filter leaves out changes."""
    logits = torch.randn(3000, generator=torch.Generator().manual_seed(0))
    no_ids = torch.empty(0, dtype=torch.int64)
    for sampling in (SamplingParams(), SamplingParams(1.0, 0, 1.0, 0.0)):
        first, second = (
            [choose_token(logits, no_ids, sampling, generator) for _ in range(20)]
            for generator in (torch.Generator().manual_seed(3), torch.Generator().manual_seed(3))
        )
        assert first == second
        assert len(set(first)) > 10


def test_output_that_is_no_number_is_reported() -> None:
    logits = torch.tensor([0.0, torch.nan])
    no_ids = torch.empty(0, dtype=torch.int64)
    with pytest.raises(UserError, match="not a number"):
        choose_token(logits, no_ids, SamplingParams(), torch.Generator())


TINY = (5e-324, 1e-50, 1e-46, 1e-39, 1.17e-38, 1.18e-38, 1e-30)
EXTREMES = [
    *(SamplingParams(temperature=temperature) for temperature in (-0.0, *TINY, 100)),
    *(SamplingParams(1.0, top_p=top_p) for top_p in (*TINY, 1 - 2**-53)),
    *(SamplingParams(1.0, min_p=min_p) for min_p in (*TINY, 1 - 2**-53, 1)),
    *(SamplingParams(t, repetition_penalty=p) for p in (*TINY, 100) for t in (0, 1e-30, 1.0, 100)),
    *(SamplingParams(1.0, top_k=top_k) for top_k in (1, 1023, 1024, 1025, 2**63)),
    SamplingParams(1e-30, 10**40, 5e-324, 1.0, 5e-324),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("largest", [0.0, 1e-38, 30.0, 3e38])
def test_every_value_in_range_chooses_a_token(dtype: torch.dtype, largest: float) -> None:
    """Whatever the logits are, as long as they are numbers; seen are the best and the worst."""
    generator = torch.Generator().manual_seed(3)
    for num_rows in (7, 3000):
        logits = (torch.rand(num_rows, generator=generator) * 2 - 1).mul(largest).to(dtype).float()
        seen = torch.tensor([int(logits.argmax()), int(logits.argmin()), 1])
        for sampling in EXTREMES:
            token = choose_token(logits, seen, sampling, generator)
            assert 0 <= token < num_rows
            if sampling.top_p < 1e-20 and sampling.temperature == 1:
                penalized = penalize_repetition(logits, seen, sampling.repetition_penalty)
                assert penalized[token] == penalized.max(), sampling


@pytest.mark.parametrize("temperature", [0, 1e-50, 0.8])
@pytest.mark.parametrize("top_k", [0, 5])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_no_number_is_never_a_token(temperature: float, top_k: int, bad: float) -> None:
    logits = torch.zeros(2000)
    logits[700] = bad
    ids, generator = torch.tensor([3, 5]), torch.Generator()
    with pytest.raises(UserError, match="not a number"):
        choose_token(logits, ids, SamplingParams(temperature, top_k), generator)


def assert_batched_chooses_the_same(
    logits: torch.Tensor, ids: torch.Tensor, ways: Sequence[SamplingParams]
) -> None:
    """Of equal logits any may be chosen: the order of a sort decides. Arguments: [B, V], [B, T]."""
    numbers = [choice_numbers(params, logits.shape[1]) for params in ways]
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(ways))]
    chances = [torch.rand((), generator=each, dtype=torch.float64) for each in generators]
    chosen = choose_tokens(
        *(logits, ids, torch.tensor(numbers, dtype=torch.float64), torch.stack(chances)),
        samples=not all(params.is_greedy for params in ways),
    )
    for row, params in enumerate(ways):
        generator = torch.Generator().manual_seed(row)
        try:
            expected = choose_token(logits[row], ids[row], params, generator)
        except UserError:
            assert chosen[row] == -1, params
            continue
        penalized = penalize_repetition(logits[row], ids[row], params.repetition_penalty)
        scaled = (penalized - penalized.max()) / max(params.temperature, 1e-30)
        assert scaled[chosen[row]] == scaled[expected], params


@pytest.mark.parametrize("rounded_to", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_rows", [200, 5000])
def test_many_rows_at_once_choose_what_each_chooses_alone(
    num_rows: int, rounded_to: torch.dtype
) -> None:
    """With every filter, each row with another one; in bfloat16 many logits are equal."""
    generator = torch.Generator().manual_seed(num_rows)
    ways = itertools.product(
        (0, 0.7, 1.5), (0, 1, 5, 199, 3000, 9999), (0.01, 0.9, 0.999, 1.0), (0, 0.1, 1), (0.8, 1, 2)
    )
    together = [SamplingParams(*way) for way in ways]
    for start in range(0, len(together), 27):
        part = together[start : start + 27]
        logits = torch.randn(len(part), num_rows, generator=generator) * 3
        ids = torch.randint(0, num_rows, (len(part), 40), generator=generator)
        assert_batched_chooses_the_same(logits.to(rounded_to).float(), ids, part)


@pytest.mark.parametrize("largest", [0.0, 1e-38, 30.0, 3e38])
def test_many_rows_at_once_take_every_value_in_range(largest: float) -> None:
    generator = torch.Generator().manual_seed(3)
    # Not 3000: 0.9 of so many that are equally likely would be a whole number.
    logits = (torch.rand(len(EXTREMES), 2999, generator=generator) * 2 - 1) * largest
    ids = torch.stack([logits.argmax(1), logits.argmin(1), torch.ones(len(EXTREMES)).long()], 1)
    assert_batched_chooses_the_same(logits, ids, EXTREMES)


def test_many_rows_at_once_tell_which_are_no_numbers() -> None:
    ways = [SamplingParams(t, k) for t in (0, 0.8) for k in (0, 5) for _ in range(4)]
    logits = torch.zeros(len(ways), 2000)
    for row, bad in enumerate((torch.nan, torch.inf, -torch.inf, 0) * 4):
        logits[row, 700] = bad
    logits[-2] = -torch.inf
    assert_batched_chooses_the_same(logits, torch.tensor([[3, 5]] * len(ways)), ways)
