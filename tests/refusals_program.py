"""Calls what writes, while fault_shim.c refuses every call in every way, or kills at every call.

Prints what went wrong, and at the end how many calls it went through.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from disk_shim import ANY, FULL, KILL, NEVER, OPERATIONS, SHORT, Shim

from kiem.core import files
from kiem.core.disk import DiskWarning, remove_leftovers
from kiem.core.errors import UserError
from kiem.core.locking import locked_folder

State = dict[str, bytes]
REFUSALS = [
    getattr(errno, name)
    for name in (
        *("EACCES", "EPERM", "EROFS", "EISDIR", "ENOTEMPTY", "EXDEV", "ENOSPC", "EDQUOT"),
        *("EFBIG", "EIO", "ESTALE", "ENXIO", "EBUSY", "ETXTBSY", "EAGAIN", "ELOOP", "EMFILE"),
        *("ENAMETOOLONG", "EINVAL", "ENOTSUP", "ENOSYS", "ENOLCK"),
    )
]
LASTING = (errno.EIO, errno.EROFS, errno.EINVAL)
# What network, USB and FUSE disks do not have, with what they say then.
MISSING = {
    "fsync": (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS),
    "renameat2": (errno.EINVAL, errno.ENOSYS, errno.EPERM, errno.ENOTSUP),
    "symlink": (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, errno.EACCES),
    "flock": (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.EBADF),
}


@dataclass(frozen=True)
class Case:
    """A function that writes.

    Attributes:
        act: calls it in a folder.
        prepare: makes the folder as it is before.
        is_between: whether a state (with the old one, the new one, and how it ended) is allowed
            that is neither the old nor the new one.
        is_needed: whether it must do what it shall or fail; otherwise it may do nothing.
        adds: whether doing it twice is not the same as doing it once.
    """

    act: Callable[[Path], None]
    prepare: Callable[[Path], None] = lambda _: None
    is_between: Callable[[State, State, State, str], bool] = lambda *_: False
    is_needed: bool = True
    adds: bool = False


def put(path: Path, *contents: str) -> None:
    path.mkdir(parents=True)
    for number, content in enumerate(contents):
        (path / f"{number}.txt").write_text(content)


def fill(folder: Path, *contents: str, temporary: Path | None = None) -> None:
    with files.new_folder(folder, overwrite=folder.exists(), temporary=temporary) as unfinished:
        for number, content in enumerate(contents):
            files.write_text(unfinished / f"{number}.txt", content)


def lock(folder: Path) -> None:
    with locked_folder(folder / "a"):
        files.write_text(folder / "a" / "0.txt", "new")


def move(folder: Path) -> None:
    if (folder / "a").exists():
        files.move_folder(folder / "a", "b")


def replace_elsewhere(folder: Path) -> None:
    fill(folder / "a", "new", "more", temporary=folder / ".work" / "result")


def prepare_elsewhere(folder: Path) -> None:
    put(folder / "a", "old", "older")
    (folder / ".work").mkdir()


def prepare_taken_name(folder: Path) -> None:
    put(folder / "a", "old")
    put(folder / "b", "older")


def prepare_leftovers(folder: Path) -> None:
    put(folder / ".a.partial-1", "half")
    put(folder / ".b.removed", "half")


def seal(folder: Path) -> None:
    with files.sealed_file(folder / "a") as file:
        file.write(b"new" * 9)


def is_cut(state: State, _: State, new: State, end: str) -> bool:
    """Says whether the last line is cut, as a kill may leave it, but no refusal."""
    return end == "killed" and new["a"].startswith(state["a"])


LINES = '{"step": 1}\n'
CASES = {
    "write_bytes": Case(lambda folder: files.write_bytes(folder / "a", b"new" * 9)),
    "write_bytes over another": Case(
        lambda folder: files.write_bytes(folder / "a", b"new" * 9),
        lambda folder: (folder / "a").write_bytes(b"old"),
    ),
    "write_bytes under a long name": Case(lambda f: files.write_bytes(f / ("a" * 255), b"new")),
    "write_json": Case(lambda folder: files.write_json(folder / "a", {"new": 1})),
    "sealed_file": Case(seal, lambda folder: (folder / "a").write_bytes(b"old")),
    "append_json_lines": Case(
        lambda folder: files.append_json_lines(folder / "a", [{"step": 2}, {"step": 3}]),
        lambda folder: (folder / "a").write_text(LINES),
        is_between=is_cut,
        adds=True,
    ),
    "append_json_lines after a cut line": Case(
        lambda folder: files.append_json_lines(folder / "a", [{"step": 2}, {"step": 3}]),
        lambda folder: (folder / "a").write_text(LINES + '{"ste'),
        is_between=lambda state, _, new, __: new["a"].startswith(state["a"]),
        adds=True,
    ),
    "fsync_file": Case(
        lambda folder: files.fsync_file(folder / "a"),
        lambda folder: (folder / "a").write_text("old"),
    ),
    "new_folder": Case(lambda folder: fill(folder / "a", "new", "more")),
    "new_folder over another": Case(
        lambda folder: fill(folder / "a", "new", "more"),
        lambda folder: put(folder / "a", "old", "older"),
    ),
    "new_folder filled elsewhere": Case(replace_elsewhere, prepare_elsewhere),
    "remove_folder": Case(
        lambda folder: files.remove_folder(folder / "a"),
        lambda folder: put(folder / "a", "old", "older"),
    ),
    "move_folder": Case(move, lambda folder: put(folder / "a", "old")),
    "move_folder to a name that is taken": Case(move, prepare_taken_name),
    "remove_leftovers": Case(
        remove_leftovers,
        prepare_leftovers,
    ),
    "empty_folder": Case(
        lambda folder: files.empty_folder(folder / "a"),
        lambda folder: put(folder / "a", "old", "older"),
        is_between=lambda state, old, new, _: new.items() <= state.items() <= old.items(),
    ),
    "make_folder": Case(
        lambda folder: files.make_folder(folder / "a" / "b"),
        is_between=lambda state, _, new, __: state.items() <= new.items(),
    ),
    "remove_file": Case(
        lambda folder: files.remove_file(folder / "a"),
        lambda folder: (folder / "a").write_text("old"),
    ),
    "point_link": Case(
        lambda folder: files.point_link(folder / "link", "new"),
        lambda folder: (folder / "link").symlink_to("old"),
        is_needed=False,
    ),
    "locked_folder": Case(lock, is_between=lambda state, *_: state == {"a/": b""}),
}


def state_of(folder: Path) -> State:
    """Returns what one sees in a folder: files, links and folders, but not hidden ones."""
    state = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if any(part.startswith(".") for part in name.split("/")):
            continue
        if path.is_symlink():
            state[name] = os.fsencode(path.readlink())
        elif path.is_dir():
            state[f"{name}/"] = b""
        else:
            state[name] = path.read_bytes()
    return state


class Trials:
    """Runs a case again and again, each time in a new folder.

    Args:
        case: what to run.
        base: where the folders are made.
        shim: the disk.
        can_swap: whether it can swap two folders.
    """

    def __init__(self, case: Case, base: Path, shim: Shim, can_swap: bool):
        self._case, self._base, self._shim, self._can_swap = case, base, shim, can_swap
        self._num_folders = 0
        base.mkdir(parents=True)
        self.disarm()
        folder = self.folder()
        self._old = state_of(folder)
        self._shim.arm(ANY, NEVER, errno.EIO)
        assert (end := self.act(folder)) == "done", end
        self.num_calls = shim.num_calls
        self._new = state_of(folder)

    def disarm(self) -> None:
        self._shim.arm(ANY, NEVER, errno.EIO)

    def folder(self) -> Path:
        """Returns a new folder as it is before."""
        self._num_folders += 1
        folder = self._base / str(self._num_folders)
        folder.mkdir()
        self._case.prepare(folder)
        return folder

    def act(self, folder: Path) -> str:
        """Returns "done", what a UserError says, or a traceback."""
        try:
            self._case.act(folder)
        except UserError as error:
            return f"UserError: {error}"
        except Exception:  # noqa: BLE001 - which is what is looked for
            return traceback.format_exc()
        return "done"

    def problem(self, folder: Path, end: str, goes_on: bool = False) -> str | None:
        """Returns what is wrong with how it ended and what it left; None if nothing is.

        Args:
            folder: where.
            end: what `act` returned, or "killed".
            goes_on: whether the disk refused everything afterwards.
        """
        if not end.startswith(("done", "killed", "UserError")):
            return end
        if end.startswith("UserError") and str(folder) not in end:
            return f"does not say where: {end}"
        old = folder / ".a.old"
        if not self._can_swap and old.exists() and not (folder / "a").exists():
            assert goes_on or end == "killed"
            old.rename(folder / "a")  # as people do who want it back
        state = state_of(folder)
        allowed = [self._new] if end == "done" and self._case.is_needed else [self._old, self._new]
        is_between = self._case.is_between(state, self._old, self._new, end)
        if state not in allowed and (end == "done" or not is_between):
            return f"{end}, and left {state}"
        end = self.act(folder)
        after = state_of(folder)
        if end != "done" or (after != self._new and not self._case.adds):
            return f"the next start: {end}, and made {after} of {state}"
        if self._case.adds:
            for line in after["a"].splitlines():
                json.loads(line)
        left = [path.name for path in folder.rglob(".*") if path.name != ".work"]
        return f"the next start leaves {left}" if left else None

    def refuse_everything(self) -> Iterator[str]:
        """Refuses each call in every way; yields what is wrong."""
        for call in range(self.num_calls):
            once = [(kind, False) for kind in (SHORT, *REFUSALS)]
            for kind, goes_on in [*once, *((kind, True) for kind in (FULL, *LASTING))]:
                folder = self.folder()
                self._shim.arm(ANY, call, kind, goes_on)
                end = self.act(folder)
                self.disarm()
                if problem := self.problem(folder, end, goes_on):
                    name = errno.errorcode.get(kind, "full" if kind == FULL else "short")
                    yield f"{name} at call {call}{' and on' * goes_on}: {problem}"
                shutil.rmtree(folder)

    def kill_everywhere(self) -> Iterator[str]:
        """Kills the process at each call; yields what is wrong."""
        for call in range(self.num_calls):
            folder = self.folder()
            self._shim.arm(ANY, call, KILL)
            pid = os.fork()
            if pid == 0:
                self.act(folder)
                os._exit(0)
            self.disarm()
            _, status = os.waitpid(pid, 0)
            assert os.WIFSIGNALED(status), f"there is no call {call}"
            if problem := self.problem(folder, "killed"):
                yield f"killed at call {call}: {problem}"
            shutil.rmtree(folder)

    def do_without(self) -> Iterator[str]:
        """Acts on disks that do not have something; yields what is wrong."""
        for operation, numbers in MISSING.items():
            for number in numbers:
                folder = self.folder()
                reading, writing = os.pipe()
                pid = os.fork()
                if pid == 0:
                    problem = self._problem_without(folder, operation, number)
                    os.write(writing, (problem or "").encode())
                    os._exit(0)
                os.close(writing)
                with os.fdopen(reading) as file:
                    problem = file.read()
                _, status = os.waitpid(pid, 0)
                assert status == 0
                if problem:
                    yield f"without {operation} ({errno.errorcode[number]}): {problem}"
                shutil.rmtree(folder)

    def _problem_without(self, folder: Path, operation: str, number: int) -> str | None:
        """Returns what is wrong; there must be one warning, if at all, however often one acts."""
        self._shim.refuse(operation, number)
        self._shim.arm(OPERATIONS.index(operation), NEVER, errno.EIO)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            end, state = self.act(folder), state_of(folder)
            self.act(folder)
        num_calls = self._shim.num_calls
        said = [(warning.category, str(warning.message)) for warning in caught]
        if end != "done" or (self._case.is_needed and state != self._new):
            return f"{end}, and left {state}"
        num_expected = 1 if num_calls else 0
        if [category for category, _ in said] != [DiskWarning] * num_expected:
            return f"called {num_calls} times, and warned of {said}"
        return None


def main(library: str, base: Path, how: str) -> None:
    shim = Shim(library, base)
    warnings.simplefilter("ignore", DiskWarning)
    cases, num_calls = CASES, 0
    can_swap = not how.endswith("without swapping")
    if not can_swap:
        shim.refuse("renameat2", errno.EINVAL)
        cases = {name: case for name, case in CASES.items() if "over another" in name}
    for number, (name, case) in enumerate(cases.items()):
        trials = Trials(case, base / str(number), shim, can_swap)
        run = {
            "refused": trials.refuse_everything,
            "killed": trials.kill_everywhere,
            "missing": trials.do_without,
        }[how.split()[0]]
        for problem in run():
            print(f"{name}, {problem}")
        num_calls += trials.num_calls
    print(f"{how}: {len(cases)} functions, {num_calls} calls")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
