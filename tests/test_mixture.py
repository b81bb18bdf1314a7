"""Several chunk directories in one run: what is read of each, and what is measured."""

from __future__ import annotations

import json
import re
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import run_script
from datasets import load_from_disk
from lives import Lives, chaos, interrupt_often, outcome
from rich.console import Console

from kiem.config import PreprocessOptions, TrainingOptions
from kiem.core.errors import ExitCode, UserError
from kiem.data.chunks import open_split, open_test_sources
from kiem.data.mixture import (
    describe_reads,
    read_mixture,
    warnings_of_epochs,
    warnings_of_splits,
)
from kiem.data.order import chunk_numbers
from kiem.data.prepare.preprocess import preprocess
from kiem.data.prepare.verify import verify_directory
from kiem.data.texts import list_texts
from kiem.training.resume import check_same_run

SIZE = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Chunk directories wiki, web and books with one tokenizer; wiki and web share a source."""
    folder = tmp_path_factory.mktemp("directories")
    make(folder, "wiki", 300, ("encyclopedie", "nieuws"))
    for name, num, sources in (("web", 700, ("forum", "nieuws")), ("books", 150, ("boeken",))):
        make(folder, name, num, sources, tokenizer=str(folder / "wiki"))
    return folder


def make(folder: Path, name: str, num: int, sources: tuple[str, ...], **more: Any) -> Path:
    generator = np.random.default_rng(num)
    lines = []
    for number in range(num):
        letters = generator.choice([*"abcdefgh "], generator.integers(50, 150))
        row = {"text": "".join(letters), "source": sources[number % len(sources)]}
        lines.append(json.dumps(row))
    file = folder / f"{name}.jsonl"
    file.write_text("\n".join(lines))
    given: dict[str, Any] = {"tokenizer": "train:512", "chunk_size": SIZE, "test_split": 0.1}
    given |= {"output_dir": folder, "name": name, "source": (str(file),), **more}
    return preprocess(PreprocessOptions(**given), Console(quiet=True))


def options(folder: Path, *names: str | Path, **more: Any) -> TrainingOptions:
    anneal = tuple(folder / name for name in more.pop("anneal", ()))
    return TrainingOptions(tuple(folder / name for name in names), anneal=anneal, **more)


def test_numbers_lead_to_the_chunks_of_the_directories(folder: Path) -> None:
    given = options(folder, "wiki", "web", anneal=["books"], weights=(3, 1), anneal_share=0.25)
    mixture = read_mixture(given)
    order, chunks = mixture.order(given, 8, 100), mixture.train_chunks()
    rows: dict[str, list[list[int]]] = {
        name: load_from_disk(str(folder / name))["train"]["input_ids"][:]
        for name in ("wiki", "web", "books")
    }
    firsts = {"wiki": 0, "web": len(rows["wiki"]), "books": len(rows["wiki"]) + len(rows["web"])}
    read: Counter[str] = Counter()
    for step in range(100):
        numbers = chunk_numbers(order, step)
        for number, tokens in zip(numbers.tolist(), chunks.read(numbers).tolist(), strict=True):
            name = max((n for n in firsts if firsts[n] <= number), key=lambda n: firsts[n])
            assert rows[name][number - firsts[name]] == tokens
            assert (name == "books") == (step >= 75)
            read[name] += 1
    assert (read["wiki"], read["web"], read["books"]) == (450, 150, 200)
    times = [f"{name} {read[name] / len(rows[name]):.2f} times" for name in rows]
    expected = f"{times[0]}, {times[1]}; from update 76 on {times[2]}"
    assert describe_reads(order, 100) == expected
    assert describe_reads(order, None).startswith("wiki 75%, web 25%")
    often = [*warnings_of_epochs(order, 100)]
    assert len(often) == sum(read[name] > 4 * len(rows[name]) for name in rows)


def test_one_directory_resumes_what_an_earlier_version_began(folder: Path) -> None:
    """Such a checkpoint has its hash alone, and a key that is not there is None."""
    found = read_mixture(options(folder, "wiki")).identity()
    manifest = json.loads((folder / "wiki" / "manifest.json").read_text())
    assert {name: value for name, value in found.items() if value is not None} == {
        "data": manifest["sha256"]
    }


def test_without_weights_all_are_one(folder: Path) -> None:
    """An epoch reads every chunk once, in one shuffle."""
    given = options(folder, "wiki", "web")
    mixture = read_mixture(given)
    order = mixture.order(given, 1, None)
    epoch = [int(chunk_numbers(order, step)[0]) for step in range(mixture.num_chunks)]
    assert sorted(epoch) == list(range(mixture.train_chunks().num_chunks))
    assert describe_reads(order, mixture.num_chunks) == "wiki + web 1.00 times"


def test_manifests_and_sources_of_test_tokens_add_up(folder: Path) -> None:
    mixture = read_mixture(options(folder, "wiki", "web", anneal=["books"]))
    test, sources = mixture.manifest["splits"]["test"], mixture.test_sources()
    assert sources is not None
    assert sorted(test["source_names"]) == ["encyclopedie", "forum", "nieuws"]
    labels = np.concatenate(sources.blocks)
    for number, name in enumerate(test["source_names"]):
        assert test["tokens_per_source"][name] == np.count_nonzero(labels == number)
        own = 0
        for directory in mixture.directories:
            names = directory.manifest["splits"]["test"]["source_names"]
            found = open_test_sources(directory.path, directory.manifest)
            assert found is not None
            if name in names:
                own += np.count_nonzero(np.concatenate(found.blocks) == names.index(name))
        assert own == test["tokens_per_source"][name]
    pad = mixture.tokenizer.pad_id
    assert ((labels == -1) == (np.concatenate(mixture.test_chunks().blocks) == pad)).all()
    for split in ("train", "test"):
        counts = mixture.manifest["splits"][split]
        each = [d.manifest["splits"][split] for d in mixture.directories]
        for key in ("documents", "tokens", "bytes", "chunks", "padding_tokens"):
            assert counts[key] == sum(found[key] for found in each)
        assert counts["bytes"] == sum(counts["bytes_per_source"].values())


def test_what_does_not_suit_is_named(folder: Path, tmp_path: Path) -> None:
    make(tmp_path, "long", 300, ("x",), tokenizer=str(folder / "wiki"), chunk_size=64)
    make(tmp_path, "other", 300, ("x",), tokenizer="train:600")
    make(tmp_path, "apart", 300, ("x",), tokenizer=str(folder / "wiki"), seed=7)
    apart = read_mixture(options(folder, "wiki", tmp_path / "apart"))
    expected = "apart has --seed 7, but wiki 42: a document of both may be trained on and tested on"
    assert [*warnings_of_splits(apart)] == [expected]
    assert not [*warnings_of_splits(read_mixture(options(folder, "wiki", anneal=["web"])))]
    wrong = [
        (options(folder, "wiki", tmp_path / "long"), "64 tokens, but .*wiki of 32"),
        (options(folder, "wiki", anneal=[tmp_path / "other"]), "another tokenizer than .*wiki"),
        (options(folder, "wiki", "web", weights=(1,)), "1 weights for 2 chunk directories"),
        (options(folder, "wiki", "wiki"), "named twice"),
        (options(folder, "wiki", "web", weights=(1, 1e-5)), "less than a 10,000th"),
    ]
    for given, message in wrong:
        with pytest.raises(UserError, match=message):
            read_mixture(given)
    for words, code in (
        (("--anneal-share", "0.1"), ExitCode.NO_EFFECT),
        (("--anneal-weights", "1"), ExitCode.NO_EFFECT),
        (("--anneal", folder / "books", "--max-minutes", "1"), ExitCode.BAD_OPTION),
    ):
        done = run_script("training.py", "--dataset-path", folder / "wiki", *words)
        assert done.returncode == code and "--anneal" in done.stderr


LETTERS = {"klein": "abcdefgh", "groot": "ijklmnop", "midden": "qrstuvwx"}


@pytest.mark.parametrize("packing", ["concat", "best-fit"])
def test_weighted_sources_have_chunks_of_their_own(tmp_path: Path, packing: str) -> None:
    """By letters that only one source has; the test split and all documents are as without."""
    generator = np.random.default_rng(3)
    sources = []
    for num, (name, letters) in zip((40, 300, 150), LETTERS.items(), strict=True):
        (tmp_path / name).mkdir()
        for part in range(2):
            texts = ["".join(generator.choice([*letters, " "], 90)) for _ in range(num)]
            lines = [json.dumps({"text": text}) for text in texts]
            (tmp_path / name / f"{part}.jsonl").write_text("\n".join(lines))
        sources.append(f"{tmp_path / name}")
    how: dict[str, Any] = {"source": tuple(sources), "tokenizer": "train:512", "test_split": 0.1}
    how |= {"chunk_size": SIZE, "output_dir": tmp_path, "packing": packing}
    plain = preprocess(PreprocessOptions(**how, name="plain"), Console(quiet=True))
    path = preprocess(PreprocessOptions(**how, name="w", weights=(1, 2, 1)), Console(quiet=True))
    manifest, without = verify_directory(path), verify_directory(plain)
    test, train = manifest["splits"]["test"], manifest["splits"]["train"]
    assert test["shards"] == without["splits"]["test"]["shards"]
    assert train["tokens"] == without["splits"]["train"]["tokens"]
    assert [(part["source"], part["weight"]) for part in train["parts"]] == [
        (source, weight) for source, weight in zip(sources, (1, 2, 1), strict=True)
    ]
    mixture = read_mixture(TrainingOptions((path,)))
    rows, first = open_split(path, manifest, "train"), 0
    for part, letters in zip(mixture.parts, LETTERS.values(), strict=True):
        assert part.first == first
        ids = rows.read(np.arange(first, first + part.num_chunks)).ravel()
        assert {*mixture.tokenizer.decode(ids[ids != 0].tolist())} <= {*letters, " "}
        first += part.num_chunks
    assert first == train["chunks"]
    texts = list_texts(mixture, mixture.order(TrainingOptions((path,)), 8, 500), 500)
    assert [text["share"] for text in texts] == pytest.approx([0.25, 0.5, 0.25], abs=1e-9)
    # Training draws by these weights, by its own, and with other directories by both.
    for given, expected in (((), [1, 2, 1]), ((5, 1, 4), [2, 0.4, 1.6])):
        parts = read_mixture(TrainingOptions((path,), weights=given)).parts
        assert [part.weight / sum(p.weight for p in parts) * 4 for part in parts] == expected
    both = read_mixture(TrainingOptions((path, plain), weights=(1, 3))).parts
    assert [part.weight for part in both] == [0.25, 0.5, 0.25, 3]
    assert [part.name for part in both] == [*sources, "plain"]
    for changes, message in (
        ({"weights": (1, 2)}, "2 weights for 3 sources"),
        ({"weights": (1, 2, 1), "dataset_size": "2000"}, "midden has no text for training"),
        ({"weights": (1,), "source": (sources[0],)}, "with one source"),
        ({"weights": (2, 2, 1), "name": "w"}, "--weights was"),
    ):
        with pytest.raises(UserError, match=message):
            preprocess(PreprocessOptions(**{"name": "x", **how, **changes}), Console(quiet=True))


@pytest.fixture(scope="module")
def lives(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lives]:
    lives = Lives(folder / "wiki", tmp_path_factory.mktemp("lives"))
    yield lives
    lives.close()


@pytest.mark.slow
def test_killed_at_any_moment_a_mixture_ends_the_same(
    folder: Path, lives: Lives, tmp_path: Path
) -> None:
    mixed = ("--dataset-path", folder / "web", "--weights", "3", "1", "--save-steps", "1")
    mixed = (*mixed, "--anneal", folder / "books", folder / "wiki", "--anneal-share", "0.4")
    words = [*map(str, mixed)]
    began = time.monotonic()
    assert lives.run(tmp_path / "a", *words) == [0], lives.log.read_text()
    expected, seconds = outcome(tmp_path / "a" / "run"), time.monotonic() - began
    how = {"signals": [signal.SIGKILL], "processes": 1, "seconds": seconds, "options": words}
    interrupt_often(lives, tmp_path / "b", expected, 3, chaos("mixture"), **how)
    said = lives.log.read_text()
    assert re.search(
        r"wiki \S+ times, web \S+ times; from update 8 on books \+ wiki \S+ times", said
    )
    run = tmp_path / "a" / "run"
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["per_source"].keys() == {"encyclopedie", "forum", "nieuws"}
    recorded = json.loads((run / "run.json").read_text())["data"]
    assert [each["name"] for each in recorded["directories"]] == ["wiki", "web"]
    assert [each["name"] for each in recorded["anneal"]] == ["books", "wiki"]
    assert "sha256 of books" in (run / "final_model" / "README.md").read_text()


@pytest.mark.slow
def test_two_processes_read_what_one_does(folder: Path, lives: Lives, tmp_path: Path) -> None:
    words = ("--dataset-path", str(folder / "web"), "--weights", "3", "1", "--optimizer", "adamw")
    assert lives.run(tmp_path / "two", *words, "--batch-size", "1", processes=2) == [0, 0]
    assert lives.run(tmp_path / "one", *words) == [0]
    one, two = (
        [m["loss"] for m in outcome(tmp_path / name / "run")["metrics"] if "loss" in m]
        for name in ("one", "two")
    )
    assert two == pytest.approx(one, abs=1e-5)


def test_another_mixture_is_another_run(folder: Path) -> None:
    same, other = (
        read_mixture(options(folder, "wiki", "web", weights=weights)).identity()
        for weights in ((0.75, 0.25), (4, 1))
    )
    assert read_mixture(options(folder, "wiki", "web", weights=(3, 1))).identity() == same
    state = {"fingerprint": same, "changeable": {}}
    with pytest.raises(UserError, match=r"weights was \[7500, 2500\], is \[8000, 2000\]"):
        check_same_run(Path("step-3"), state, other, {}, Console(quiet=True))


def test_the_plan_says_how_often_each_is_read(folder: Path) -> None:
    done = run_script(
        *("training.py", "--dataset-path", folder / "wiki", folder / "web", "--weights", "1", "3"),
        *("--plan", "--gpu", "a10g", "--model", "gemma3-micro", "--max-steps", "2000"),
        *("--compile", "never"),
    )
    assert done.returncode == 0, done.stderr
    assert "the training reads wiki " in done.stdout
    assert "wiki is read " in done.stdout and "arXiv:2305.16264" in done.stdout
