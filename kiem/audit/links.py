"""The links of the chain from the final weights back to the source files, each proved by hashes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from kiem.audit.record import (
    CHECKPOINTS,
    FINAL_MODEL,
    FIX,
    STATE_FILE,
    Metadata,
    RunRecord,
    State,
)
from kiem.core.errors import ExitCode, UserError
from kiem.core.files import sha256_file
from kiem.core.json_input import read_json
from kiem.core.manifest import MANIFEST_FILE, read_content
from kiem.core.manifest import read_manifest as read_entries
from kiem.data.chunks import REJECTED_FILE, read_manifest
from kiem.data.read.source_file import STANDARD_INPUT
from kiem.data.source_record import list_sources
from kiem.hub.repo import Repo, blob_of
from kiem.report.record import METADATA_FILE, SUMMARY_FILE
from kiem.tokenizer.tokenizer import TOKENIZER_FILE

CheckState = Literal["proved", "not checked", "missing", "changed"]
_WEIGHTS_FILE = "model.safetensors"
_NOT_THERE = "not there; names without a leading / are looked for in the current folder"


@dataclass(frozen=True)
class Check:
    """One comparison.

    Attributes:
        state: proved, changed, missing (it is not where it was), or not checked.
        what: the file that was looked at.
        why: how it is changed, or why it was not checked.
    """

    state: CheckState
    what: str
    why: str = ""


@dataclass(frozen=True)
class Link:
    """A link of the chain: two things, or one and its own manifest, and their comparisons."""

    name: str
    checks: list[Check]

    @property
    def state(self) -> CheckState:
        """That of the comparison that proves least."""
        order: tuple[CheckState, ...] = ("changed", "missing", "not checked", "proved")
        return min((check.state for check in self.checks), key=order.index)


def find_links(run: RunRecord) -> Iterator[Link]:
    """Yields the links of a run, from the final weights to the source files."""
    final = run.directory / FINAL_MODEL
    if final.is_dir():
        yield Link(f"{FINAL_MODEL} <- its manifest", _check_folder(final))
        yield Link(f"{FINAL_MODEL} <- checkpoint", [_check_final(run)])
    else:
        what = "there is none: the run is not finished"
        yield Link(FINAL_MODEL, [Check("missing", str(final), what)])
    for checkpoint in run.checkpoints:
        yield Link(f"{checkpoint.name} <- its manifest", _check_folder(checkpoint))
    if run.metadata.initialized_from != "random weights":
        yield Link("first weights <- --init-from", [*_check_first_weights(run.metadata)])
    if run.metadata.branched_from is not None:
        yield Link("first checkpoint <- --branch-from", [_check_branch(run)])
    for number, path in enumerate(run.chunk_directories):
        yield from _chunk_links(run, path, number)


def _chunk_links(run: RunRecord, path: Path, number: int) -> Iterator[Link]:
    """Yields the links from a run to one of its chunk directories and to that one's sources."""
    name = f"run <- {path}"
    if not path.is_dir():
        why = "no such chunk directory; say where it is now with --dataset-path"
        yield Link(name, [Check("missing", str(path), why)])
        return
    try:
        manifest = read_manifest(path)
    except UserError as error:
        yield Link(name, [Check("changed", str(path / MANIFEST_FILE), error.what)])
        return
    yield Link(name, [*_check_records(run, path, manifest, number)])
    if "sha256" not in manifest:  # so that nothing in it can be relied on
        check = Check("changed", str(path / MANIFEST_FILE), "has no sha256 of itself")
        yield Link(f"{path.name} <- its manifest", [check])
        return
    files = dict(manifest["files"])
    for split in manifest["splits"].values():
        shards = ("shards", "source_shards", "document_shards")
        files |= {s["file"]: s["sha256"] for key in shards for s in split.get(key, ())}
    if "rejected_file" in manifest:
        files[REJECTED_FILE] = manifest["rejected_file"]["sha256"]
    files[TOKENIZER_FILE] = manifest["tokenizer"]["sha256"]
    checks = [_check_file(path / name, sha256) for name, sha256 in files.items()]
    yield Link(f"{path.name} <- its manifest", checks)
    yield Link(f"{path.name} <- source files", [*_check_sources(manifest)])


def _check_final(run: RunRecord) -> Check:
    """Compares the weights with those of the checkpoint after the last update."""
    file = run.directory / FINAL_MODEL / _WEIGHTS_FILE
    if run.summary is None:
        return Check("not checked", str(file), f"{SUMMARY_FILE} beside it cannot be read")
    last = run.directory / CHECKPOINTS / f"step-{run.summary.steps}"
    if not last.is_dir():
        kept = ", ".join(path.name for path in run.checkpoints) or "none"
        why = f"no checkpoint of the last update, {last.name}, was saved or kept (there is: {kept})"
        return Check("not checked", str(file), why)
    try:
        expected = read_entries(last, FIX)[_WEIGHTS_FILE].sha256
    except (UserError, KeyError) as error:
        return Check("changed", str(last / MANIFEST_FILE), str(error).splitlines()[0])
    return _check_file(file, expected)


