"""The model against transformers' Gemma3ForCausalLM, and against itself with a cache."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import SMALL, WINDOW
from transformers import Gemma3ForCausalLM

from kiem.compute.attention import attend, causal_mask
from kiem.core.errors import ExitCode, UserError
from kiem.model.cache import CachePass, KeyValueCache
from kiem.model.config import (
    GEMMA3_1B_PARAMETERS,
    Gemma3Config,
    name_of,
    preset,
    read_config,
    shape_of,
    sizes,
)
from kiem.model.gemma3 import Gemma3, Recompute, initialize
from kiem.model.io import read_model, write_model
from kiem.model.loss import IGNORE, next_token_targets
from kiem.optim.batch import document_starts

LENGTHS = [WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW + 3]
BOS, PAD = 2, 0
GEMMA_WITH_TEXT_AS_SIZE = json.dumps(
    {"model_type": "gemma3_text", **asdict(SMALL), "hidden_size": "veel"}
)


@pytest.fixture(scope="module")
def model() -> Gemma3:
    model = Gemma3(SMALL)
    initialize(model, seed=1)
    with torch.no_grad():  # norms that do something, and weights large enough to matter
        for name, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(len(name))
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


@pytest.fixture(scope="module")
def folder(model: Gemma3, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_model(model, folder, {"pad": PAD, "eos": 1, "bos": BOS})
    return folder


@pytest.fixture(scope="module")
def reference(folder: Path) -> Gemma3ForCausalLM:
    return Gemma3ForCausalLM.from_pretrained(folder, attn_implementation="eager")


def random_ids(length: int, rows: int = 3, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, SMALL.vocab_size, (rows, length), generator=generator)


def test_gemma3_1b_has_its_published_number_of_parameters() -> None:
    with torch.device("meta"):
        model = Gemma3(preset("gemma3-1b", 262_144))
    assert sum(p.numel() for p in model.parameters()) == GEMMA3_1B_PARAMETERS
    with torch.device("meta"):
        model = Gemma3(preset("gemma3-nano", 16_384))
    assert (
        sum(p.numel() for p in model.parameters()) == preset("gemma3-nano", 16_384).num_parameters()
    )
    assert preset("gemma3-nano", 16_384).num_parameters() == pytest.approx(9.9e6, rel=0.01)


def test_sizes_of_the_family_have_names() -> None:
    """Each name stands for its shape, and a number for the size that is nearest."""
    for name in sizes():
        assert name_of(preset(name, 1000)) == name
    assert shape_of("gemma3-20m").num_layer_parameters() == pytest.approx(20e6, rel=0.1)
    assert name_of(shape_of("gemma3-1.4m")) == "gemma3-micro"
    for wrong in ("gemma3-2b", "gemma3-0m", "gemma3-9999m", "gemma3-1.m", "gemma3-x", "Gemma3-1b"):
        with pytest.raises(UserError, match="gemma3-<N>m"):
            shape_of(wrong)


def test_shape_equals_the_published_config() -> None:
    """Against transformers' own conversion of the values in google/gemma-3-1b-pt's config.json."""
    published = {
        "hidden_size": 1152,
        "intermediate_size": 6912,
        "num_hidden_layers": 26,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
        "rope_theta": 1_000_000,
        "rope_local_base_freq": 10_000,
        "max_position_embeddings": 32768,
    }
    config = preset("gemma3-1b", 262_144)
    assert {name: getattr(config, name) for name in published} == published
    assert [n for n in range(26) if not config.is_sliding(n)] == [5, 11, 17, 23]


@pytest.mark.parametrize("length", LENGTHS)
def test_logits_loss_and_gradients_equal_transformers(
    model: Gemma3, reference: Gemma3ForCausalLM, length: int
) -> None:
    ids = random_ids(length)
    expected = reference(ids, labels=ids)
    torch.testing.assert_close(
        model.logits(model.hidden_states(ids)), expected.logits, rtol=0, atol=1e-4
    )

    model.zero_grad()
    reference.zero_grad()
    loss, nats = model(ids, next_token_targets(ids, BOS, PAD), None)
    num_targets = ids.shape[0] * (length - 1)
    (loss / num_targets).backward()
    expected.loss.backward()
    torch.testing.assert_close(nats / num_targets, expected.loss.detach(), rtol=0, atol=1e-4)
    expected_gradients = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, expected_gradients[name].grad, rtol=0, atol=1e-4, msg=name
        )


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputing_gives_the_same_gradients(model: Gemma3, recompute: Recompute) -> None:
    ids = random_ids(2 * WINDOW)
    expected = gradients(model, ids)
    model.recompute = recompute
    found = gradients(model, ids)
    model.recompute = "none"
    for plain, recomputed in zip(expected, found, strict=True):
        assert torch.equal(plain, recomputed)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_compiled_layers_give_the_same_gradients(recompute: Recompute) -> None:
    """Other tokens and documents compile nothing again."""
    torch._dynamo.reset()
    model = Gemma3(SMALL)
    initialize(model, 1)
    ids = random_ids(2 * WINDOW)
    expected = gradients(model, ids)
    model.recompute = recompute
    model.compile_layers()
    for plain, compiled in zip(expected, gradients(model, ids), strict=True):
        torch.testing.assert_close(plain, compiled, rtol=0, atol=1e-4)
    torch._dynamo.utils.counters.clear()
    other = random_ids(2 * WINDOW, seed=1)
    other[:, 3] = BOS
    gradients(model, other)
    assert not torch._dynamo.utils.counters["stats"]["unique_graphs"]


def gradients(model: Gemma3, ids: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    model(ids, next_token_targets(ids, BOS, PAD), starts_of(ids), 1e-4)[0].backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def starts_of(ids: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(document_starts(ids.numpy(), BOS))


def test_documents_do_not_see_each_other(model: Gemma3) -> None:
    ids = random_ids(24, rows=1)
    ids[0, 0] = ids[0, 10] = BOS
    changed = ids.clone()
    changed[0, 3] = (ids[0, 3] + 1) % 90 + 3
    starts = starts_of(ids)
    plain, other = (model.hidden_states(x, document_starts=starts)[0] for x in (ids, changed))
    assert not torch.equal(plain[3:10], other[3:10])
    assert torch.equal(plain[10:], other[10:])
    alone = model.hidden_states(ids[:, 10:])[0]
    torch.testing.assert_close(plain[10:], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("window", [None, 200, 300])
@pytest.mark.parametrize("num_tokens", [5, 256, 700])
def test_attention_in_blocks_equals_the_plain_one(num_tokens: int, window: int | None) -> None:
    """In fp64, with documents that begin anywhere; torch's kernels get blocks of 256 queries."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, gradient = (
        torch.randn(2, heads, num_tokens, 8, generator=generator, dtype=torch.float64)
        for heads in (4, 2, 2, 4)
    )
    for tensor in (q, k, v):
        tensor.requires_grad_()
    positions = torch.arange(num_tokens)
    document = (torch.rand(2, num_tokens, generator=generator) < 0.01).cumsum(1)
    mask = causal_mask(positions, positions, window) & (document[:, :, None] == document[:, None])
    scores = torch.einsum("bhtc,bhsc->bhts", q, k.repeat_interleave(2, 1)) * 0.3
    weights = scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1)
    expected = torch.einsum("bhts,bhsc->bhtc", weights, v.repeat_interleave(2, 1))
    k_all, v_all = (tensor.repeat_interleave(2, 1) for tensor in (k, v))
    found = attend(q, k_all, v_all, mask[:, None], window, 0.3)
    torch.testing.assert_close(found, expected)
    for one, other in zip(
        torch.autograd.grad(found, (q, k, v), gradient),
        torch.autograd.grad(expected, (q, k, v), gradient),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("length", [WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW, 4 * WINDOW])
@pytest.mark.parametrize("prefill", [1, 3, WINDOW + 2])
def test_cached_equals_uncached(model: Gemma3, length: int, prefill: int) -> None:
    """In two parts of several tokens, then token by token; in the last two of three slots."""
    ids = random_ids(length, rows=2)
    cache = KeyValueCache(SMALL, 3, length, torch.float32, torch.device("cpu"))
    starts = [0, prefill, *range(prefill + 4, length), length]
    with torch.no_grad():
        expected = model.hidden_states(ids)
        parts = []
        for start, end in itertools.pairwise(sorted({min(start, length) for start in starts})):
            positions = torch.arange(start, end).expand(2, -1)
            where = CachePass(cache, 1, positions, end)
            parts.append(model.hidden_states(ids[:, start:end], cached=where))
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=0, atol=1e-5)


