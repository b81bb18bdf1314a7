"""--source hub:OWNER/NAME, from the Hub's HTTP to the chunk directory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from conftest import run_script
from hub_client import ACCEPTED, NOT_ACCEPTED
from hub_layouts import CONFIGS, LAYOUTS, entry, json_lines, parquet
from hub_runs import Run, downloaded, manifest_of, run_all, watched
from hub_server import HubServer

from kiem.core.errors import ExitCode
from kiem.data.source_record import list_source_files

WIKI, FINEWEB, C4 = (
    "hub:wikimedia/wikipedia:20231101.nl",
    "hub:HuggingFaceFW/fineweb-2:nld_Latn",
    "hub:allenai/c4:nl",
)
LINES = {f"data/{n}.jsonl": json_lines(f"deel {n} ") * 9 for n in range(5)}
REPOS = {
    **{f"datasets/{name}": layout.files() for name, layout in LAYOUTS.items()},
    "datasets/some/lines": LINES,
    "datasets/some/empty": {".gitattributes": b""},
    "datasets/some/program": {"program.py": b"", "README.md": b"# Text"},
    "datasets/some/pictures": {"train/1.png": b"", "train/metadata.pdf": b""},
    "datasets/some/folders": {"10k/train.csv": b"text\na\n", "1M/train.csv": b"text\nb\n"},
    "datasets/some/no-yaml": {"README.md": b"---\nconfigs: [\n---\n", "a.csv": b"text\na\n"},
    "datasets/some/odd-card": {"README.md": b"---\nconfigs:\n- x\n---\n", "a.csv": b"text\na\n"},
    "datasets/some/no-such-files": {
        "README.md": f"---\n{CONFIGS}{entry('a', 'train=a/*.parquet')}\n---\n".encode(),
        "b/1.parquet": parquet("b"),
    },
    "datasets/some/odd-pattern": {
        "README.md": f"---\n{CONFIGS}{entry('a', 'train=a**.parquet')}\n---\n".encode(),
        "a/1.parquet": parquet("a"),
    },
    "datasets/some/secret": {"a.csv": b"text\na\n"},
}
COMMON = ("--chunk-size", "32", "--test-split", "0.1", "--num-proc", "2")
# Small and soon made.
TRAIN = ("--tokenizer", "train:512", *COMMON)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    options = ("--source", "sample", *TRAIN, "--output-dir", folder)
    done = run_script("preprocess.py", *options)
    assert done.returncode == 0, done.stderr
    return folder / "chunked_sample"


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer(
        REPOS,
        gated=["datasets/uonlp/CulturaX", "datasets/card/lists"],
        open_cards=["datasets/card/lists"],
        private=["datasets/some/secret"],
        tokens=[NOT_ACCEPTED],
        accepted=[ACCEPTED],
        renamed={"datasets/old/lines": "datasets/some/lines"},
    ) as server:
        yield server


# Sources, login token, exit code, and what the message says.
REFUSALS = {
    "several configs": (
        FINEWEB[:-9],
        "",
        ExitCode.BAD_OPTION,
        ["has 3 configs", "as in hub:HuggingFaceFW/fineweb-2:fry_Latn", "nld_Latn_removed"],
    ),
    "unknown config": (
        WIKI + "x",
        "",
        ExitCode.NOT_FOUND,
        ["no config 20231101.nlx", "There is: 20231101.fy, 20231101.nl."],
    ),
    "unknown split": (
        C4 + ":test",
        "",
        ExitCode.NOT_FOUND,
        ["no split test", "There is: train, validation.", "hub:allenai/c4:nl:train"],
    ),
    "folders are configs": (
        "hub:some/folders",
        "",
        ExitCode.BAD_OPTION,
        ["2 configs", "or hub:some/folders:. for all of them", "There is: 10k, 1M."],
    ),
    "unknown folder": (
        "hub:some/folders:100k",
        "",
        ExitCode.NOT_FOUND,
        ["no config 100k", "There is: 10k, 1M."],
    ),
    "no configs": ("hub:some/lines:nl", "", ExitCode.NOT_FOUND, ["no config nl", "leave it out"]),
    "unknown revision": (
        "hub:some/lines@v9",
        "",
        ExitCode.NOT_FOUND,
        ["some/lines at v9", "no such revision"],
    ),
    "empty": (
        "hub:some/empty",
        "",
        ExitCode.NOT_FOUND,
        ["no file that can be read", "There is: .gitattributes."],
    ),
    "a program": (
        "hub:some/program",
        "",
        ExitCode.NOT_FOUND,
        ["does not run its program", "hub:some/program@refs/convert/parquet"],
    ),
    "no text": (
        "hub:some/pictures",
        "",
        ExitCode.NOT_FOUND,
        ["no file that can be read", "train/1.png"],
    ),
    "files of the card": (
        "hub:some/no-such-files",
        "",
        ExitCode.NOT_FOUND,
        ["config a has no file", "There is: README.md, b/1.parquet."],
    ),
    "pattern": (
        "hub:some/odd-pattern",
        "",
        ExitCode.BAD_INPUT,
        ["README.md, cannot be read", "'**'"],
    ),
    "no YAML": (
        "hub:some/no-yaml",
        "",
        ExitCode.BAD_INPUT,
        ["README.md, cannot be read", "not YAML"],
    ),
    "odd card": (
        "hub:some/odd-card",
        "",
        ExitCode.BAD_INPUT,
        ["README.md, cannot be read", "configs[0]"],
    ),
    "not logged in": (
        "hub:uonlp/CulturaX:nl",
        "",
        ExitCode.HUB_LOGIN,
        ["licence to accept", "https://huggingface.co/datasets/uonlp/CulturaX", "hf auth login"],
    ),
    "gated behind an open card": (
        "hub:card/lists",
        "",
        ExitCode.HUB_LOGIN,
        ["licence to accept", "https://huggingface.co/datasets/card/lists"],
    ),
    "licence": (
        "hub:uonlp/CulturaX:nl",
        NOT_ACCEPTED,
        ExitCode.HUB_LICENCE,
        ["not accepted its licence", "https://huggingface.co/datasets/uonlp/CulturaX"],
    ),
    "private": ("hub:some/secret", "", ExitCode.HUB_LOGIN, ["does not exist, or it is private"]),
    "not there": ("hub:some/thing", ACCEPTED, ExitCode.NOT_FOUND, ["no such dataset"]),
    "named twice": (
        f"{C4} sample {C4}:train",
        "",
        ExitCode.BAD_OPTION,
        ["named twice: hub:allenai/c4/multilingual/"],
    ),
    "no column": (
        "hub:some/lines --text-column tekst",
        "",
        ExitCode.BAD_INPUT,
        ["hub:some/lines/data/", ".jsonl:1: no column 'tekst'"],
    ),
    "bound": (
        "hub:some/lines --hub-cache-bytes 99",
        "",
        ExitCode.BAD_OPTION,
        ["data/0.jsonl of some/lines alone has", "all 5 files have"],
    ),
    "no bound": ("sample --hub-cache-bytes 99", "", ExitCode.NO_EFFECT, ["--hub-cache-bytes"]),
}


def test_refusals_say_what_there_is(hub: HubServer, tmp_path: Path) -> None:
    found: dict[str, Run] = {}
    for token in ("", NOT_ACCEPTED, ACCEPTED):
        names = [name for name, case in REFUSALS.items() if case[1] == token]
        lines = [
            ["--source", *REFUSALS[name][0].split(" "), *TRAIN, "--output-dir", tmp_path / "out"]
            for name in names
        ]
        found |= zip(names, run_all(hub, tmp_path / "cache", lines, token=token), strict=True)
    for name, (_, _, code, says) in REFUSALS.items():
        run = found[name]
        assert run.code == code, (name, run.err)
        for part in says:
            assert part in run.err, name
    assert not [*(tmp_path / "out").glob("*")]


def test_every_layout_is_read(hub: HubServer, tmp_path: Path) -> None:
    """All of them at once; of each only the files that are needed are downloaded."""
    sources = [
        f"hub:{name}:{layout.wanted or ''}:{layout.split}" for name, layout in LAYOUTS.items()
    ]
    line = ["--source", *sources, "sample", *TRAIN, "--output-dir", tmp_path, "--name", "all"]
    (run,) = run_all(
        hub, tmp_path / "cache", [line, ["--verify", tmp_path / "all"]], token=ACCEPTED
    )[:1]
    assert run.code == 0, run.err
    manifest = manifest_of(tmp_path / "all")
    *entries, sample = manifest["source"]["sources"]
    assert sample["kind"] == "sample"
    assert [entry["dataset"] for entry in entries] == [*LAYOUTS]
    for found, (name, layout) in zip(entries, LAYOUTS.items(), strict=True):
        assert (found["files"], found["split"]) == ([*layout.found], layout.split), name
        assert len(found["blobs"]) == len(found["files"])
    assert sorted(downloaded(hub)) == sorted(
        {file for layout in LAYOUTS.values() for file in layout.found}
    )
    licences = {entry["dataset"]: entry["licence"] for entry in entries}
    assert licences["wikimedia/wikipedia"] == ["cc-by-sa-3.0", "gfdl"]
    assert (licences["names/zst"], licences["names/numbered"]) == ("eigen", None)
    # A dataset is one source, whatever its column `source` has.
    counts = [manifest["splits"][split]["documents_per_source"] for split in ("train", "test")]
    assert {*counts[0], *counts[1]} >= {name[4:] for name in (WIKI, FINEWEB, C4)} | {
        "names/one-file"
    }
    assert len({*counts[0], *counts[1]}) == len(LAYOUTS) + 1
    assert [*manifest["documents_per_file"]] == list_source_files(manifest["source"])
    assert "not read: 1 file (.txt 1)" in run.out
    assert manifest["not_read"] == {".txt": 1}


def test_beside_files_and_the_sample(hub: HubServer, tmp_path: Path) -> None:
    (tmp_path / "eigen.jsonl").write_bytes(json_lines("eigen"))
    line = ["--source", tmp_path / "eigen.jsonl", "hub:old/lines", "sample", *TRAIN]
    (run,) = run_all(hub, tmp_path / "cache", [[*line, "--output-dir", tmp_path / "out"]])
    assert run.code == 0, run.err
    assert "warning: the dataset old/lines is called some/lines on the Hub now" in run.out
    manifest = manifest_of(tmp_path / "out" / "chunked_eigen")
    assert [entry["kind"] for entry in manifest["source"]["sources"]] == ["files", "hub", "sample"]
    per_source = manifest["splits"]["train"]["documents_per_source"]
    assert per_source.keys() == {"eigen", "old/lines", "sample"}


ALL_PASSES = ("--keep-rejected", "--on-bad-document", "skip", "--packing", "best-fit")


def test_the_bound_holds_and_does_not_change_the_result(hub: HubServer, tmp_path: Path) -> None:
    files = {**LINES, "data/3.jsonl": LINES["data/3.jsonl"] + b'{"text": null}\n'}
    hub.commit("datasets/some/lines", files)
    largest = max(map(len, files.values()))
    source = ["--source", "hub:some/lines", "sample", C4, *TRAIN, *ALL_PASSES, "--output-dir"]
    (free,) = run_all(hub, tmp_path / "cache", [[*source, tmp_path / "free"]])
    assert free.code == 0, free.err
    whole = manifest_of(tmp_path / "free" / "chunked_lines")
    assert whole["rejected"] == {"not a string": 1}
    bound = 2 * largest + 1
    hub.log.clear()
    folder = tmp_path / "bounded"
    with watched(folder, "hub") as sizes:
        line = [*source, folder, "--hub-cache-bytes", str(bound)]
        (run,) = run_all(hub, tmp_path / "none", [line])
    assert run.code == 0, run.err
    # A file that is renamed or replaced during one look counts twice in that look.
    assert 0 < max(map(min, pairwise(sizes))) <= bound
    assert manifest_of(folder / "chunked_lines") == whole
    assert [path.name for path in folder.iterdir()] == ["chunked_lines"]
    # It is read, read for the vocabulary, and encoded.
    assert num_downloads(hub, "data/0.jsonl") >= 3
    assert not [*(tmp_path / "none").rglob("*.jsonl")]


# Before the files of the fourth group are downloaded.
KILLED = """
import os
from kiem.data.prepare import preprocess
fetch, count = preprocess.fetch, 0
def fetch_or_die(*arguments):
    global count
    count += 1
    if count == 4: os._exit(9)
    return fetch(*arguments)