def _check_first_weights(metadata: Metadata) -> Iterator[Check]:
    """Compares the files of the model that a run began with, as far as they are at hand."""
    name, recorded = metadata.initialized_from, metadata.first_weights
    if recorded is None:
        yield Check("not checked", name, "an earlier version of kiem did not record its hashes")
        return
    folder = Path(name)
    if recorded.commit is not None:
        folder = Repo("model", name).snapshot(recorded.commit)
    for file, sha256 in recorded.sha256.items():
        if (folder / file).exists():
            yield _check_file(folder / file, sha256)
        elif recorded.commit is not None:
            why = f"not in the Hub's cache; the Hub itself keeps commit {recorded.commit}"
            yield Check("not checked", f"{name}: {file}", why)
        else:
            yield Check("missing", str(folder / file), _NOT_THERE)


def _check_branch(run: RunRecord) -> Check:
    """Compares the checkpoint that a branch began with, in the run beside it."""
    branch = run.metadata.branched_from
    assert branch is not None
    folder = run.directory.resolve().parent / branch.run / CHECKPOINTS / f"step-{branch.step}"
    if not folder.is_dir():
        return Check("missing", str(folder), "removed as newer ones came, or elsewhere")
    return _check_file(folder / MANIFEST_FILE, branch.checkpoint_sha256)


def _check_records(
    run: RunRecord, path: Path, manifest: dict[str, Any], number: int
) -> Iterator[Check]:
    """Compares a manifest with what each file of the run says that it read."""
    found = str(manifest.get("sha256") or sha256_file(path / MANIFEST_FILE))
    records = [(run.directory / METADATA_FILE, run.metadata.manifests)]
    if run.summary is not None:
        records.append((run.directory / FINAL_MODEL / SUMMARY_FILE, run.summary.manifests))
    for checkpoint in run.checkpoints:
        file = checkpoint / STATE_FILE
        try:
            state = read_json(file, State, fix=FIX, exit_code=ExitCode.DAMAGED)
        except UserError as error:
            yield Check("changed", str(file), error.what)
            continue
        records.append((file, state.manifests))
        before, recipe = state.fingerprint, run.metadata.recipe
        said = (before.seed, before.chunks_per_step, before.batch_warmup_steps)
        options = (run.options.seed, recipe.chunks_per_step, recipe.batch_warmup_steps)
        if said != options:
            why = (
                f"seed, chunks per update and updates of the batch's warm-up are {said}, but "
                f"{options} in the run's options"
            )
            yield Check("changed", str(file), why)
    for file, manifests in records:
        expected = manifests[number] if number < len(manifests) else "no such chunk directory"
        if expected == found:
            yield Check("proved", str(file))
        else:
            yield Check("changed", str(path / MANIFEST_FILE), _differs(expected, found, file))
    # The tokenizer that the model has is the one that made the chunks.
    tokenizer = run.directory / FINAL_MODEL / TOKENIZER_FILE
    if run.summary is not None:
        yield _check_file(tokenizer, manifest["tokenizer"]["sha256"])


def _check_sources(manifest: dict[str, Any]) -> Iterator[Check]:
    """Compares the source files with the hashes that the manifest names."""
    for entry in list_sources(manifest["source"]):
        if "sha256" not in entry:
            yield from _check_hub_files(entry)
            continue
        for name, sha256 in entry["sha256"].items():
            if name == STANDARD_INPUT:
                yield Check("not checked", "standard input", "its text is in no file")
            elif entry["kind"] == "sample":
                sample = resources.files("kiem.data.read") / "sample" / "dutch.jsonl"
                yield _check_file(Path(str(sample)), sha256)
            elif not Path(name).exists():
                yield Check("missing", name, _NOT_THERE)
            else:
                yield _check_file(Path(name), sha256)


def _check_hub_files(entry: dict[str, Any]) -> Iterator[Check]:
    """Compares the files of a dataset, as far as they are in the Hub's cache."""
    where = f"{entry['dataset']} at {entry['revision']}"
    if "blobs" not in entry:
        why = "an earlier version of kiem recorded the commit, but no hashes of files"
        yield Check("not checked", where, why)
        return
    folder = Repo("dataset", entry["dataset"]).snapshot(entry["revision"])
    for name, blob in zip(entry["files"], entry["blobs"], strict=True):
        if (folder / name).exists():
            yield _check_file(folder / name, blob, partial(blob_of, num_digits=len(blob)))
        else:
            why = "not in the Hub's cache; the Hub itself keeps the files of every commit"
            yield Check("not checked", f"{where}: {name}", why)


def _check_folder(folder: Path) -> list[Check]:
    """Compares the files of a folder with its manifest, and the manifest with itself."""
    try:
        entries = read_entries(folder, FIX)
    except UserError as error:
        return [Check("changed", error.where or str(folder), error.what)]
    return [_check_file(folder / name, entry.sha256) for name, entry in entries.items()]


def _check_file(path: Path, expected: str, hash_file: Callable[[Path], str] = sha256_file) -> Check:
    try:
        found = hash_file(path)
    except OSError as error:
        return Check("changed", str(path), f"cannot be read ({error.strerror})")
    if found == expected:
        return Check("proved", str(path))
    return Check("changed", str(path), _differs(expected, found))


def _differs(expected: str, found: str, where: Path | None = None) -> str:
    said = f" (by {where})" if where else ""
    kind = "sha256" if len(found) == 64 else "git's sha1"
    return f"expected {kind} {expected}{said}, found {found}"


def own_sha256(folder: Path) -> str:
    """Returns the SHA-256 that stands for a whole folder: that of its manifest's content."""
    return str(read_content(folder)[0]["sha256"])
