"""The chain from final weights to source files, and the documents that each update read."""

from __future__ import annotations

import io
import itertools
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from conftest import run_script
from foreign_cases import REMOVED, changed, places
from rich.console import Console

from kiem.audit.command import audit
from kiem.audit.links import find_links
from kiem.audit.record import read_run
from kiem.audit.update import read_pieces
from kiem.config import AuditOptions
from kiem.core.errors import ExitCode, UserError
from kiem.core.files import sha256_file, write_json
from kiem.core.manifest import write_content
from kiem.data.chunks import open_split, read_manifest, read_tokenizer

LAST = "run/checkpoints/step-6"
CHUNKS_READ = (1, 1, 2, 2, 4, 4)  # by each update: of the batch's warm-up, and after it
# Of the keys of a run's files, those that an audit reads.
READ = {
    *("initialized_from", "branched_from", "data", "directories", "anneal", "manifest_sha256"),
    *("recipe", "chunks_per_step", "max_steps", "batch_warmup_steps"),
    *("steps", "fingerprint", "seed"),
    *("first_weights", "commit"),
}


@dataclass(frozen=True)
class Made:
    """A folder with source files (in/), chunk directories (chunks/ and more/) and a run (run/)."""

    folder: Path

    def audit(self, step: int | None = None, code: ExitCode = ExitCode.DAMAGED) -> str:
        """Returns what kiem audit prints in this folder, and its error, which must have `code`."""
        shown = io.StringIO()
        before = Path.cwd()
        os.chdir(self.folder)
        try:
            paths = (Path("chunks"), Path("more"))
            audit(AuditOptions(Path("run"), step, paths), Console(file=shown, width=300))
        except UserError as error:
            shown.write(f"error: {error}")
            assert error.exit_code == code
        finally:
            os.chdir(before)
        return shown.getvalue()

    def flip(self, name: str) -> None:
        """Changes one byte of a file."""
        path = self.folder / name
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, sample_texts: list[str]) -> Made:
    folder = tmp_path_factory.mktemp("audit")
    (folder / "in").mkdir()
    for name, texts in (("a", sample_texts[:40]), ("b", sample_texts[40:])):
        lines = [json.dumps({"text": text}) for text in texts]
        (folder / "in" / f"{name}.jsonl").write_text("\n\n".join(lines))
    for name, file, tokenizer in (("chunks", "a", "train:600"), ("more", "b", "chunks")):
        done = run_script(
            *(Path("preprocess.py").absolute(), "--source", f"in/{file}.jsonl", "--name", name),
            *("--tokenizer", tokenizer, "--chunk-size", "64", "--output-dir", "."),
            cwd=folder,
        )
        assert done.returncode == 0, done.stderr
    done = run_script(
        *("training.py", "--dataset-path", folder / "chunks", folder / "more", "--weights", "3"),
        *("1", "--model", "gemma3-micro", "--output-dir", folder, "--run-name", "run"),
        *("--max-steps", "6", "--eval-steps", "0", "--save-steps", "3", "--batch-size", "1"),
        *("--gradient-accumulation-steps", "4", "--batch-warmup-steps", "4"),
        *("--precision", "fp32"),
        *("--minimal-pairs", "never"),
    )
    assert done.returncode == 0, done.stderr
    return Made(folder)


@pytest.fixture
def made(original: Made, tmp_path: Path) -> Made:
    """A copy of it all, to be changed."""
    shutil.copytree(original.folder, tmp_path / "made")
    return Made(tmp_path / "made")


def test_every_link_of_an_untouched_run_is_proved(original: Made) -> None:
    shown = original.audit()
    assert "Every link is proved, from the final weights to the source files." in shown
    manifest = json.loads((original.folder / "run/final_model/manifest.json").read_text())
    assert manifest["sha256"] in shown
    for link in ("final_model <- checkpoint", "run <- chunks", "more <- source files"):
        assert f"proved       {link}" in shown


CHANGES = [
    *("run/final_model/model.safetensors", "run/final_model/manifest.json"),
    *("run/final_model/training_summary.json", "run/final_model/tokenizer.json"),
    *(f"{LAST}/model.safetensors", f"{LAST}/manifest.json"),
    *("chunks/train/data-00000-of-00001.arrow", "chunks/test/data-00000-of-00001.arrow"),
    *("chunks/documents/train.arrow", "chunks/tokenizer.json", "more/manifest.json"),
    *("more/test_sources/data-00000-of-00001.arrow", "in/a.jsonl", "in/b.jsonl"),
]


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_byte_is_named(name: str, made: Made) -> None:
    expected = sha256_file(made.folder / name)
    made.flip(name)
    shown = made.audit()
    assert "error: " in shown
    assert f"changed: {name}: " in shown
    if "manifest" not in name and "training_summary" not in name:
        assert f"expected sha256 {expected}, found {sha256_file(made.folder / name)}" in shown


