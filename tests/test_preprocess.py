"""From documents to a chunk directory: nothing lost, nothing leaked, readable by others."""

from __future__ import annotations

import io
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import run_script
from datasets import load_from_disk
from hub_server import HubServer
from rich.console import Console

from kiem.config import HUB_DATASET, HUB_TOKENIZER, PreprocessOptions
from kiem.core.errors import ExitCode, UserError
from kiem.data.chunks import open_split, read_manifest, read_tokenizer
from kiem.data.prepare.preprocess import preprocess
from kiem.data.prepare.split import split_limit, split_position
from kiem.data.prepare.verify import verify_shards

QUIET = Console(quiet=True)


def test_split_has_the_asked_share_and_follows_the_seed() -> None:
    tested = [
        {n for n in range(20_000) if split_position(str(n), seed) < split_limit(0.01, 0)}
        for seed in (1, 1, 2)
    ]
    assert len(tested[0]) == pytest.approx(200, abs=60)
    assert tested[0] == tested[1] != tested[2]


def test_chunk_directory_holds_the_sample(sample_chunks: Path, sample_texts: list[str]) -> None:
    manifest = read_manifest(sample_chunks)
    verify_shards(sample_chunks, manifest)
    tokenizer = read_tokenizer(sample_chunks, manifest)
    found = set()
    dataset = load_from_disk(str(sample_chunks))
    assert sorted(dataset) == ["test", "train"]
    for split in ("train", "test"):
        counts = manifest["splits"][split]
        ids = np.array(dataset[split]["input_ids"])
        assert ids.shape == (counts["chunks"], 64)
        chunks = open_split(sample_chunks, manifest, split)
        assert np.array_equal(chunks.read(np.arange(chunks.num_chunks)), ids)
        flat = ids.reshape(-1)
        assert (flat != tokenizer.pad_id).sum() == counts["tokens"]
        assert (flat == tokenizer.pad_id).sum() == counts["padding_tokens"]
        starts = np.flatnonzero(flat == tokenizer.bos_id)
        ends = np.flatnonzero(flat == tokenizer.eos_id)
        assert len(starts) == len(ends) == counts["documents"]
        documents = {
            tokenizer.decode(flat[start + 1 : end].tolist())
            for start, end in zip(starts, ends, strict=True)
        }
        assert sum(len(text.encode()) for text in documents) == counts["bytes"]
        found |= documents
    assert found == set(sample_texts)


def test_chunks_are_mapped_not_copied(sample_chunks: Path) -> None:
    manifest = read_manifest(sample_chunks)
    block = open_split(sample_chunks, manifest, "train").blocks[0]
    assert not block.flags.owndata
    assert not block.flags.writeable


def options(tmp_path: Path, **changes: object) -> PreprocessOptions:
    values = {
        "source": ("sample",),
        "tokenizer": "train:600",
        "chunk_size": 64,
        "output_dir": tmp_path / "out",
    }
    return PreprocessOptions(**{**values, **changes})  # type: ignore[arg-type]


def test_same_command_again_changes_nothing_and_another_is_refused(tmp_path: Path) -> None:
    folder = preprocess(options(tmp_path), QUIET)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert preprocess(options(tmp_path), QUIET) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    with pytest.raises(UserError, match="--chunk-size was 64") as caught:
        preprocess(options(tmp_path, chunk_size=32), QUIET)
    assert caught.value.exit_code == ExitCode.ALREADY_EXISTS
    preprocess(options(tmp_path, chunk_size=32, overwrite=True), QUIET)
    assert read_manifest(folder)["options"]["chunk_size"] == 32
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["documents/mine.txt", "made", "dataset/dataset_dict.json"])
def test_only_a_chunk_directory_is_replaced(name: str, overwrite: bool, tmp_path: Path) -> None:
    file = tmp_path / "out" / name
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    with pytest.raises(UserError, match="something else than a chunk directory") as caught:
        preprocess(options(tmp_path, name=name.split("/")[0], overwrite=overwrite), QUIET)
    assert caught.value.exit_code == ExitCode.ALREADY_EXISTS
    assert file.read_text() == "mine"


def test_the_same_command_twice_at_once(tmp_path: Path) -> None:
    """The second one waits for the first, and finds what that has made."""
    with ThreadPoolExecutor(2) as both:
        made = both.map(lambda _: preprocess(options(tmp_path, num_proc=1), QUIET), range(2))
        assert [*made] == [tmp_path / "out" / "chunked_sample"] * 2
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["chunked_sample"]


