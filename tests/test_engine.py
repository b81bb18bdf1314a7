"""The engine: what it writes is what the model alone would write, whoever else is being served."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from conftest import SMALL, WINDOW
from transformers import Gemma3ForCausalLM

from kiem.inference.decoder import use_kernels
from kiem.inference.engine import Engine, Request, RequestOutput
from kiem.inference.sampling import SamplingParams
from kiem.model.gemma3 import Gemma3, initialize
from kiem.model.io import write_model

GREEDY = SamplingParams(temperature=0, repetition_penalty=1)
# Widths that the kernels take.
WIDE = replace(SMALL, hidden_size=128, intermediate_size=256, head_dim=32, query_pre_attn_scalar=32)


@pytest.fixture(scope="module")
def model() -> Gemma3:
    model = Gemma3(SMALL)
    initialize(model, seed=1)
    with torch.no_grad():  # so that a token's logits depend on all before it
        for parameter in model.parameters():
            parameter.mul_(3)
    return model.requires_grad_(False)


def wide_model(dtype: torch.dtype = torch.float32) -> Gemma3:
    """Whose texts change from token to token, and whose logits are far apart."""
    model = Gemma3(WIDE)
    initialize(model, seed=8)
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.mul_(3)
        model.model.norm.weight.add_(9)
    return model.to(dtype).requires_grad_(False)


def prompt(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, SMALL.vocab_size, (length,), generator=generator).tolist()


def run(engine: Engine) -> dict[int, list[RequestOutput]]:
    found: dict[int, list[RequestOutput]] = {}
    while engine.num_running or engine.num_waiting:
        for new in engine.step():
            found.setdefault(new.request_id, []).append(new)
    return found


def tokens(news: list[RequestOutput]) -> list[int]:
    return [new.token for new in news if new.token is not None]


def test_many_requests_on_few_slots_get_what_each_gets_alone(model: Gemma3) -> None:
    """Lengths around the window; slots are left and taken again in every order."""
    requests = [
        Request(prompt(length, seed), replace(params, max_new_tokens=1 + 7 * seed % 23), seed)
        for seed, length in enumerate([1, 2, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW, 33] * 3)
        for params in (GREEDY, SamplingParams())
    ]
    together = Engine(model, None, max_requests=5, max_tokens=64)
    numbers = [together.add(request) for request in requests]
    assert (together.num_running, together.num_waiting) == (0, len(requests))
    found = run(together)
    for number, request in zip(numbers, requests, strict=True):
        alone = Engine(model, None, max_requests=1, max_tokens=64)
        alone.add(request)
        expected = run(alone)[0]
        assert tokens(found[number]) == tokens(expected)
        assert len(expected) == request.params.max_new_tokens
        reasons = [new.finish_reason for new in found[number]]
        assert reasons == [None] * (len(reasons) - 1) + ["length"]


@pytest.mark.parametrize(
    ("quantize", "dtype"),
    [("none", "float32"), ("none", "bfloat16"), ("int8", "float32"), ("int4", "bfloat16")],
)
def test_kernels_give_each_request_the_same_bits_in_any_company(quantize: str, dtype: str) -> None:
    model = wide_model(getattr(torch, dtype))
    use_kernels(model, quantize)
    assert model.decoder is not None
    requests = [
        Request(
            prompt(length, seed),
            replace(params, max_new_tokens=5 + 7 * seed % 17),
            seed,
            num_logprobs=3,
        )
        for seed, length in enumerate([1, 2, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW, 33])
        for params in (GREEDY, SamplingParams())
    ]
    together = Engine(model, None, max_requests=9, max_tokens=64)
    for request in requests:
        together.add(request)
    found = run(together)
    for number, request in enumerate(requests):
        alone = Engine(model, None, max_requests=1, max_tokens=64)
        alone.add(request)
        assert [replace(new, request_id=number) for new in run(alone)[0]] == found[number]


def test_greedy_texts_of_200_prompts_are_those_of_transformers(tmp_path: Path) -> None:
    model = wide_model()
    write_model(model, tmp_path, {"pad": 0, "eos": 1, "bos": 2})
    reference = Gemma3ForCausalLM.from_pretrained(tmp_path)
    use_kernels(model, "none")
    num_new = 12
    engine = Engine(model, None, max_requests=8, max_tokens=64)
    expected = []
    for length in range(1, 26):
        prompts = [prompt(length, 100 * length + seed) for seed in range(8)]
        written = reference.generate(
            torch.tensor(prompts),
            attention_mask=torch.ones(8, length, dtype=torch.long),
            **{"max_new_tokens": num_new, "min_new_tokens": num_new, "do_sample": False},
            **{"eos_token_id": None, "return_dict_in_generate": True, "output_logits": True},
        )
        first, second = torch.stack(written.logits).topk(2).values.unbind(-1)
        assert (first - second).min() > 1e-3, (
            "no answer is right where two tokens are equally likely"
        )
        expected += written.sequences[:, length:].tolist()
        for ids in prompts:
            engine.add(Request(ids, replace(GREEDY, max_new_tokens=num_new), seed=0))
    found = run(engine)
    assert [tokens(found[number]) for number in range(200)] == expected


def test_greedy_tokens_are_the_likeliest_after_all_before_them(model: Gemma3) -> None:
    engine = Engine(model, None, max_requests=1, max_tokens=1100)
    ids = prompt(1030)  # longer than a part of prefill
    engine.add(Request(ids, replace(GREEDY, max_new_tokens=20), seed=0, num_logprobs=3))
    for new in run(engine)[0]:
        logits = model.logits(model.hidden_states(torch.tensor([ids]))[0, -1])
        logprobs = logits.log_softmax(-1)
        likeliest = logprobs.topk(3)
        assert new.token == likeliest.indices[0]
        assert new.score is not None
        assert new.score.logprob == pytest.approx(likeliest.values[0].item(), abs=1e-4)
        assert [token for token, _ in new.score.alternatives] == likeliest.indices.tolist()
        assert [p for _, p in new.score.alternatives] == pytest.approx(
            likeliest.values.tolist(), abs=1e-4
        )
        ids.append(new.token)


def test_a_request_ends_with_eos(model: Gemma3) -> None:
    request = Request(prompt(5), SamplingParams(max_new_tokens=30), 3)
    engine = Engine(model, None, max_requests=1, max_tokens=64)
    engine.add(request)
    whole = tokens(run(engine)[0])
    eos_id = whole[10]
    tokenizer: Any = Mock(eos_id=eos_id, decode=str)
    engine = Engine(model, tokenizer, max_requests=1, max_tokens=64)
    engine.add(request)
    news = run(engine)[0]
    assert tokens(news) == whole[: whole.index(eos_id) + 1]
    assert news[-1].finish_reason == "eos"
    assert news[-1].score is None


def test_a_cancelled_request_leaves_its_place_and_no_trace(model: Gemma3) -> None:
    params = SamplingParams(max_new_tokens=20)
    requests = [Request(prompt(9, seed), params, seed) for seed in range(4)]
    engine = Engine(model, None, max_requests=2, max_tokens=64)
    for request in requests:
        engine.add(request)
    first = engine.step()
    engine.cancel(0)
    engine.cancel(2)
    assert (engine.num_running, engine.num_waiting) == (1, 1)
    found = run(engine)
    engine.cancel(0)  # ended long ago
    assert found.keys() == {1, 3}
    alone = Engine(model, None, max_requests=1, max_tokens=64)
    for request in (requests[1], requests[3]):
        alone.add(request)
    expected = run(alone)
    begun = [new.token for new in first if new.request_id == 1]
    assert begun + tokens(found[1]) == tokens(expected[0])
    assert tokens(found[3]) == tokens(expected[1])


def test_nothing_to_do_is_done_at_once(model: Gemma3) -> None:
    engine = Engine(model, None, max_requests=2, max_tokens=8)
    assert engine.step() == []
    with pytest.raises(AssertionError, match="9 tokens in a slot of 8"):
        engine.add(Request(prompt(5), replace(GREEDY, max_new_tokens=4), seed=0))