def reseal(folder: Path, change: Callable[[Path], None]) -> None:
    """Changes a folder, and writes a manifest that suits."""
    change(folder)
    content = json.loads((folder / "manifest.json").read_text())
    content.pop("sha256")
    for name in content["files"]:
        entry = {"bytes": (folder / name).stat().st_size, "sha256": sha256_file(folder / name)}
        content["files"][name] = (
            entry if isinstance(content["files"][name], dict) else entry["sha256"]
        )
    write_content(folder, content)


def test_a_folder_that_is_changed_with_its_manifest_does_not_suit_the_others(made: Made) -> None:
    other = Made(made.folder)
    reseal(made.folder / LAST, lambda _: other.flip(f"{LAST}/model.safetensors"))
    shown = made.audit()
    assert "changed      final_model <- checkpoint" in shown
    assert "changed: run/final_model/model.safetensors: expected sha256" in shown


def test_chunks_that_are_made_anew_are_not_those_of_the_run(made: Made) -> None:
    reseal(made.folder / "chunks", lambda folder: write_json(folder / "dataset_dict.json", {}))
    shown = made.audit()
    assert "changed      run <- chunks" in shown
    assert "changed: chunks/manifest.json: expected sha256" in shown
    # Where those of the run still are, it is seen that the chunks are the same, else it is not.
    assert "chunk" in made.audit(step=1)
    content = json.loads((made.folder / "chunks/manifest.json").read_text())
    content["splits"]["train"]["shards"][0]["sha256"] = "0" * 64
    content.pop("sha256")
    write_content(made.folder / "chunks", content)
    assert "the run read one of sha256" in made.audit(step=1)


def test_what_is_not_there_is_not_called_proved(made: Made) -> None:
    for name in ("run/checkpoints", "in"):
        shutil.rmtree(made.folder / name)
    shown = made.audit()
    assert "error" not in shown
    assert "not checked  final_model <- checkpoint" in shown
    assert "missing      chunks <- source files" in shown
    assert "missing: in/a.jsonl: not there" in shown
    assert "Nothing is changed. Not proved: final_model <- checkpoint; chunks <- source" in shown
    shutil.rmtree(made.folder / "more")
    shutil.rmtree(made.folder / "run/final_model")
    shown = made.audit()
    assert "missing      final_model" in shown
    assert "missing: more: no such chunk directory; say where it is now" in shown


