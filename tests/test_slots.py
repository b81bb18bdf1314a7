"""A step on the device: the tokens of the plain path, whatever begins, ends and moves."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from conftest import SMALL, WINDOW

from kiem.core.errors import UserError
from kiem.inference.cuda_graphs import CudaGraphs
from kiem.inference.engine import Engine, Request, RequestOutput
from kiem.inference.gpu_decoder import use_gpu_decoder
from kiem.inference.sampling import SamplingParams
from kiem.inference.slots import DeviceSlots
from kiem.model.cache import CachePass, KeyValueCache
from kiem.model.config import Gemma3Config
from kiem.model.gemma3 import Gemma3, initialize

GREEDY = SamplingParams(temperature=0, repetition_penalty=1)
WAYS = (
    GREEDY,
    SamplingParams(),
    SamplingParams(temperature=0),
    SamplingParams(1.2, top_p=1, repetition_penalty=1),
    SamplingParams(0.7, 5, 0.8, 0.05, 1.3),
)
MAX_TOKENS = 64


def small_model(
    device: str = "cpu", dtype: torch.dtype = torch.float32, config: Gemma3Config = SMALL
) -> Gemma3:
    model = Gemma3(config)
    initialize(model, seed=1)
    with torch.no_grad():  # so that a token's logits depend on all before it
        for parameter in model.parameters():
            parameter.mul_(3)
    return model.to(device, dtype).requires_grad_(False)


@pytest.fixture(scope="module")
def model() -> Gemma3:
    return small_model()


def prompt(length: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(3, SMALL.vocab_size), k=length)


def requests(num_logprobs: int = 0) -> Iterator[Request]:
    lengths = (1, 2, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW, 33)
    for number, (length, params) in enumerate(itertools.product(lengths, WAYS)):
        params = replace(params, max_new_tokens=1 + 7 * number % 23)
        yield Request(prompt(length, number), params, number, num_logprobs=num_logprobs)


def run(engine: Engine, cancelled: tuple[int, ...] = ()) -> list[RequestOutput]:
    found = []
    while engine.num_running or engine.num_waiting:
        found += engine.step()
        if len(found) > 40:
            for number in cancelled:
                engine.cancel(number)
    return found


@pytest.mark.parametrize(
    ("num_keys", "num_rows", "end"), [(1, 1, 32), (2, 3, 40), (4, 4, MAX_TOKENS)]
)
def test_the_decoder_for_gpus_does_what_the_model_does(
    num_keys: int, num_rows: int, end: int
) -> None:
    """Whatever share of the heads has its own keys; the weights keep their names and values."""
    model = small_model(config=replace(SMALL, num_key_value_heads=num_keys))
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    generator = torch.Generator().manual_seed(num_keys)
    ids = torch.randint(3, SMALL.vocab_size, (num_rows, 1), generator=generator)
    positions = torch.randint(0, end, (num_rows, 1), generator=generator)
    found = []
    for _ in range(2):
        cache = KeyValueCache(model.config, 5, MAX_TOKENS, model.dtype, ids.device)
        filler = torch.Generator().manual_seed(7)
        for layer in cache.layers:
            layer.keys.normal_(generator=filler)
            layer.values.normal_(generator=filler)
        found.append(model.hidden_states(ids, cached=CachePass(cache, 1, positions, end)))
        found += [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
        use_gpu_decoder(model)
    half = len(found) // 2
    for plain, joined in zip(found[:half], found[half:], strict=True):
        torch.testing.assert_close(joined, plain)
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(weights[name], w) for name, w in model.state_dict().items())


def test_a_model_in_training_gets_no_decoder() -> None:
    model = small_model()
    model.model.norm.requires_grad_(True)
    use_gpu_decoder(model)
    assert model.decoder is None


@pytest.mark.parametrize("max_requests", [1, 5, 8])
def test_tokens_are_those_of_the_plain_path(max_requests: int) -> None:
    """In slots that are left, moved and taken again; some requests are cancelled."""
    model, found = small_model(), []  # a new one, since the steps on the device change it
    for on_device in (False, True):
        engine = Engine(
            model, None, max_requests=max_requests, max_tokens=MAX_TOKENS, on_device=on_device
        )
        for request in requests(num_logprobs=2):
            engine.add(request)
        found.append(run(engine, cancelled=(3, 4, 9)))
    plain, device = found
    assert len(device) == len(plain)
    for new, expected in zip(device, plain, strict=True):
        assert new.score is not None and expected.score is not None
        assert new.score.logprob == pytest.approx(expected.score.logprob, abs=1e-4)
        assert replace(new, score=None) == replace(expected, score=None)


def test_a_prompt_is_scored_and_the_cache_may_be_filled(model: Gemma3) -> None:
    """A request that fills its slot, beside one that goes on after that."""
    full = Request(
        prompt(MAX_TOKENS - 2, 1), replace(GREEDY, max_new_tokens=2), 0, 0, 0, 3, scores_prompt=True
    )
    other = Request(prompt(3, 2), SamplingParams(max_new_tokens=30), 1)
    engines = [
        Engine(model, None, max_requests=2, max_tokens=MAX_TOKENS, on_device=on_device)
        for on_device in (False, True)
    ]
    for engine in engines:
        engine.add(other)
        engine.add(full)
    plain, device = map(run, engines)
    assert [new.token for new in device] == [new.token for new in plain]
    assert [len(new.prompt_scores) for new in device if new.prompt_scores] == [MAX_TOKENS - 3]


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("params", [GREEDY, SamplingParams()])
def test_output_that_is_no_number_ends_its_request_alone(
    model: Gemma3, params: SamplingParams, on_device: bool
) -> None:
    """In the prompt or after it, and not the request that gets its slot."""
    spoilt = prompt(5, 3)[-1]
    prompts = [prompt(4, 0), prompt(5, 3), prompt(6, 1)]

    def spoil(_: torch.nn.Module, given: tuple[torch.Tensor], out: torch.Tensor) -> torch.Tensor:
        return torch.where((given[0] == bad_token)[..., None], torch.nan, out)

    def tokens(number: int) -> list[int | None]:
        return [new.token for new in found if new.request_id == number]

    def write() -> list[RequestOutput]:
        engine = Engine(model, None, max_requests=3, max_tokens=MAX_TOKENS, on_device=on_device)
        for number, ids in enumerate(prompts):
            engine.add(Request(ids, replace(params, max_new_tokens=9), number))
        return run(engine)

    bad_token = -1
    found = write()
    expected = [tokens(number) for number in range(3)]
    others = {*prompts[0], *prompts[2], *expected[0], *expected[2]}
    after = next(place for place, token in enumerate(expected[1]) if token not in others)
    assert spoilt not in others
    for token, num_tokens in ((spoilt, 0), (expected[1][after], after + 1)):
        bad_token = token
        hook = model.model.embed_tokens.register_forward_hook(spoil)
        found = write()
        hook.remove()
        assert tokens(1) == [*expected[1][:num_tokens], None]
        (error,) = [new.error for new in found if new.error is not None]
        assert isinstance(error, UserError) and "not a number" in str(error)
        assert [tokens(0), tokens(2)] == [expected[0], expected[2]]


@pytest.mark.parametrize("samples", [False, True])
def test_a_step_reads_no_value_on_the_host(samples: bool) -> None:
    """On a device without values, which is another one than the host's."""
    with torch.device("meta"), torch.inference_mode():
        model = Gemma3(SMALL).requires_grad_(False)
        DeviceSlots(model, 4, MAX_TOKENS).advance(2, 32, samples)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-3), (torch.bfloat16, 0.5)])
