"""What several tests share: the scripts as people run them, and small directories they make."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hub_client import Client, new_hub
from hub_server import HubServer
from programs import run_forked

from kiem.model.config import Gemma3Config
from kiem.tokenizer.tokenizer import Tokenizer, load_tokenizer
from kiem.tokenizer.train import train_tokenizer

if TYPE_CHECKING:
    from lives import Lives

ROOT = Path(__file__).resolve().parent.parent
GEMMA_TOKENIZER = ROOT / ".cache" / "gemma3" / "tokenizer.json"
# A model whose every part is there, with a window that short texts go beyond.
WINDOW = 8
SMALL = Gemma3Config(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=96,
    num_hidden_layers=7,
    head_dim=16,
    sliding_window=WINDOW,
    query_pre_attn_scalar=16,
    max_position_embeddings=256,
)
# Scripts that import torch, and what libraries read of the environment when they are imported.
TORCH_SCRIPTS = ("training.py", "inference.py", "evaluate.py")
READ_AT_IMPORT = ("ATEN_", "CUDA_", "CXX", "LD_", "MKL_", "OMP_", "ONEDNN_", "PYTHON", "TORCH")
# preprocess.py with units so small that there are many of them.
SMALL_UNITS_PROGRAM = """
import sys
from kiem.data.prepare import units
units.UNIT_BYTES = 20_000
sys.argv = ["preprocess.py", *sys.argv[1:]]
from preprocess import main
from kiem.cli import run
from kiem.config import PreprocessOptions
sys.exit(run(PreprocessOptions, "preprocess.py", main))
"""


def pytest_configure(config: pytest.Config) -> None:
    """Hides the GPUs from every test and every process it starts, but for `pytest -m gpu`."""
    if not config.option.markexpr.startswith("gpu"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


# With few but long tests, or many of them.
LONG_FILES = tuple(
    f"test_{name}.py"
    for name in (
        *("readme", "training", "plan", "interruptions", "ray", "checkpoint", "guard", "export"),
        *("portability", "shard_parameters", "faults", "ddp", "processes", "restart", "bad_input"),
        "ray_nodes",
    )
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts long files first: at the end of a parallel run others would wait for them."""
    items.sort(key=lambda item: item.path.name not in LONG_FILES)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA GPU; run it there with pytest -m gpu")


class Disk:
    """A small disk in memory.

    Attributes:
        path: where it is mounted.
    """

    def __init__(self, path: Path):
        self.path = path

    def remount(self, option: str) -> None:
        """Changes its size (size=BYTES) or whether it can be written to (ro, rw)."""
        subprocess.run(["mount", "-o", f"remount,{option}", self.path], check=True)

    def fill(self) -> None:
        """Fills it to the last byte."""
        with (self.path / "full").open("wb", buffering=0) as file:
            try:
                while file.write(bytes(4096)):
                    pass
            except OSError:
                assert shutil.disk_usage(self.path).free == 0


def run_script(
    *command: str | Path, env: dict[str, str] | None = None, stdin: str = "", cwd: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """Runs a script of the project in a process of its own."""
    words = [*map(str, command)]
    environment = {**os.environ, "COLUMNS": "200", **(env or {})}
    if words[0] in TORCH_SCRIPTS and not any(n.startswith(READ_AT_IMPORT) for n in env or {}):
        return run_forked(words, environment, stdin, cwd)
    return subprocess.run(
        [sys.executable, *words],
        cwd=cwd,
        env=environment,
        input=stdin,
        text=True,
        capture_output=True,
        timeout=600,
        check=False,
    )


def run_bash(
    script: str, cwd: Path, env: dict[str, str] | None = None, stdin: str = ""
) -> subprocess.CompletedProcess[str]:
    """Runs shell commands as a page prints them, with this Python's commands first."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-euc", script],
        cwd=cwd,
        env={**os.environ, "PATH": path, **(env or {})},
        input=stdin,
        text=True,
        capture_output=True,
        timeout=1200,
        check=False,
    )


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder that looks like a checkout, to run commands in without leaving traces."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in (*(path.name for path in ROOT.glob("*.py")), "demo", "kiem", "pyproject.toml"):
        (folder / name).symlink_to(ROOT / name)
    for name in ("Makefile", "constraints.txt"):
        (folder / name).write_bytes((ROOT / name).read_bytes())
    return folder


@pytest.fixture(scope="session")
def sample_chunks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chunk directory of the built-in sample with a small vocabulary of its own."""
    folder = tmp_path_factory.mktemp("data")
    done = run_script(
        "preprocess.py",
        *("--source", "sample", "--tokenizer", "train:1024", "--chunk-size", "64"),
        *("--output-dir", folder),
    )
    assert done.returncode == 0, done.stderr
    return folder / "chunked_sample"


@pytest.fixture(scope="session")
def trained_run(sample_chunks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a short training on the sample."""
    folder = tmp_path_factory.mktemp("runs")
    done = run_script(
        "training.py",
        *("--dataset-path", sample_chunks, "--model", "gemma3-micro", "--output-dir", folder),
        *("--run-name", "short", "--max-steps", "12", "--eval-steps", "6", "--save-steps", "4"),
        *("--batch-size", "4", "--gradient-accumulation-steps", "2", "--precision", "fp32"),
    )
    assert done.returncode == 0, done.stderr
    return folder / "short"


@pytest.fixture(scope="module")
def lives(sample_chunks: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lives]:
    """Training processes to be killed, on the sample's chunks."""
    from lives import Lives  # which takes from here in its turn

    lives = Lives(sample_chunks, tmp_path_factory.mktemp("lives"))
    yield lives
    lives.close()


@pytest.fixture(scope="session")
def gemma_tokenizer_file() -> Path:
    """Gemma's own tokenizer.json, which `make gemma-tokenizer` fetches."""
    if not GEMMA_TOKENIZER.exists():
        message = "Gemma's tokenizer is not there; fetch it with: make gemma-tokenizer"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return GEMMA_TOKENIZER


@pytest.fixture(scope="session")
def sample_texts() -> list[str]:
    """The texts of the built-in sample."""
    file = ROOT / "kiem" / "data" / "read" / "sample" / "dutch.jsonl"
    return [json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="session")
def trained(sample_texts: list[str]) -> Tokenizer:
    """A vocabulary of 1500 entries trained on the sample."""
    return train_tokenizer(sample_texts, 1500)


@pytest.fixture(scope="session")
def gemma(gemma_tokenizer_file: Path) -> Tokenizer:
    """Gemma's own tokenizer."""
    return load_tokenizer(str(gemma_tokenizer_file))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    path = tmp_path / "disk"
    path.mkdir()
    if shutil.which("mount") is None:
        pytest.skip("there is no program mount")
    mount = ["mount", "-t", "tmpfs", "-o", "size=64000", "kiem-test", str(path)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"not allowed to mount a small disk: {done.stderr.strip()}")
    yield Disk(path)
    gc.collect()  # errors that were caught hold mapped files
    subprocess.run(["umount", path], check=True)


@pytest.fixture
def hub() -> Iterator[HubServer]:
    """A Hub on loopback with a dataset and some models."""
    with new_hub() as server:
        yield server


@pytest.fixture
def client(hub: HubServer, tmp_path: Path) -> Client:
    """A client of that Hub with an empty cache."""
    return Client(hub, tmp_path / "cache")