def test_documents_of_every_update(original: Made, sample_texts: list[str]) -> None:
    """What is named encodes to the tokens in the chunks that the update read."""
    chunks = (original.folder / "chunks", original.folder / "more")
    run = read_run(original.folder / "run", chunks)
    texts = {"in/a.jsonl": sample_texts[:40], "in/b.jsonl": sample_texts[40:]}
    num_read = dict.fromkeys(chunks, 0)
    for step, num_chunks in enumerate(CHUNKS_READ, start=1):
        lengths = []
        for read in read_pieces(run, step):
            manifest = read_manifest(read.directory)
            tokenizer = read_tokenizer(read.directory, manifest)
            piece = read.piece
            assert piece.row % 2 == 1  # the other lines are empty
            text = texts[read.file][piece.row // 2]
            tokens = [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
            ids = open_split(read.directory, manifest, "train").read(np.array([piece.chunk]))[0]
            assert (
                ids[piece.offset : piece.offset + piece.length].tolist()
                == (tokens[piece.start : piece.start + piece.length])
            )
            assert read.source == Path(read.file).stem
            num_read[read.directory] += piece.length
            lengths.append(piece.length)
        assert sum(lengths) == pytest.approx(num_chunks * 64, abs=63)  # but for padding
    assert num_read[chunks[0]] > 2 * num_read[chunks[1]]


def test_the_command_lists_documents(original: Made, tmp_path: Path) -> None:
    paths = ("--dataset-path", original.folder / "chunks", original.folder / "more")
    command = ("-m", "kiem", "audit", original.folder / "run", *paths)
    done = run_script(*command, "--step", "6")
    assert done.returncode == 0, done.stderr
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert {line[0] for line in lines} <= {"a", "b"}
    assert all(line[1].startswith(f"in/{line[0]}.jsonl:") for line in lines)
    assert len({line[3] for line in lines}) == CHUNKS_READ[5]
    done = run_script(*command, "--step", "7")
    assert done.returncode == ExitCode.BAD_OPTION
    assert "The run has 6 updates so far." in done.stderr
    done = run_script("-m", "kiem", "audit", tmp_path)
    assert done.returncode == ExitCode.NOT_FOUND


def test_skipped_updates_are_told(made: Made) -> None:
    warning = {"step": 2, "warning": "step 3 is skipped: its loss 9.000 is above 8.000"}
    log = made.folder / "run" / "metrics.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    place = next(n for n, line in enumerate(lines) if json.loads(line)["step"] == 3)
    log.write_text("".join([*lines[:place], json.dumps(warning) + "\n", *lines[place:]]))
    assert "its gradients were not used" in made.audit(step=3)
    assert "skipped" not in made.audit(step=2)


def test_a_branch_names_the_run_before_it(made: Made) -> None:
    shutil.copytree(made.folder / "run", made.folder / "first")
    point = made.folder / "first/checkpoints/step-3/manifest.json"
    branch = {"run": "first", "step": 3, "checkpoint_sha256": sha256_file(point)}
    for name in ("run/run.json", "run/final_model/training_summary.json"):
        metadata = json.loads((made.folder / name).read_text())
        write_json(made.folder / name, {**metadata, "branched_from": branch})
    reseal(made.folder / "run/final_model", lambda _: None)
    assert "proved       first checkpoint <- --branch-from" in made.audit()
    assert "update 3 was made by first" in made.audit(step=3, code=ExitCode.BAD_OPTION)
    assert "chunk" in made.audit(step=4)
    made.flip("first/checkpoints/step-3/manifest.json")
    assert "changed      first checkpoint <- --branch-from" in made.audit()
    shutil.rmtree(made.folder / "first")
    assert "missing      first checkpoint <- --branch-from" in made.audit()


def test_first_weights_are_those_of_the_model(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (made.folder / "run").rename(made.folder / "first")
    done = run_script(
        *(Path("training.py").absolute(), "--init-from", "first/final_model", "--output-dir", "."),
        *("--dataset-path", "chunks", "more", "--weights", "3", "1", "--run-name", "run"),
        *("--max-steps", "1", "--eval-steps", "0", "--batch-size", "1", "--precision", "fp32"),
        *("--gradient-accumulation-steps", "1", "--minimal-pairs", "never"),
        cwd=made.folder,
    )
    assert done.returncode == 0, done.stderr
    assert "proved       first weights <- --init-from" in made.audit()
    made.flip("first/final_model/model.safetensors")
    assert "changed      first weights <- --init-from" in made.audit()
    (made.folder / "first" / "final_model").rename(made.folder / "elsewhere")
    assert "missing      first weights <- --init-from" in made.audit()
    # A model of the Hub is looked for in its cache.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    for name in ("run/run.json", "run/final_model/training_summary.json"):
        content = json.loads((made.folder / name).read_text())
        weights = {**content["first_weights"], "commit": "0" * 40}
        content |= {"initialized_from": "google/gemma", "first_weights": weights}
        write_json(made.folder / name, content)
    reseal(made.folder / "run/final_model", lambda _: None)
    assert "not checked  first weights <- --init-from" in made.audit()
    snapshot = tmp_path / "cache" / "models--google--gemma" / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    (made.folder / "elsewhere").rename(snapshot)
    assert "changed      first weights <- --init-from" in made.audit()


def test_any_change_of_what_a_run_says(made: Made) -> None:
    """It is found, told as an error, or makes no difference."""
    run, chunks = made.folder / "run", (made.folder / "chunks", made.folder / "more")
    for path in (*run.rglob("*.safetensors"), *made.folder.glob("*/t*/*.arrow")):
        path.unlink()  # they would be hashed each time
    files = {
        run / "run.json": [REMOVED, None, -1, 10**30, "x", []],
        run / "final_model" / "training_summary.json": [REMOVED, "x"],
        run / "checkpoints" / "step-6" / "state.json": [REMOVED, -1, "x", []],
    }
    num_refused = 0
    for file, values in files.items():
        content = json.loads(file.read_text())
        read = [place for place in places(content) if place[-1] in READ]
        for place, new in itertools.product(read, values):
            file.write_text(json.dumps(changed(content, place, new)))
            try:
                record = read_run(run, chunks)
                assert [*find_links(record)] and [*read_pieces(record, 1)]
            except UserError as error:
                assert error.where
                num_refused += 1
        write_json(file, content)
    assert num_refused > 20
    (run / "config.yaml").write_text("seed: 1\n")
    with pytest.raises(UserError, match="does not say which chunks"):
        read_run(run, chunks)