preprocess.fetch = fetch_or_die
"""


def test_an_interrupted_run_goes_on_with_another_bound(
    hub: HubServer, tokenizer: Path, tmp_path: Path
) -> None:
    """The dataset changes meanwhile; what is finished is neither made nor downloaded again."""
    bound = str(max(map(len, LINES.values())))
    line = ["--source", "hub:some/lines", "--tokenizer", tokenizer, *COMMON]
    bounded = [*line, "--output-dir", tmp_path / "cut", "--hub-cache-bytes", bound]
    assert run_all(hub, tmp_path / "cache", [bounded], first=KILLED) == []
    assert (
        run_all(hub, tmp_path / "cache", [[*line, "--output-dir", tmp_path / "whole"]])[0].code == 0
    )
    hub.commit("datasets/some/lines", {**LINES, "data/0.jsonl": json_lines("nieuw")})
    hub.log.clear()
    (run,) = run_all(hub, tmp_path / "none", [[*bounded[:-1], "10000"]])
    assert run.code == 0, run.err
    # Of the first one is only asked whether it may be downloaded.
    assert not [path for method, path, _ in hub.log if method == "GET" and "data/0" in path]
    assert downloaded(hub) == ["data/0.jsonl", "data/3.jsonl", "data/4.jsonl"]
    assert manifest_of(tmp_path / "cut" / "chunked_lines") == manifest_of(
        tmp_path / "whole" / "chunked_lines"
    )


def test_no_more_is_downloaded_than_the_words_need(
    hub: HubServer, tokenizer: Path, tmp_path: Path
) -> None:
    line = ["--source", "hub:some/lines", "--tokenizer", tokenizer, *COMMON, "--dataset-size"]
    bound = ["--hub-cache-bytes", str(max(map(len, LINES.values())))]
    line += ["200", *bound, "--output-dir", tmp_path / "out"]
    (run,) = run_all(hub, tmp_path / "cache", [line])
    assert run.code == 0, run.err
    assert downloaded(hub) == ["data/0.jsonl"]
    manifest = manifest_of(tmp_path / "out" / "chunked_lines_200")
    assert manifest["word_limit"]["reached_in"] == "hub:some/lines/data/0.jsonl"
    assert manifest["word_limit"]["files_not_read"] == 4


def test_trouble_on_the_way_costs_only_what_is_left(
    hub: HubServer, tokenizer: Path, tmp_path: Path
) -> None:
    line = ["--source", "hub:some/lines", "--tokenizer", tokenizer, *COMMON]
    bound = ["--hub-cache-bytes", str(max(map(len, LINES.values())))]
    bounded = [*line, *bound, "--output-dir", tmp_path / "cut"]
    hub.fail(403, times=1000, match="data/3")
    (run,) = run_all(hub, tmp_path / "none", [bounded])
    assert run.code == ExitCode.NETWORK
    assert "error 403" in run.err
    hub.clear_faults()
    hub.log.clear()
    again, once_more = run_all(hub, tmp_path / "none", [bounded, bounded])
    assert again.code == 0, again.err
    assert downloaded(hub) == ["data/0.jsonl", "data/3.jsonl", "data/4.jsonl"]
    assert "is there already" in once_more.out
    # Without a bound the files stay in the cache, and that is enough.
    free, offline = (
        run_all(hub, tmp_path / "cache", [[*line, "--output-dir", tmp_path / name]], **variables)[0]
        for name, variables in (("free", {}), ("offline", {"HF_HUB_OFFLINE": "1"}))
    )
    assert (free.code, offline.code) == (0, 0), free.err + offline.err
    (without_effect,) = run_all(hub, tmp_path / "cache", [bounded], HF_HUB_OFFLINE="1")
    assert without_effect.code == ExitCode.NO_EFFECT
    assert "HF_HUB_OFFLINE=1" in without_effect.err
    assert "only what the cache has is read, which may not be all" in offline.out
    (cached,) = (tmp_path / "cache").rglob("data/2.jsonl")
    cached.write_bytes(cached.read_bytes().replace(b"molens", b"wolken"))
    bad = [*line, "--output-dir", tmp_path / "bad"]
    (damaged,) = run_all(hub, tmp_path / "cache", [bad])
    assert damaged.code == ExitCode.DAMAGED
    assert f"Remove {cached.resolve()} and run it again" in damaged.err
    cached.resolve().unlink()
    (mended,) = run_all(hub, tmp_path / "cache", [bad])
    assert mended.code == 0, mended.err
    manifests = [
        manifest_of(tmp_path / f / "chunked_lines") for f in ("cut", "free", "offline", "bad")
    ]
    assert all(manifest == manifests[0] for manifest in manifests)


def test_columns_within_columns(hub: HubServer, sample_texts: list[str], tmp_path: Path) -> None:
    """Within a bound that all files fit into, they are downloaded once for all readings."""
    rows = [{"translation": {"nl": text, "fy": None}} for text in sample_texts]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    hub.commit("datasets/some/lines", {"train.jsonl": lines.encode()})
    given = ["--text-column", "translation.nl", "--hub-cache-bytes", "1000000"]
    line = ["--source", "hub:some/lines", *TRAIN, *given, "--output-dir", tmp_path / "out"]
    (run,) = run_all(hub, tmp_path / "cache", [line])
    assert run.code == 0, run.err
    splits = manifest_of(tmp_path / "out" / "chunked_lines")["splits"]
    assert sum(split["words"] for split in splits.values()) == sum(
        len(text.split()) for text in sample_texts
    )
    assert num_downloads(hub, "train.jsonl") == 1


def num_downloads(hub: HubServer, name: str) -> int:
    return sum(method == "GET" and name in path for method, path, _ in hub.log)