def test_result_does_not_depend_on_time_or_place(tmp_path: Path) -> None:
    folders = [preprocess(options(tmp_path / name), QUIET) for name in ("a", "b")]
    contents = [
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*")}
        for folder in folders
    ]
    assert contents[0] == contents[1]


def test_flipped_bit_in_a_shard_is_named(tmp_path: Path) -> None:
    folder = preprocess(options(tmp_path), QUIET)
    shard = next((folder / "train").glob("*.arrow"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(UserError, match="damaged") as caught:
        preprocess(options(tmp_path), QUIET)
    assert caught.value.exit_code == ExitCode.DAMAGED
    assert caught.value.where == str(shard)


def test_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"zin nummer {n}"}) for n in range(100)] + ["kapot"]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    tokenizer = preprocess(options(tmp_path), QUIET)
    given = options(
        tmp_path,
        source=(str(tmp_path / "in.jsonl"),),
        tokenizer=str(tokenizer),
        output_dir=tmp_path / "new",
    )
    with pytest.raises(UserError, match="not JSON"):
        preprocess(given, QUIET)
    assert not any((tmp_path / "new").iterdir())


def test_word_cap_counts_whole_documents(tmp_path: Path) -> None:
    folder = preprocess(options(tmp_path, dataset_size="2k"), QUIET)
    splits = read_manifest(folder)["splits"]
    words = splits["train"]["words"] + splits["test"]["words"]
    assert 1700 < words <= 2000
    assert folder.name == "chunked_sample_2k"


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"dataset_size": "10"}, ExitCode.DATASET_TOO_SMALL),
        ({"dataset_size": "100", "chunk_size": 4096}, ExitCode.DATASET_TOO_SMALL),
        ({"tokenizer": "train:99999"}, ExitCode.DATASET_TOO_SMALL),
        ({"tokenizer": "train:100"}, ExitCode.BAD_OPTION),
        ({"tokenizer": "train:1048577"}, ExitCode.BAD_OPTION),
        ({"tokenizer": f"train:{'9' * 5000}"}, ExitCode.BAD_OPTION),
        ({"dataset_size": "9" * 5000}, ExitCode.UNKNOWN_SIZE),
        ({"tokenizer": "nergens/tokenizer.json"}, ExitCode.NOT_FOUND),
        ({"tokenizer": "pyproject.toml"}, ExitCode.TOKENIZER_MISMATCH),
        ({"name": "../weg"}, ExitCode.BAD_OPTION),
        ({"text_column": "tekst"}, ExitCode.BAD_INPUT),
        ({"ray_address": "127.0.0.1:6379"}, ExitCode.NO_EFFECT),
        ({"output_dir": Path("/proc/nee")}, None),
    ],
)
def test_bad_options(tmp_path: Path, changes: dict[str, object], code: ExitCode | None) -> None:
    with pytest.raises(UserError) as caught:
        preprocess(options(tmp_path, **changes), QUIET)
    assert code is None or caught.value.exit_code == code
    assert not list(tmp_path.rglob("manifest.json"))


def test_messages_on_the_command_line_have_no_traceback(tmp_path: Path) -> None:
    done = run_script("preprocess.py", "--source", tmp_path / "nergens.txt")
    assert done.returncode == ExitCode.NOT_FOUND
    assert "no such file" in done.stderr
    assert "Traceback" not in done.stderr


def test_trouble_with_the_hub_on_the_command_line(tmp_path: Path) -> None:
    """Each gets its own exit code; what the Hub says in each case is tested in test_hub.py."""
    repositories = {HUB_TOKENIZER: {"tokenizer.json": b"{}"}, f"datasets/{HUB_DATASET}": {"x": b""}}
    tokens = {"tokens": ["hf_known", "hf_fine"], "accepted": ["hf_fine"]}
    with HubServer(repositories, gated=[HUB_TOKENIZER], **tokens) as hub:
        cases = [
            (hub.environment(tmp_path / "a"), (), ExitCode.HUB_LOGIN, "not logged in"),
            (
                hub.environment(tmp_path / "b", token="hf_known"),
                (),
                ExitCode.HUB_LICENCE,
                "not accepted its licence",
            ),
            (
                hub.environment(tmp_path / "c", token="hf_fine"),
                (),
                ExitCode.TOKENIZER_MISMATCH,
                "not the tokenizer.json of a BPE",
            ),
            (
                {**hub.environment(tmp_path / "d"), "HF_ENDPOINT": "http://127.0.0.1:9"},
                (),
                ExitCode.NETWORK,
                "no connection",
            ),
            (
                hub.environment(tmp_path / "e"),
                ("--dataset-size", "2B"),
                ExitCode.UNKNOWN_SIZE,
                "no size '2B'",
            ),
        ]
        for environment, options, code, message in cases:
            command = ("preprocess.py", "--output-dir", tmp_path / "out", *options)
            done = run_script(*command, env=environment)
            assert done.returncode == code, done.stderr
            assert message in done.stderr
            assert "Traceback" not in done.stderr
            assert "hf_" not in done.stderr
    assert not (tmp_path / "out").exists()


