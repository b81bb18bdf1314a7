"""What is recorded of Hub datasets: licences, commits and hashes; and what an audit finds."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import run_script
from hub_layouts import json_lines
from hub_runs import manifest_of, run_all
from hub_server import HubServer

LINES = {f"data/{n}.jsonl": json_lines(f"deel {n} ") * 9 for n in range(5)}
OPTIONS = ("--tokenizer", "train:512", "--chunk-size", "32", "--test-split", "0.1")


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer({"datasets/some/lines": LINES}) as server:
        yield server


def test_licences_of_the_card_and_of_the_option(hub: HubServer, tmp_path: Path) -> None:
    """Licences cut the files into several entries, behind which the commit is found again."""
    files = [tmp_path / "een.jsonl", tmp_path / "twee.jsonl"]
    for file in files:
        file.write_bytes(json_lines(file.stem))
    hub.commit("datasets/some/lines", {**LINES, "README.md": b"---\nlicense: odc-by\n---\n"})
    line = ["--source", *files, "hub:some/lines", "sample", "--licence", "MIT", "CC0-1.0", "", ""]
    line += [*OPTIONS, "--output-dir", tmp_path / "out"]
    (run,) = run_all(hub, tmp_path / "cache", [line])
    assert run.code == 0, run.err
    entries = manifest_of(tmp_path / "out" / "chunked_een")["source"]["sources"]
    assert [entry.get("licence") for entry in entries] == ["MIT", "CC0-1.0", "odc-by", None]
    hub.commit("datasets/some/lines", {"data/other.jsonl": json_lines("anders")})
    (again,) = run_all(hub, tmp_path / "cache", [line])
    assert again.code == 0 and "is there already" in again.out


def test_an_audit_looks_into_the_cache(hub: HubServer, tmp_path: Path, trained_run: Path) -> None:
    out, cache = tmp_path / "out", tmp_path / "cache"
    line = ["--source", "hub:some/lines", "sample", *OPTIONS, "--output-dir", out, "--name", "made"]
    (run,) = run_all(hub, cache, [line])
    assert run.code == 0, run.err
    audit = ("-m", "kiem", "audit", trained_run, "--dataset-path", out / "made")
    shown = run_script(*audit, env=hub.environment(cache, None)).stdout
    assert "proved       made <- source files (6 of 6 files)" in shown
    assert "changed      run <- " in shown  # which read another one
    file = next(cache.rglob("snapshots/*/data/3.jsonl"))
    file.resolve().write_bytes(b"x" + file.read_bytes()[1:])
    shown = run_script(*audit, env=hub.environment(cache, None)).stdout
    assert f"changed: {file}: expected git's sha1" in shown
    shown = run_script(*audit, env=hub.environment(tmp_path / "empty", None)).stdout
    assert "not checked  made <- source files (1 of 6 files)" in shown


def test_a_run_from_a_model_asks_for_it_once(
    hub: HubServer, tmp_path: Path, sample_chunks: Path, trained_run: Path
) -> None:
    model, out = trained_run / "final_model", tmp_path / "out"
    files = {path.name: path.read_bytes() for path in model.iterdir()}
    commit = hub.commit("some/model", files)
    done = run_script(
        *("training.py", "--dataset-path", sample_chunks, "--init-from", "some/model"),
        *("--output-dir", out, "--run-name", "run", "--max-steps", "1", "--batch-size", "1"),
        *("--gradient-accumulation-steps", "1", "--minimal-pairs", "never", "--sample-prompt"),
        env=hub.environment(tmp_path / "cache", None),
    )
    assert done.returncode == 0, done.stderr
    asked = [path for _, path, _ in hub.log if path.startswith("/api/")]
    assert len(asked) == len(set(asked)) > 0
    sha256 = hashlib.sha256(files["model.safetensors"]).hexdigest()
    recorded = json.loads((out / "run" / "run.json").read_text())["first_weights"]
    assert recorded == {"commit": commit, "sha256": {"model.safetensors": sha256}}


def test_the_files_of_the_default_dataset_are_proved_too(
    sample_texts: list[str], tmp_path: Path, trained_run: Path
) -> None:
    content = io.BytesIO()
    pq.write_table(pa.table({"text": sample_texts}), content)
    files = {"10k/train-00000-of-00001.parquet": content.getvalue()}
    out, cache = tmp_path / "out", tmp_path / "cache"
    line = ["--dataset-size", "10k", *OPTIONS, "--output-dir", out, "--name", "made"]
    with HubServer({"datasets/BramVanroy/wikipedia_culturax_dutch": files}) as hub:
        (run,) = run_all(hub, cache, [line])
        assert run.code == 0, run.err
        audit = ("-m", "kiem", "audit", trained_run, "--dataset-path", out / "made")
        shown = run_script(*audit, env=hub.environment(cache, None)).stdout
        assert "proved       made <- source files" in shown
        file = next(cache.rglob("snapshots/*/10k/*.parquet"))
        file.resolve().write_bytes(b"x" + file.read_bytes()[1:])
        shown = run_script(*audit, env=hub.environment(cache, None)).stdout
        assert f"changed: {file}: expected" in shown
