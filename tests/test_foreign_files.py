"""Files of others: a model that works, or one message that names the file and the key."""

from __future__ import annotations

import itertools
import json
import math
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from conftest import SMALL
from foreign_cases import (
    CARDS,
    CONFIGS,
    NOT_MODELS,
    REMOVED,
    VALUES,
    Place,
    changed,
    places,
)
from safetensors.torch import load_file, save_file

from kiem.core.errors import ExitCode, UserError
from kiem.core.manifest import write_manifest
from kiem.data.chunks import open_split, open_test_sources, read_manifest, read_tokenizer
from kiem.data.prepare.verify import verify_shards
from kiem.export.gguf_file import read_card
from kiem.export.vocabulary import make_vocabulary
from kiem.model.config import read_config
from kiem.model.gemma3 import Gemma3, initialize
from kiem.model.io import read_model, write_model
from kiem.report.page import render
from kiem.report.record import read_record
from kiem.tokenizer.encoding import Encoder, fast_path
from kiem.tokenizer.tokenizer import Tokenizer, parse_tokenizer
from kiem.tokenizer.train import train_tokenizer

SHAPE = replace(SMALL, num_hidden_layers=2, sliding_window_pattern=2)
IDS = {"pad": 0, "eos": 1, "bos": 2}


@dataclass(frozen=True)
class Folder:
    """A model directory whose config.json tests change.

    Attributes:
        path: where it is.
        styles: what config.json says in the words of different versions of transformers.
    """

    path: Path
    styles: dict[str, dict[str, Any]]

    def write(self, config: Any) -> None:
        (self.path / "config.json").write_text(json.dumps(config), encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    from transformers import Gemma3TextConfig

    path = tmp_path_factory.mktemp("model")
    model = Gemma3(SHAPE)
    initialize(model, seed=0)
    write_model(model, path, IDS)
    ours = json.loads((path / "config.json").read_text())
    new = ("layer_types", "tie_word_embeddings")
    in_4_50 = {key: value for key, value in ours.items() if key not in new}
    in_5 = json.loads(Gemma3TextConfig(**ours).to_json_string())
    assert "rope_parameters" in in_5
    return Folder(path, {"of kiem": ours, "of 4.50": in_4_50, "of 5": in_5})


STYLES = ("of kiem", "of 4.50", "of 5")


def check_works(folder: Path) -> None:
    model = read_model(folder)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        logits = model.logits(model.hidden_states(ids))
    assert logits.shape == (1, 20, model.config.vocab_size)
    assert bool(logits.isfinite().all())


@pytest.mark.parametrize("style", STYLES)
def test_any_change_of_config_json(style: str, folder: Folder) -> None:
    config = folder.styles[style]
    folder.write(config)
    assert read_config(folder.path) == SHAPE
    check_works(folder.path)
    num_refused, working = 0, {SHAPE}
    for place, new in itertools.product(places(config), VALUES):
        folder.write(changed(config, place, new))
        try:
            if (shape := read_config(folder.path)) not in working:
                check_works(folder.path)
                working.add(shape)
        except UserError as error:
            num_refused += 1
            assert error.exit_code == ExitCode.NOT_A_MODEL, (place, new)
            assert str(error).startswith(str(folder.path))
            names_key = str(place[0]) in error.what or "by config.json it should" in error.what
            assert names_key, (place, new, error.what)
    assert num_refused > 300


@pytest.mark.parametrize("name", CONFIGS)
def test_message_about_config_json(name: str, folder: Folder) -> None:
    changes, message = CONFIGS[name]
    folder.write({**folder.styles["of kiem"], **changes})
    with pytest.raises(UserError) as caught:
        read_model(folder.path)
    assert f"{caught.value.where}: {caught.value.what}" == f"{folder.path}/config.json: {message}"


@pytest.fixture
def weights(folder: Folder) -> dict[str, torch.Tensor]:
    """The weights of the model, to be written in another way."""
    return load_file(folder.path / "model.safetensors")


@pytest.fixture
def empty(folder: Folder, tmp_path: Path) -> Folder:
    """A folder with the right config.json and without weights."""
    other = replace(folder, path=tmp_path)
    other.write(folder.styles["of kiem"])
    return other


NORM = "model.norm.weight"
FILE = "model.safetensors"


def refused(folder: Path, file: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        read_model(folder)
    assert caught.value.where == str(folder / file if file else folder)
    assert message in caught.value.what


def test_weights_that_do_not_fit(empty: Folder, weights: dict[str, torch.Tensor]) -> None:
    embedding = "model.embed_tokens.weight"
    without = {name: tensor for name, tensor in weights.items() if name != NORM}
    for changed_weights, file, message in (
        (without, "", f"{NORM} is missing; by config.json it should be [48]"),
        ({**weights, "model.extra": torch.zeros(1)}, "", "model.extra is there; by config.json"),
        ({}, "", f"{embedding} is missing"),
        *(
            ({**weights, NORM: tensor}, file, f"{NORM} is {what}")
            for tensor, file, what in (
                (torch.zeros(47), "", "[47]; by config.json it should be [48]"),
                (torch.zeros(48, 1), "", "[48, 1]; by config.json it should be [48]"),
                (torch.tensor(1.0), "", "[]; by config.json it should be [48]"),
                (torch.zeros(48, dtype=torch.int8), FILE, "I8, not one of F32, BF16, F16, F64"),
                (torch.zeros(48, dtype=torch.bool), FILE, "BOOL, not one of"),
                (torch.zeros(48, dtype=torch.float8_e4m3fn), FILE, "F8_E4M3, not one of"),
            )
        ),
    ):
        save_file(changed_weights, empty.path / FILE)
        refused(empty.path, file, message)
    untied = {**weights, "lm_head.weight": weights[embedding].clone()}
    mixed = {
        name: tensor.bfloat16() if "mlp" in name else tensor for name, tensor in weights.items()
    }
    for dtype in (torch.float16, torch.float64, torch.bfloat16):
        save_file({name: tensor.to(dtype) for name, tensor in weights.items()}, empty.path / FILE)
        check_works(empty.path)
    for working in (untied, mixed):
        save_file(working, empty.path / FILE)
        check_works(empty.path)


def test_weights_with_random_damage(empty: Folder, folder: Folder) -> None:
    whole = (folder.path / FILE).read_bytes()
    header_bytes = 8 + int.from_bytes(whole[:8], "little")
    chance = random.Random(0)
    for number in range(200):
        damaged = bytearray(whole)
        place = chance.randrange(header_bytes)
        if number % 4 == 0:
            del damaged[chance.choice([place, chance.randrange(len(whole))]) :]
        elif number % 4 == 1:
            del damaged[place : place + chance.choice([1, 8, 100])]
        else:
            damaged[place] = chance.randrange(256)
        (empty.path / FILE).write_bytes(damaged)
        try:
            check_works(empty.path)  # a name in the header's metadata may have changed
        except UserError as error:
            assert error.exit_code in (ExitCode.DAMAGED, ExitCode.NOT_A_MODEL)
            assert str(empty.path) in str(error)


def test_weights_in_several_files(empty: Folder, weights: dict[str, torch.Tensor]) -> None:
    paths = [empty.path / f"model-{n}-of-00002.safetensors" for n in ("00001", "00002")]
    for number, path in enumerate(paths):
        save_file(dict(list(weights.items())[number::2]), path)
    check_works(empty.path)
    whole = paths[1].read_bytes()
    paths[1].write_bytes(whole[:-1])
    refused(empty.path, paths[1].name, "the weights cannot be read")
    paths[1].unlink()
    refused(empty.path, "", "is missing; by config.json")
    paths[0].unlink()
    refused(empty.path, "", "there is no model.safetensors")


@pytest.mark.parametrize("num_layers", [1, 3, 1000])
def test_more_or_fewer_layers_than_weights(
    empty: Folder, weights: dict[str, torch.Tensor], num_layers: int
) -> None:
    save_file(weights, empty.path / FILE)
    changes = {"num_hidden_layers": num_layers, "layer_types": None}
    empty.write({**empty.styles["of kiem"], **changes})
    refused(empty.path, "", "model.layers.")


@pytest.mark.parametrize("name", NOT_MODELS)
def test_folder_that_is_no_model(name: str, tmp_path: Path) -> None:
    content, message = NOT_MODELS[name]
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_model(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)
    assert message in caught.value.what
    assert caught.value.exit_code == ExitCode.NOT_A_MODEL


def test_names_of_no_folder(tmp_path: Path) -> None:
    for name in ("gone", "x" * 300, "a\0b"):
        with pytest.raises(UserError) as caught:
            read_model(tmp_path / name)
        assert caught.value.exit_code == ExitCode.NOT_FOUND


@pytest.fixture(scope="module")
def tokenizer(sample_texts: list[str]) -> Tokenizer:
    return train_tokenizer(sample_texts, 700)


def test_any_change_of_tokenizer_json(tokenizer: Tokenizer) -> None:
    def where(_: int) -> str:
        return "tokenizer.json"

    description = json.loads(tokenizer.json_bytes)
    text = "Hallo wereld, <eos> café 😀"
    num_refused = num_working = 0
    values = [REMOVED, None, True, 0, -1, 7, 2**31, 2**63, 6.5, math.nan, "", "x", [], [1], {}]
    for place, new in itertools.product(tokenizer_places(description), values):
        json_bytes = json.dumps(changed(description, place, new)).encode()
        try:
            read = parse_tokenizer(json_bytes, "tokenizer.json")
            ids = Encoder(read, fast_path(read, "auto")).encode([text], where).ids.tolist()
            assert max(ids) < read.num_rows, (place, new)
            assert set(read.special_ids) == {"pad", "eos", "bos"}
            read.decode(ids)
            num_working += 1
            make_vocabulary(read, 700)
        except UserError as error:
            num_refused += 1
            assert error.exit_code == ExitCode.TOKENIZER_MISMATCH, (place, new)
            assert error.where == "tokenizer.json"
    assert num_refused > 500
    assert num_working > 100


def tokenizer_places(description: dict[str, Any]) -> Iterator[Place]:
    """Yields the places in a tokenizer.json, of its large vocabulary only some."""
    for place in places(description):
        if place[:2] != ("model", "vocab") or place[2:] in ((), ("<eos>",), ("▁",), ("en",)):
            yield place


def test_files_beside_the_model_that_are_not_read(folder: Folder) -> None:
    folder.write(folder.styles["of kiem"])
    for name in ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json"):
        for content in (b"", b"[]", b"\xff\xfe", b'{"eos_token_id": -1, "eos_token": {}}'):
            (folder.path / name).write_bytes(content)
            check_works(folder.path)


@pytest.mark.parametrize("name", CARDS)
def test_card_of_a_model(name: str, tmp_path: Path) -> None:
    text, expected = CARDS[name]
    path = tmp_path / "README.md"
    path.write_bytes(text.encode())
    if isinstance(expected, dict):
        assert read_card(tmp_path) == expected
        return
    with pytest.raises(UserError) as caught:
        read_card(tmp_path)
    assert str(caught.value).startswith(f"{path}: {expected}")


def test_card_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(b"---\nlicense: caf\xe9\n---\n")
    with pytest.raises(UserError, match=r"README\.md: cannot be read"):
        read_card(tmp_path)
    (tmp_path / "README.md").unlink()
    assert read_card(tmp_path) == {}


def test_any_change_of_a_chunk_directorys_manifest(sample_chunks: Path, tmp_path: Path) -> None:
    folder = tmp_path / "chunks"
    shutil.copytree(sample_chunks, folder)
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    del manifest["sha256"]  # as old ones are, of which nothing says that they are as written
    num_refused = 0
    for place, new in itertools.product(places(manifest), VALUES[::3]):
        if place[0] in ("source", "options", "files") and len(place) > 2:
            continue  # many, and only shown or compared
        text = json.dumps(changed(manifest, place, new), ensure_ascii=False)
        (folder / "manifest.json").write_text(text, encoding="utf-8")
        try:
            read = read_manifest(folder)
            read_tokenizer(folder, read)
            verify_shards(folder, read)
            for split in ("train", "test"):
                assert open_split(folder, read, split).num_chunks > 0
            open_test_sources(folder, read)
        except UserError as error:
            num_refused += 1
            assert str(error).startswith(str(folder)), (place, new)
    assert num_refused > 200
    (folder / "manifest.json").write_bytes((sample_chunks / "manifest.json").read_bytes())
    shard = folder / manifest["splits"]["test"]["shards"][0]["file"]
    for schema in (pa.schema([("a", pa.int32())]), pa.schema([]), pa.schema([("a", pa.string())])):
        pa.ipc.new_stream(str(shard), schema).close()
        with pytest.raises(UserError, match="chunks of 64 tokens"):
            open_split(folder, read_manifest(folder), "test")


def test_any_change_of_a_models_manifest(folder: Folder, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(folder.path, model)
    write_manifest(model)
    manifest = json.loads((model / "manifest.json").read_text())
    read_model(model)
    for place, new in itertools.product(places(manifest), VALUES[::3]):
        (model / "manifest.json").write_text(json.dumps(changed(manifest, place, new), indent=2))
        with pytest.raises(UserError) as caught:
            read_model(model)
        assert caught.value.exit_code == ExitCode.DAMAGED


def test_any_change_of_what_a_run_wrote(trained_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained_run, run, ignore=shutil.ignore_patterns("checkpoints", "*.safetensors"))
    pairs = {"accuracy": 0.5, "phenomena": {"dt": {"accuracy": 0.5, "accuracy_low": 0.25}}}
    summary = run / "final_model" / "training_summary.json"
    files = {
        summary: json.loads(summary.read_text(encoding="utf-8")),
        run / "evaluation.json": {"per_source": {"a": {"bpb": 1.5}}, "minimal_pairs": pairs},
        run / "config.yaml": {"model": "gemma3-micro", "price": 2.5},
    }
    for file, content in files.items():
        for place, new in itertools.product(places(content), [REMOVED, None, "x", []]):
            file.write_text(json.dumps(changed(content, place, new)), encoding="utf-8")
            try:
                record = read_record(run)
            except UserError as error:
                assert error.where == str(file)
                assert str(place[0]) in error.what, place
            else:
                assert render([record]).startswith("<!doctype html>")
        file.write_text(json.dumps(content), encoding="utf-8")


def test_any_change_of_a_line_of_the_log(trained_run: Path, tmp_path: Path) -> None:
    """It is shown, or counted as damaged."""
    log = tmp_path / "metrics.jsonl"
    lines = (trained_run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    whole = [json.loads(line) for line in lines]
    assert any("samples" in line for line in whole)
    for number, new in itertools.product((0, len(whole) - 1), VALUES):
        for place in places(whole[number]):
            line = json.dumps(changed(whole[number], place, new), ensure_ascii=False)
            log.write_text("\n".join((*lines[:number], line, *lines[number + 1 :])) + "\n")
            record = read_record(tmp_path)
            assert record.num_damaged in (0, 1)
    for rest in (b"[]\n", b"\xff\n", b"{\n", b'{"step": 1, "step": 2}\n', b'{"step": "\\ud800"}\n'):
        log.write_bytes(rest)
        assert read_record(tmp_path).num_damaged == 1
