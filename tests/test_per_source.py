"""Bits per byte of each source: which token is whose, and what training makes of it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_script
from datasets import load_from_disk
from rich.console import Console
from transformers import Gemma3ForCausalLM

from kiem.config import PreprocessOptions
from kiem.core.errors import ExitCode, UserError
from kiem.data.chunks import open_split, open_test_sources, read_manifest, read_tokenizer
from kiem.data.prepare.preprocess import preprocess
from kiem.data.prepare.verify import verify_directory
from kiem.report.page import render
from kiem.report.record import read_record

LETTERS = {"boeken": "abcdefgh", "kranten": "ijklmnop", "wetten": "qrstuvwx"}


@pytest.fixture(params=["concat", "best-fit"])
def chunks(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Documents of three sources, each with letters of its own."""
    generator = np.random.default_rng(5)
    lines = []
    for number in range(300):
        name = list(LETTERS)[number % 3]
        letters = generator.choice([*LETTERS[name], " "], generator.integers(50, 300))
        lines.append(json.dumps({"text": "".join(letters), "source": name}))
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    options = PreprocessOptions(
        source=(str(tmp_path / "in.jsonl"),),
        tokenizer="train:512",
        chunk_size=32,
        packing=request.param,
        test_split=0.2,
        output_dir=tmp_path,
    )
    return preprocess(options, Console(quiet=True))


def test_every_test_token_has_its_source(chunks: Path) -> None:
    manifest = verify_directory(chunks)
    test, tokenizer = manifest["splits"]["test"], read_tokenizer(chunks, manifest)
    sources = open_test_sources(chunks, manifest)
    assert sources is not None
    ids = np.concatenate(open_split(chunks, manifest, "test").blocks)
    labels = np.concatenate(sources.blocks)
    assert ((labels == -1) == (ids == tokenizer.pad_id)).all()
    for number, name in enumerate(test["source_names"]):
        written = tokenizer.decode(ids[labels == number].tolist())
        assert set(written) <= {*LETTERS[name], " "}
        assert test["tokens_per_source"][name] == (labels == number).sum()
        assert (
            test["documents_per_source"][name]
            == ((labels == number) & (ids == tokenizer.bos_id)).sum()
        )
    for key in ("tokens", "documents", "bytes"):
        assert sum(test[f"{key}_per_source"].values()) == test[key]
    dataset = load_from_disk(str(chunks))
    assert set(dataset) == {"train", "test"} and dataset["test"].column_names == ["input_ids"]


def test_damage_to_the_sources_is_found(chunks: Path) -> None:
    file = next((chunks / "test_sources").glob("*.arrow"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="damaged") as caught:
        verify_directory(chunks)
    assert caught.value.where == str(file)


def test_training_measures_every_source(chunks: Path, tmp_path: Path) -> None:
    """Against transformers' loss of each token, given those before it in its chunk."""
    done = run_script(
        *("training.py", "--dataset-path", chunks, "--output-dir", tmp_path / "runs"),
        *("--run-name", "run", "--model", "gemma3-micro", "--max-steps", "6", "--batch-size", "4"),
        *("--eval-steps", "3", "--save-steps", "0", "--precision", "fp32"),
        "--no-document-mask",
    )
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "run"
    found = json.loads((run / "final_model" / "training_summary.json").read_text())["per_source"]
    manifest = read_manifest(chunks)
    test, sources = manifest["splits"]["test"], open_test_sources(chunks, manifest)
    assert sources is not None
    ids = torch.from_numpy(np.concatenate(open_split(chunks, manifest, "test").blocks)).long()
    labels = np.concatenate(sources.blocks)[:, 1:]
    model = Gemma3ForCausalLM.from_pretrained(run / "final_model")
    with torch.no_grad():
        log_p = model(ids).logits[:, :-1].log_softmax(-1)
    nats = -log_p.gather(2, ids[:, 1:, None])[..., 0].double().numpy()
    is_begin = (ids[:, 1:] == manifest["special_ids"]["bos"]).numpy()
    assert found.keys() == LETTERS.keys()
    for number, name in enumerate(test["source_names"]):
        mean = nats[(labels == number) & ~is_begin].mean()
        tokens = test["tokens_per_source"][name] - test["documents_per_source"][name]
        bits = mean * tokens / math.log(2)
        assert found[name]["bpb"] == pytest.approx(bits / test["bytes_per_source"][name], abs=1e-4)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert next(line for line in lines if "test_bpb" in line)["per_source"].keys() == LETTERS.keys()
    card = (run / "final_model" / "README.md").read_text()
    assert f"| bits per byte of kranten | {found['kranten']['bpb']:.4f} |" in card
    assert "Bits per byte by source" in render([read_record(run)])


def test_evaluate_names_the_sources_of_a_chunk_directory(
    chunks: Path, trained_run: Path, tmp_path: Path
) -> None:
    model, out = trained_run / "final_model", tmp_path / "out.json"
    done = run_script("evaluate.py", "--model-path", model, "--data", chunks, "--json", out)
    manifest = read_manifest(chunks)
    if manifest["options"]["packing"] == "best-fit":
        assert done.returncode == ExitCode.BAD_INPUT and "not in one piece" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())["per_source"]
    counts = manifest["splits"]["test"]["bytes_per_source"]
    assert {name: entry["bytes"] for name, entry in found.items()} == counts
