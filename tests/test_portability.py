"""Systems, compilers and processors that are not at hand: macOS and ARM."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from rich.console import Console

from kiem.compute.kernels import SOURCE
from kiem.compute.native import load_library, processor
from kiem.parallel.launch import choose_device, use_processors

# Takes from Python what macOS lacks, imports all of kiem and runs the programs. Other packages have
# builds of their own for macOS: they are imported before they could see its name.
WITHOUT_LINUX = """
import importlib, io, mmap, multiprocessing, os, pathlib, pkgutil, resource, select, signal, sys

missing = {
    os: "posix_fadvise posix_fallocate sched_getaffinity sched_setaffinity fdatasync splice"
    " copy_file_range memfd_create eventfd pidfd_open getxattr setxattr O_DIRECT O_TMPFILE",
    mmap: "MADV_HUGEPAGE MADV_NOHUGEPAGE MADV_POPULATE_READ MAP_POPULATE",
    resource: "prlimit", select: "epoll", signal: "SIGRTMIN sigtimedwait sigwaitinfo",
}
for module, names in missing.items():
    for name in names.split():
        if hasattr(module, name):
            delattr(module, name)
import accelerate, filelock, gigatoken, psutil, pyarrow.dataset, tokenizers
import torch._dynamo, torch.distributed.tensor, torch.utils.checkpoint
multiprocessing.set_start_method("spawn")
sys.platform = "darwin"
asked = {"open": [], "ctypes.dlsym": []}

def hide(event, args):
    if event == "open" and str(args[0]).startswith(("/proc/", "/sys/")):
        frame = sys._getframe(1)
        while not {"kiem", "site-packages"}.intersection(frame.f_code.co_filename.split("/")):
            frame = frame.f_back  # of Python's own modules
        if "site-packages" not in frame.f_code.co_filename:
            asked[event].append(args[0])
            raise FileNotFoundError(2, "not on macOS", args[0])
    if event == "ctypes.dlsym" and args[1] in ("renameat2", "gnu_get_libc_version", "mallopt"):
        asked[event].append(args[1])
        raise AttributeError(args[1])

sys.addaudithook(hide)
import kiem
names = [module.name for module in pkgutil.walk_packages(kiem.__path__, "kiem.")]
for name in names:
    if name != "kiem.__main__":
        importlib.import_module(name)
from kiem.commands import main
from kiem.model.io import write_weights
write_weights({"large": torch.zeros(3 << 20)}, pathlib.Path("large.safetensors"))
for words in (
    "preprocess --source - --tokenizer train:1024 --chunk-size 64 --num-proc 2 --output-dir data",
    "preprocess --source - --tokenizer train:1024 --chunk-size 64 --overwrite --output-dir data",
    "train --dataset-path data/chunked_stdin --output-dir runs --run-name one --model gemma3-micro"
    " --max-steps 1 --batch-size 2 --gradient-accumulation-steps 1",
    "generate --model-path runs/one/final_model --prompt Het --max-new-tokens 2",
):
    sys.argv = ["kiem", *words.split()]
    assert main() == 0, words
assert all(asked.values()), asked
"""


def test_programs_run_without_what_only_linux_has(tmp_path: Path, sample_texts: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-Werror", "-c", WITHOUT_LINUX],
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        input="\n\n".join(sample_texts),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "two folders cannot be swapped here" in done.stdout
    assert done.stdout.rstrip().splitlines()[-1].startswith("2 tokens")


def test_a_mac_says_that_its_gpu_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    console = Console(record=True, width=200)
    use_processors(console)
    assert console.export_text().startswith("computing on the CPU: kiem has no code for Apple's")
    assert choose_device().type == "cpu"


def test_processors_are_told_apart_by_their_instructions(tmp_path: Path) -> None:
    """The lines are those of Linux on x86-64 and on ARM."""
    file = tmp_path / "cpuinfo"
    found = set()
    for line in ("flags\t: fpu avx2", "Features\t: fp asimd", "Features\t: fp asimd asimddp"):
        file.write_text(f"processor\t: 0\nBogoMIPS\t: 50.0\n{line}\nCPU part\t: 0xd0c\n")
        found.add(processor(file))
        assert processor(file).decode() == line
    assert len(found) == 3
    assert processor(tmp_path / "none"), "the name has to do on other systems"


def test_a_compilation_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = tmp_path / "part" / "part.cpp"
    source.parent.mkdir()
    source.write_text('extern "C" void f() {}')
    for said in ("compiling part.cpp for this processor: once, some seconds\n", ""):
        assert not isinstance(load_library(source, {"f": []}), str)
        assert capsys.readouterr() == ("", said)


@pytest.mark.parametrize("architecture", ["armv8-a", "armv8.2-a+dotprod"])
def test_kernels_multiply_right_on_arm(architecture: str, tmp_path: Path) -> None:
    compiler, machine = "aarch64-linux-gnu-g++", "qemu-aarch64"
    if not (shutil.which(compiler) and shutil.which(machine)):
        pytest.skip("needs an ARM compiler: apt install g++-aarch64-linux-gnu qemu-user")
    program = tmp_path / "program"
    flags = f"-O2 -march={architecture} -ffp-contract=off -fopenmp -std=c++17 -static".split()
    source = Path(__file__).with_name("kernels_program.cpp")
    words = [compiler, *flags, f"-I{SOURCE.parent}", source, "-o", program]
    subprocess.run(words, check=True, capture_output=True)
    done = subprocess.run([machine, program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("right") == 4
