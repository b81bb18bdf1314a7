"""Quantized weights in the user's cache: the same model, or made again."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from kiem.compute.kernels import load_kernels
from kiem.core.files import write_bytes
from kiem.inference.loading import LoadedModel, load_for_inference
from kiem.model.io import WEIGHTS_FILE


@pytest.fixture
def model(trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model directory of its own, whose weights count as many, beside an empty cache."""
    assert not isinstance(load_kernels(), str)  # now, or they would be compiled into that cache
    monkeypatch.setattr("kiem.inference.loading.KEPT_FROM_BYTES", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Path(shutil.copytree(trained_run / "final_model", tmp_path / "model"))


def are_equal(a: LoadedModel, b: LoadedModel) -> bool:
    """Says whether two models have the same weights and write the same logits for few tokens."""
    states = a.model.state_dict(), b.model.state_dict()
    if states[0].keys() != states[1].keys():
        return False
    ids = torch.tensor([[2, 17, 4, 99]])
    logits = [one.model.logits(one.model.hidden_states(ids)[:, -1]) for one in (a, b)]
    return torch.equal(*logits) and all(torch.equal(states[1][k], v) for k, v in states[0].items())


@pytest.mark.parametrize("has_manifest", [True, False])
@pytest.mark.parametrize("format", ["int8", "int4"])
def test_the_second_start_takes_them_without_reading_the_model(
    format: str, has_manifest: bool, model: Path
) -> None:
    if not has_manifest:
        (model / "manifest.json").unlink()
    first = load_for_inference(str(model), "fp32", format)
    assert first.kept is not None and (first.kept / WEIGHTS_FILE).is_file()
    if has_manifest:
        write_bytes(model / WEIGHTS_FILE, b"nobody reads this")
    second = load_for_inference(str(model), "fp32", format)
    assert second.kept is None
    assert are_equal(first, second)


def test_damaged_ones_are_made_again(model: Path) -> None:
    first = load_for_inference(str(model), "fp32", "int4")
    assert first.kept is not None
    for change in ("a byte", "the end", "everything"):
        path = first.kept / WEIGHTS_FILE
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        cut = {"a byte": len(content), "the end": len(content) - 9, "everything": 0}[change]
        path.write_bytes(content[:cut])
        again = load_for_inference(str(model), "fp32", "int4")
        assert again.kept == first.kept, change
        assert are_equal(first, again)


def test_others_in_the_same_place_are_not_taken_for_the_model(model: Path) -> None:
    (model / "manifest.json").unlink()
    first = load_for_inference(str(model), "fp32", "int8")
    content = bytearray((model / WEIGHTS_FILE).read_bytes())
    content[-1] ^= 0x41  # the sign and the exponent of a weight
    write_bytes(model / WEIGHTS_FILE, bytes(content))
    other = load_for_inference(str(model), "fp32", "int8")
    assert other.kept not in (None, first.kept)
    assert not are_equal(first, other)
    assert load_for_inference(str(model), "bf16", "int8").kept not in (None, other.kept)


def test_only_the_last_ones_stay(model: Path, tmp_path: Path) -> None:
    kept = []
    for number in range(6):
        copy = Path(shutil.copytree(model, tmp_path / f"copy {number}"))
        (copy / "manifest.json").unlink()
        kept.append(load_for_inference(str(copy), "fp32", "int4").kept)
    assert [path is not None and path.is_dir() for path in kept] == [False, False, *[True] * 4]


def test_a_cache_that_cannot_be_written_to_is_done_without(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "no folder").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "no folder"))
    assert load_for_inference(str(model), "fp32", "int4").kept is None
