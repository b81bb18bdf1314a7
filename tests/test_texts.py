"""Which texts, licences and shares went into a model: as stated, and as the updates read them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from conftest import run_script
from rich.console import Console

from kiem.config import PreprocessOptions, TrainingOptions
from kiem.core.errors import ExitCode, UserError
from kiem.data.documents import open_documents
from kiem.data.mixture import read_mixture
from kiem.data.order import chunk_numbers
from kiem.data.prepare.preprocess import preprocess
from kiem.data.prepare.verify import verify_directory
from kiem.data.source_record import list_source_files, list_sources
from kiem.data.texts import list_texts
from kiem.report.card import model_card
from kiem.tokenizer.tokenizer import Tokenizer

QUIET = Console(quiet=True)


@pytest.fixture
def options(tmp_path: Path, sample_texts: list[str], trained: Tokenizer) -> PreprocessOptions:
    """Four files, in a folder and alone."""
    (tmp_path / "tokenizer.json").write_bytes(trained.json_bytes)
    (tmp_path / "in").mkdir()
    for name, texts in (
        ("in/a", sample_texts[:30]),
        ("in/b", sample_texts[30:40]),
        ("c", sample_texts[40:60]),
        ("d", sample_texts[60:]),
    ):
        lines = [json.dumps({"text": text}) for text in texts]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    return PreprocessOptions(
        source=tuple(str(tmp_path / name) for name in ("in", "c.jsonl", "d.jsonl")),
        tokenizer=str(tmp_path / "tokenizer.json"),
        chunk_size=32,
        output_dir=tmp_path,
        num_proc=1,
    )


@pytest.mark.parametrize(
    ("licences", "expected"),
    [
        ((), [("in/a in/b c d", None)]),
        (("CC0-1.0",), [("in/a in/b c d", "CC0-1.0")]),
        (("CC0-1.0", "", "MIT"), [("in/a in/b", "CC0-1.0"), ("c", None), ("d", "MIT")]),
        (("MIT", "MIT", "CC0-1.0"), [("in/a in/b c", "MIT"), ("d", "CC0-1.0")]),
    ],
)
def test_licences_are_recorded_where_they_belong(
    licences: tuple[str, ...],
    expected: list[tuple[str, str | None]],
    options: PreprocessOptions,
    tmp_path: Path,
) -> None:
    manifest = verify_directory(preprocess(given(options, licence=licences), QUIET))
    found = [
        (
            " ".join(
                str(Path(file).relative_to(tmp_path).with_suffix(""))
                for file in list_source_files(entry)
            ),
            entry.get("licence"),
        )
        for entry in list_sources(manifest["source"])
    ]
    assert found == expected
    assert list_source_files(manifest["source"]) == list(manifest["documents_per_file"])


def given(options: PreprocessOptions, **changes: object) -> PreprocessOptions:
    return PreprocessOptions(**{**vars(options), **changes})


def test_other_numbers_and_other_licences_are_refused(options: PreprocessOptions) -> None:
    with pytest.raises(UserError, match="2 licences for 3 sources") as caught:
        preprocess(given(options, licence=("MIT", "MIT")), QUIET)
    assert caught.value.exit_code == ExitCode.BAD_OPTION
    preprocess(given(options, licence=("MIT",)), QUIET)
    with pytest.raises(UserError, match="or --licence another one"):
        preprocess(given(options, licence=("CC0-1.0",)), QUIET)


def test_shares_are_those_that_the_updates_read(options: PreprocessOptions, tmp_path: Path) -> None:
    sources = {"one": ("in", "c.jsonl"), "two": ("d.jsonl",)}
    for name, files in sources.items():
        paths = tuple(str(tmp_path / file) for file in files)
        licence = ("CC0-1.0", "MIT")[: len(paths)]
        preprocess(given(options, source=paths, name=name, licence=licence), QUIET)
    training = TrainingOptions(
        dataset_path=(tmp_path / "one", tmp_path / "two"), weights=(1.0, 3.0), seed=7
    )
    mixture = read_mixture(training)
    num_steps, per_step = 400, 16
    order = mixture.order(training, per_step, num_steps)
    texts = list_texts(mixture, order, num_steps)
    assert [(text["directory"], text["licence"]) for text in texts] == [
        ("one", "CC0-1.0"),
        ("one", "MIT"),
        ("two", "CC0-1.0"),
    ]
    assert texts[0]["text"] == "2 local files, such as a.jsonl"
    assert sum(text["share"] for text in texts) == pytest.approx(1)
    # Count what every update reads, by the record of documents.
    read: Counter[str] = Counter()
    documents = [open_documents(d.path, d.manifest, "train") for d in mixture.directories]
    files = [list(d.manifest["documents_per_file"]) for d in mixture.directories]
    for step in range(num_steps):
        for number in chunk_numbers(order, step).tolist():
            at = int(number >= mixture.directories[0].num_chunks)
            for piece in documents[at].in_chunk(number - at * mixture.directories[0].num_chunks):
                read[Path(files[at][piece.file]).stem] += piece.length
    expected = [read["a"] + read["b"], read["c"], read["d"]]
    found = [text["share"] for text in texts]
    assert found == pytest.approx([n / read.total() for n in expected], abs=0.01)


def test_the_card_names_texts_licences_and_shares(trained_run: Path) -> None:
    file = trained_run / "final_model" / "training_summary.json"
    summary = json.loads(file.read_text(encoding="utf-8"))
    assert "| the built-in sample | 79 | 100.0 % | not stated |" in (
        (trained_run / "final_model" / "README.md").read_text(encoding="utf-8")
    )
    hub = {"directory": "web", "text": "dataset a|b", "documents": 5000, "tokens": 1}
    summary["texts"] += [{**hub, "licence": ["odc-by", "mit"], "share": 0.25}]
    card = model_card(summary, "run", "nl")
    assert "| web: dataset a\\|b | 5,000 | 25.0 % | odc-by, mit |" in card
    assert "| chunked\\_sample: the built-in sample | 79 |" in card
    del summary["texts"]  # of a run of an earlier version
    assert "licence |" not in model_card(summary, "run", "nl")


def test_the_option_on_the_command_line(options: PreprocessOptions, tmp_path: Path) -> None:
    done = run_script(
        *("preprocess.py", "--source", *options.source[:2], "--licence", "MIT", ""),
        *("--tokenizer", options.tokenizer, "--chunk-size", "32", "--output-dir", tmp_path / "o"),
    )
    assert done.returncode == 0, done.stderr