def hub_tables(texts: list[str]) -> dict[str, bytes]:
    """Two Parquet files as those of the Hub dataset's config 100k."""
    tables = {}
    for part in (0, 1):
        rows = texts[part::2]
        columns = {"text": rows, "url": [""] * len(rows), "source": ["wikipedia"] * len(rows)}
        file = io.BytesIO()
        pq.write_table(pa.table(columns), file)
        tables[f"100k/train-{part:05d}-of-00002.parquet"] = file.getvalue()
    return tables


def test_hub_dataset_becomes_a_chunk_directory(tmp_path: Path, sample_texts: list[str]) -> None:
    tables = hub_tables(sample_texts[:30])
    with HubServer({f"datasets/{HUB_DATASET}": tables}) as hub:
        command = ("preprocess.py", "--dataset-size", "100k", "--tokenizer", "train:512")
        command = (*command, "--output-dir", tmp_path / "out")
        done = run_script(*command, env=hub.environment(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    manifest = read_manifest(tmp_path / "out" / "chunked_100k")
    assert manifest["source"]["config"] == "100k"
    assert len(manifest["source"]["revision"]) == 40
    assert manifest["source"]["files"] == sorted(tables)
    splits = manifest["splits"]
    assert splits["train"]["documents"] + splits["test"]["documents"] == 30
    assert splits["train"]["bytes_per_source"].keys() == {"wikipedia"}


def test_killed_run_goes_on_with_the_commit_it_began_with(
    tmp_path: Path, sample_texts: list[str]
) -> None:
    """The dataset changes on the Hub meanwhile; nothing is downloaded again before --overwrite."""
    killed = (
        "import os, runpy, sys\n"
        "from kiem.data.prepare import preprocess\n"
        "preprocess.write_splits = lambda *_: os._exit(9)\n"
        "runpy.run_path('preprocess.py', run_name='__main__')\n"
    )
    arguments = ("--dataset-size", "100k", "--tokenizer", "train:512", "--output-dir", tmp_path)
    name = f"datasets/{HUB_DATASET}"
    with HubServer({}) as hub:
        old = hub.commit(name, hub_tables(sample_texts[:30]))
        environment = hub.environment(tmp_path / "cache")
        assert run_script("-c", killed, *arguments, env=environment).returncode == 9
        new = hub.commit(name, hub_tables(sample_texts[30:]))
        hub.log.clear()
        for more, revision in ((), old), ((), old), (("--overwrite",), new), ((), new):
            done = run_script("preprocess.py", *arguments, *more, env=environment)
            assert done.returncode == 0, done.stderr
            manifest = read_manifest(tmp_path / "chunked_100k")
            assert manifest["source"]["revision"] == revision
            num_downloads = sum(path.startswith("/cdn/") for _, path, _ in hub.log)
            assert num_downloads == (0 if revision == old else 2)


def test_chunk_directory_with_another_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = preprocess(options(tmp_path), QUIET)
    other = preprocess(options(tmp_path, tokenizer="train:601", name="other"), QUIET)
    (folder / "tokenizer.json").write_bytes((other / "tokenizer.json").read_bytes())
    with pytest.raises(UserError, match="not the tokenizer that made the chunks") as caught:
        read_tokenizer(folder, read_manifest(folder))
    assert caught.value.exit_code == ExitCode.TOKENIZER_MISMATCH


def test_what_else_is_asked_of_a_check_is_not_passed_over(tmp_path: Path) -> None:
    folder = preprocess(options(tmp_path), QUIET)
    for more in ({"overwrite": True}, {"num_proc": 2}, {"source": ("sample",)}):
        with pytest.raises(UserError, match="has no effect together with --verify"):
            preprocess(PreprocessOptions(verify=folder, **more), QUIET)
