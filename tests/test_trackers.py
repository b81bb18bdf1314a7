"""Trackers, the real ones: what a run that was stopped and resumed leaves in each."""

from __future__ import annotations

import json
import os
import sqlite3
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import run_script
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record

from kiem.core.errors import ExitCode
from kiem.core.files import remove_folder

SECRET = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def tracked(sample_chunks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that was stopped after its checkpoint at step 2 of 4 and gone on with."""
    folder = tmp_path_factory.mktemp("tracked")
    command = (
        *("training.py", "--dataset-path", sample_chunks, "--model", "gemma3-micro"),
        *("--output-dir", folder, "--run-name", "run", "--max-steps", "4", "--save-steps", "2"),
        *("--eval-steps", "2", "--batch-size", "4", "--gradient-accumulation-steps", "1"),
        *(
            "--use-wandb",
            "--trackers",
            "tensorboard",
            "trackio",
            "--sample-prompt",
            "Er was <b>eens",
        ),
    )
    env = {"WANDB_MODE": "offline", "WANDB_API_KEY": SECRET, "HF_HUB_OFFLINE": "1"}
    env["TRACKIO_DIR"] = str(folder / "trackio")
    for _ in range(2):
        done = run_script(*command, env=env)
        assert done.returncode == 0, done.stderr
        remove_folder(folder / "run" / "checkpoints" / "step-4")
        final_model = (folder / "run" / "final_model").rename(folder / "final_model")
        summary = (final_model / "training_summary.json").read_text(encoding="utf-8")
        remove_folder(final_model)
    (folder / "summary.json").write_text(summary, encoding="utf-8")
    return folder


def log_lines(tracked: Path) -> list[dict[str, Any]]:
    text = (tracked / "run" / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def wandb_records(path: Path) -> Iterator[Record]:
    """Reads a .wandb file: blocks of 32 KiB with LevelDB's log records, after 7 bytes."""
    data, place, payload = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, size, kind = struct.unpack("<IHB", data[place : place + 7])
        payload += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # a whole record, or its last part
            record = Record()
            record.ParseFromString(payload)
            payload = b""
            yield record


def test_wandb(tracked: Path) -> None:
    first, second = sorted((tracked / "run" / "wandb").glob("offline-run-*"))
    logged: dict[int, float] = {}
    for folder in (first, second):
        for record in wandb_records(folder / "run-run.wandb"):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                assert (record.run.run_id, record.run.project) == ("run", "kiem")
                config = {
                    item.key: json.loads(item.value_json) for item in record.run.config.update
                }
            if kind == "history":
                row = {
                    "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item
                }
                if "loss" in row:
                    logged[row["_step"]] = row["loss"]
    assert (config["max_steps"], config["parameters"]) == (4, 1560064)
    assert config["data"]["train_documents"] == 79
    assert logged == {line["step"]: line["loss"] for line in log_lines(tracked) if "loss" in line}
    updates = [
        item
        for record in wandb_records(second / "run-run.wandb")
        if record.WhichOneof("record_type") == "summary"
        for item in record.summary.update
    ]
    summary = json.loads((tracked / "summary.json").read_text(encoding="utf-8"))
    bpb = [json.loads(item.value_json) for item in updates if item.key == "test_bpb"]
    assert bpb[-1] == summary["test_bpb"]
    tables = sorted((second / "files" / "media" / "table").glob("samples_4_*.json"))
    table = json.loads(tables[-1].read_text(encoding="utf-8"))
    assert table["columns"] == ["prompt", "text"]
    samples = log_lines(tracked)[-1]["samples"]
    assert table["data"] == [[sample["prompt"], sample["text"]] for sample in samples]


def test_tensorboard(tracked: Path) -> None:
    events = EventAccumulator(str(tracked / "run" / "tensorboard"))
    events.Reload()
    lines = [line for line in log_lines(tracked) if "loss" in line]
    found = [(event.step, event.value) for event in events.Scalars("loss")]
    assert found == [(line["step"], pytest.approx(line["loss"])) for line in lines]
    assert [event.step for event in events.Scalars("test_bpb")] == [2, 4]
    texts = events.Tensors("samples/Er was <b>eens/text_summary")
    assert {event.step for event in texts} == {2, 4}  # it keeps the first text of step 4 as well
    text = texts[0].tensor_proto.string_val[0].decode()
    assert text.startswith("    Er was <b>eens")
    config = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert json.loads(config)["max_steps"] == 4


def test_trackio(tracked: Path) -> None:
    connection = sqlite3.connect(tracked / "trackio" / "kiem.db")
    rows = connection.execute("SELECT run_name, step, metrics FROM metrics").fetchall()
    config = json.loads(connection.execute("SELECT config FROM configs").fetchone()[0])
    connection.close()
    assert {row[0] for row in rows} == {"run"}
    logged = {step: json.loads(text)["loss"] for _, step, text in rows if b'"loss"' in text}
    assert logged == {line["step"]: line["loss"] for line in log_lines(tracked) if "loss" in line}
    tables = [json.loads(text)["samples"] for _, _, text in rows if b'"samples":{' in text]
    assert tables[-1]["_value"] == log_lines(tracked)[-1]["samples"]
    assert config["max_steps"] == 4


def test_no_secret_reaches_a_file(tracked: Path) -> None:
    num_files = 0
    for folder, _, names in os.walk(tracked):
        for name in names:
            path = Path(folder, name)
            if path.is_file():
                assert SECRET.encode() not in path.read_bytes(), path
                num_files += 1
    assert num_files > 20


def test_project_without_a_tracker_that_has_them(sample_chunks: Path) -> None:
    options = ("--trackers", "tensorboard", "--wandb-project", "x")
    done = run_script("training.py", "--dataset-path", sample_chunks, *options)
    assert done.returncode == ExitCode.NO_EFFECT
    assert "--wandb-project: has no effect" in done.stderr
