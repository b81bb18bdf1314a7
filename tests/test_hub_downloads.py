"""Downloads from a local Hub: trouble on the way, room on the disk, progress bars."""

from __future__ import annotations

import fcntl
import hashlib
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from contextlib import suppress
from pathlib import Path

import pytest
from hub_client import BIG_BYTES, DATASET, DATASET_FILES, OPEN_MODEL, SHARDS, Client, paths_of
from hub_server import HubServer

from kiem.core.errors import ExitCode

FULL_DISK = """
import errno, huggingface_hub.file_download
def http_get(*arguments, **options):
    raise OSError(errno.ENOSPC, "No space left on device")
huggingface_hub.file_download.http_get = http_get
"""


@pytest.mark.parametrize("status", [429, 503])
def test_passing_trouble_is_waited_out(hub: HubServer, client: Client, status: int) -> None:
    hub.fail(status, times=2, retry_after=0, match="/api/")
    hub.fail(status, times=1, retry_after=0, match="/cdn/")
    assert client.get("download_dataset_files", DATASET, "10k")["names"] == list(SHARDS)


def test_rate_limit_while_looking_up_a_file(hub: HubServer, client: Client) -> None:
    hub.fail(429, times=2, retry_after=0, match="tokenizer.json")
    assert client.get("download_tokenizer", OPEN_MODEL)["paths"]


@pytest.mark.parametrize(
    ("status", "retry_after", "says"), [(429, 0, "429"), (429, 3600, "429"), (503, 0, "503")]
)
def test_lasting_trouble_is_explained(
    hub: HubServer, client: Client, status: int, retry_after: int, says: str
) -> None:
    hub.fail(status, times=100, retry_after=retry_after)
    exit_code, message = client.fail("download_dataset_files", DATASET, "10k")
    assert exit_code == ExitCode.NETWORK
    assert says in message


@pytest.mark.parametrize("reset", [False, True])
def test_cut_connection_is_resumed(hub: HubServer, client: Client, reset: bool) -> None:
    hub.cut(after=11_000_000, match="/cdn/", reset=reset)
    files = client.get("download_dataset_files", DATASET, "1M")
    content = Path(files["paths"][0]).read_bytes()
    assert hashlib.sha256(content).digest() == hashlib.sha256(BIG_BYTES).digest()
    assert reset or hub.ranges == ["bytes=10485760-"], "whole blocks are not downloaded again"


def test_the_hub_says_how_long_to_wait(hub: HubServer, client: Client) -> None:
    hub.fail(429, retry_after=2, match="/api/")
    assert client.get("download_dataset_files", DATASET, "10k")["names"] == list(SHARDS)
    assert hub.times[1] - hub.times[0] >= 2


def test_after_failing_only_what_is_missing_is_downloaded(hub: HubServer, client: Client) -> None:
    hub.fail(403, times=100, match=SHARDS[1])
    exit_code, message = client.fail("download_dataset_files", DATASET, "10k")
    assert exit_code == ExitCode.NETWORK
    assert "files that are complete are not downloaded again" in message
    hub.clear_faults()
    hub.log.clear()
    assert client.get("download_dataset_files", DATASET, "10k")["names"] == list(SHARDS)
    assert len(paths_of(hub, "/cdn/")) == 1


SMALL_DISK = """
import shutil, types
shutil.disk_usage = lambda path: types.SimpleNamespace(free=11_999_999)
"""


def test_room_is_needed_only_for_what_is_not_there(hub: HubServer, client: Client) -> None:
    exit_code, message = client.fail("download_dataset_files", DATASET, "1M", first=SMALL_DISK)
    assert exit_code == ExitCode.DISK_SPACE
    for part in ("12.0 MB needed, 12.0 MB free", "HF_HOME"):
        assert part in message
    assert not paths_of(hub, "/cdn/"), "not even the first byte"
    files = client.get("download_dataset_files", DATASET, "1M")
    hub.commit(f"datasets/{DATASET}", {**DATASET_FILES, "new.txt": b""})
    again = client.get("download_dataset_files", DATASET, "1M", first=SMALL_DISK)
    assert files["revision"] != again["revision"]


SHOW = """
import sys
from kiem.hub.transfer import download_dataset_files
from rich.console import Console
download_dataset_files(sys.argv[1], sys.argv[2], console=Console(width=150, highlight=False))
"""


def download_with_bars(hub: HubServer, client: Client, stderr: int) -> bytes:
    """Returns standard output of a process that downloads 12 MB."""
    environment = {**os.environ, **hub.environment(client.cache)}
    del environment["HF_HUB_DISABLE_PROGRESS_BARS"]
    command = [sys.executable, "-c", SHOW, DATASET, "1M"]
    root = Path(__file__).parents[1]
    done = subprocess.run(
        command, env=environment, cwd=root, stdout=subprocess.PIPE, stderr=stderr, check=True
    )
    os.close(stderr)
    return done.stdout


def test_bars_of_a_download(hub: HubServer, client: Client) -> None:
    terminal, stderr = pty.openpty()
    fcntl.ioctl(stderr, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 150, 0, 0))
    said = download_with_bars(hub, client, stderr)
    assert said.startswith(f"downloading 1 of 1 files (12.0 MB) of {DATASET} at ".encode())
    bars = b""
    with suppress(OSError):  # at the end of what was written
        while part := os.read(terminal, 4096):
            bars += part
    # Bytes of all files, and how many files are complete.
    assert b"12.0MB / 12.0MB" in bars
    assert re.search(rb"Fetching 1 files: 100%.*1/1", bars)


def test_no_bars_in_a_file(hub: HubServer, client: Client, tmp_path: Path) -> None:
    path = tmp_path / "stderr"
    said = download_with_bars(hub, client, os.open(path, os.O_WRONLY | os.O_CREAT))
    assert said.startswith(f"downloading 1 of 1 files (12.0 MB) of {DATASET} at ".encode())
    assert b"\x1b" not in said
    assert not path.read_bytes()


def test_full_disk(client: Client) -> None:
    exit_code, message = client.fail("download_dataset_files", DATASET, "10k", first=FULL_DISK)
    assert exit_code == ExitCode.DISK_SPACE
    assert "HF_HOME" in message
