"""Writing: all or nothing, with the operating system's own refusals."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from kiem.core.disk import writing_errors
from kiem.core.errors import ExitCode, UserError
from kiem.core.files import (
    append_json_lines,
    check_new_file,
    format_bytes,
    make_folder,
    new_folder,
    point_link,
    require_free_space,
    write_bytes,
)
from kiem.core.values import check_name


def _make_folder(path: Path) -> None:
    with new_folder(path) as unfinished:
        (unfinished / "x").write_text("")


WRITERS: dict[str, Callable[[Path], None]] = {
    "write_bytes": lambda path: write_bytes(path, b"x"),
    "append_json_lines": lambda path: append_json_lines(path, [1]),
    "new_folder": _make_folder,
    "make_folder": make_folder,
}


def test_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    with pytest.raises(RuntimeError), new_folder(folder) as unfinished:
        (unfinished / "x").write_text("half")
        raise RuntimeError
    assert not list(folder.parent.iterdir())
    with new_folder(folder) as unfinished:
        (unfinished / "x").write_text("whole")
        assert not folder.exists()
    assert (folder / "x").read_text() == "whole"
    with new_folder(folder, overwrite=True) as unfinished:
        (unfinished / "y").write_text("new")
        assert (folder / "x").exists()
    assert [path.name for path in folder.parent.rglob("*")] == ["b", "y"]


def test_file_is_replaced_whole(tmp_path: Path) -> None:
    write_bytes(tmp_path / "f", b"one")
    write_bytes(tmp_path / "f", b"two")
    assert (tmp_path / "f").read_bytes() == b"two"
    assert len(list(tmp_path.iterdir())) == 1


def test_full_disk_is_named() -> None:
    full = Path("/dev/full")
    caught = pytest.raises(UserError, match="disk is full")
    with caught as raised, writing_errors(full), full.open("wb", 0) as file:
        file.write(b"x")
    assert raised.value.exit_code == ExitCode.DISK_SPACE
    assert raised.value.where == "/dev/full"


def test_too_little_space_is_noticed_before(tmp_path: Path) -> None:
    require_free_space(tmp_path / "not" / "there" / "yet", 1000, "a test")
    with pytest.raises(UserError, match=r"about 1\.0 TB needed") as caught:
        require_free_space(tmp_path, 10**12, "a test")
    assert caught.value.exit_code == ExitCode.DISK_SPACE


def test_file_in_the_place_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused = pytest.raises(UserError, match="cannot write here")
    with refused as caught, new_folder(tmp_path / "file" / "x"):
        pass
    assert caught.value.exit_code == ExitCode.NOT_WRITABLE


def test_link_is_relative_and_moves(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        point_link(tmp_path / "latest", name)
        assert os.fspath((tmp_path / "latest").readlink()) == name


LONGEST = "é" * 127 + "a"  # 255 bytes


@pytest.mark.parametrize("act", WRITERS)
@pytest.mark.parametrize(
    ("name", "message"),
    [
        (LONGEST, None),
        (f"{LONGEST}a", "File name too long"),
        ("a" * 300, "File name too long"),
        (f"{'a' * 255}/" * 17, "File name too long"),  # each part of it would do
        ("file/x", "Not a directory|File exists"),
    ],
)
def test_names(name: str, message: str | None, act: str, tmp_path: Path) -> None:
    """Names that fit are taken, however little is left for hidden names beside them."""
    (tmp_path / "file").write_text("")
    refused = pytest.raises(UserError, match=message) if message else contextlib.nullcontext()
    with refused:
        WRITERS[act](tmp_path / name)
    left = {path.name for path in tmp_path.iterdir()} - {"file"}
    assert left == (set() if message else {name})


def test_special_files_stay_what_they_are(tmp_path: Path) -> None:
    """As /dev/null would not if root wrote there as to a file."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="something else than a file"):
        write_bytes(tmp_path / "pipe", b"x")
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize("name", ["a" * 300, "file/x", "folder", "pipe", "not there/x", "loop"])
def test_what_cannot_be_written_is_found_before_the_work(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    before = sorted(tmp_path.iterdir())
    for act in (check_new_file, lambda path: write_bytes(path, b"x")):
        with pytest.raises(UserError, match="cannot write here"):
            act(tmp_path / name)
    for possible in ("file", "new"):
        check_new_file(tmp_path / possible)
    assert (tmp_path / "file").read_text() == "old"
    assert sorted(tmp_path.iterdir()) == before


def test_a_link_stays_and_its_file_is_replaced(tmp_path: Path) -> None:
    """As /dev/stdout would not if root wrote there as to a file."""
    (tmp_path / "elsewhere").mkdir()
    link, file = tmp_path / "link", tmp_path / "elsewhere" / "file"
    link.symlink_to(file)
    for content in (b"one", b"two"):  # at first it leads nowhere
        check_new_file(link)
        write_bytes(link, content)
        assert link.is_symlink()
        assert file.read_bytes() == content
    assert len([*tmp_path.rglob("*")]) == 3


def test_names_of_folders() -> None:
    for name in ("gemma3-1b", "run_1.2", "één"):
        assert check_name(name, "--name") == name
    for name in ("", ".", "..", "a/b", "-x", "a b", "a\n", "a" * 256, "é" * 128):
        with pytest.raises(UserError):
            check_name(name, "--name")


def test_bytes_for_people() -> None:
    assert [format_bytes(n) for n in (0, 999, 1000, 52_015_882, 3.5e12)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "52.0 MB",
        "3.5 TB",
    ]