def test_graphs_write_what_the_plain_path_writes(dtype: torch.dtype, near: float) -> None:
    """Greedily, and up to the first two tokens that are nearly equally likely."""
    model = small_model("cuda", dtype)
    plain: dict[int, list[RequestOutput]] = {}
    device: dict[int, list[RequestOutput]] = {}
    for found, on_device in ((plain, False), (device, True)):
        engine = Engine(model, None, max_requests=5, max_tokens=MAX_TOKENS, on_device=on_device)
        for request in requests(num_logprobs=2):
            greedy = replace(request.params, temperature=0, repetition_penalty=1)
            engine.add(replace(request, params=greedy))
        for output in run(engine):
            found.setdefault(output.request_id, []).append(output)
    num_tokens = num_equal = 0
    for number, expected in plain.items():
        num_tokens += len(expected)
        for new, reference in zip(device[number], expected, strict=True):
            if new.token != reference.token:
                assert reference.score is not None
                (_, first), (_, second) = reference.score.alternatives
                assert first - second < near
                break
            num_equal += 1
    assert num_equal > num_tokens / 2


@pytest.mark.gpu
def test_graphs_write_the_same_text_again() -> None:
    model = small_model("cuda", torch.bfloat16)
    texts = []
    for _ in range(2):
        engine = Engine(model, None, max_requests=5, max_tokens=MAX_TOKENS)
        for request in requests():
            engine.add(request)
        texts.append(run(engine))
    assert texts[0] == texts[1]


@pytest.mark.gpu
def test_the_host_does_not_wait_within_a_step() -> None:
    """Neither plainly nor in a graph; the first call of `run` makes the graph, which does."""
    model = small_model("cuda")
    with torch.inference_mode():
        slots, graphs = DeviceSlots(model, 4, MAX_TOKENS), CudaGraphs(torch.device("cuda"))
        for slot, params in enumerate(WAYS[:4]):
            slots.begin(slot, [2], replace(params, max_new_tokens=9), torch.Generator())
        graphs.run(slots.advance, 4, MAX_TOKENS, True)
        torch.cuda.set_sync_debug_mode("error")
        try:
            slots.advance(4, MAX_TOKENS, True)
            graphs.run(slots.advance, 4, MAX_TOKENS, True)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_there_are_few_graphs() -> None:
    """For batches of 1, 2, 4 and 6, of up to 256, 512 and 600 tokens, greedy or not."""
    model = small_model("cuda")
    with torch.inference_mode():
        slots = DeviceSlots(model, 6, 600)
        for temperature, length in itertools.product((0.0, 1.0), range(1, 600, 40)):
            params = SamplingParams(temperature, max_new_tokens=1)
            for slot in range(6):
                slots.begin(slot, [2] * length, params, torch.Generator())
                slots.step(slot + 1)
        assert slots.num_graphs == 4 * 3 * 2


@pytest.mark.gpu
def test_what_cannot_be_a_graph_runs_plainly() -> None:
    values = torch.zeros(1, device="cuda")

    def add_and_wait(number: int) -> None:
        values.add_(number).item()

    graphs, stream = CudaGraphs(values.device), torch.cuda.current_stream()
    with torch.inference_mode():
        with pytest.warns(UserWarning, match="without CUDA graphs"):
            graphs.run(add_and_wait, 1)
        graphs.run(add_and_wait, 1)
    assert graphs.num_graphs == 0
    assert torch.cuda.current_stream() == stream
    assert values.item() == 2