def test_sequences_of_different_lengths_share_a_cache(model: Gemma3) -> None:
    """Prompts around the window; slots that longer and shorter sequences have used before."""
    lengths = [1, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW, 4 * WINDOW]
    num_new = 2 * WINDOW
    max_tokens = max(lengths) + num_new
    ids = random_ids(max_tokens, rows=len(lengths))
    cache = KeyValueCache(SMALL, len(lengths), max_tokens, torch.float32, torch.device("cpu"))
    with torch.no_grad():
        expected = model.hidden_states(ids)
        for round_lengths in (lengths, lengths[::-1]):
            for slot, length in enumerate(round_lengths):
                where = CachePass(cache, slot, torch.arange(length)[None], length)
                model.hidden_states(ids[slot : slot + 1, :length], cached=where)
            for step in range(num_new):
                positions = torch.tensor(round_lengths)[:, None] + step
                where = CachePass(cache, 0, positions, max_tokens)
                found = model.hidden_states(ids.gather(1, positions), cached=where)
                rows = torch.arange(len(lengths))
                torch.testing.assert_close(
                    found[:, 0], expected[rows, positions[:, 0]], rtol=0, atol=1e-5
                )


@pytest.mark.parametrize("bf16", [False, True])
def test_gradients_added_in_place_are_those_of_autograd(model: Gemma3, bf16: bool) -> None:
    """Two passes; and one without gradients leaves them alone."""
    batches = [random_ids(24, rows=2), random_ids(24, rows=2).flip(1)]
    scale = torch.tensor(1 / 92)
    found = []
    for in_place in (False, True):
        model.zero_grad()
        model.model.embed_tokens.adds_to_gradient = in_place
        for ids in batches:
            targets = next_token_targets(ids, BOS, PAD)
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                model(ids, targets, None, 1e-4, scale)[0].backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        with torch.no_grad():
            model(batches[0], batches[0], None)
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter.grad, gradients[name])
        found.append(gradients)
    model.model.embed_tokens.adds_to_gradient = False
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-3 if bf16 else 1e-6)


def test_targets_leave_out_padding_and_bos() -> None:
    ids = torch.tensor([[BOS, 5, 6, 1, BOS, 7, 1, PAD, PAD]])
    expected = torch.tensor([[5, 6, 1, IGNORE, 7, 1, IGNORE, IGNORE, IGNORE]])
    assert torch.equal(next_token_targets(ids, BOS, PAD), expected)


def test_written_model_is_read_back(model: Gemma3, folder: Path) -> None:
    assert read_config(folder) == SMALL
    loaded = read_model(folder)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, loaded.get_parameter(name))


def test_model_saved_by_transformers_is_read(
    model: Gemma3, reference: Gemma3ForCausalLM, tmp_path: Path
) -> None:
    reference.save_pretrained(tmp_path)
    loaded = read_model(tmp_path)
    assert loaded.config == SMALL
    ids = random_ids(20)
    with torch.no_grad():
        assert torch.equal(loaded.hidden_states(ids), model.hidden_states(ids))


def test_initialization_does_not_depend_on_the_shape_of_other_parameters() -> None:
    models = [Gemma3(SMALL), Gemma3(Gemma3Config(**{**vars(SMALL), "num_hidden_layers": 3}))]
    for model in models:
        initialize(model, seed=7)
    for name, parameter in models[1].named_parameters():
        assert torch.equal(parameter, models[0].get_parameter(name))


def test_loss_at_initialization_is_near_the_uniform_one() -> None:
    model = Gemma3(SMALL)
    initialize(model, seed=0)
    ids = random_ids(64, rows=8)
    _, nats = model(ids, next_token_targets(ids, BOS, PAD), starts_of(ids))
    assert nats.item() / (8 * 63) == pytest.approx(torch.tensor(97.0).log().item(), abs=0.3)


def test_truncated_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-10])
    with pytest.raises(UserError) as caught:
        read_model(tmp_path)
    assert caught.value.exit_code == ExitCode.DAMAGED
