"""Decoding and prefill side by side: kiem, transformers and, on request, llama.cpp.

    python benchmarks/inference.py --model-path final_model \\
        --llama-bench build/bin/llama-bench --gguf model-bf16.gguf model-q8_0.gguf model-q4_0.gguf

All take turns on the same machine, one after the other, with all its cores: 512 prompt tokens, then
new tokens one by one, greedily (llama.cpp writes them after none). transformers has an environment
of its own in .cache/. Figures are medians of three repetitions after a warm-up; kiem's load time
includes quantizing and, the first time on a machine, compiling the kernels. The share of the
memory's bandwidth is the bytes of all weights times tokens/s, over what a plain sum reads.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peers import ROOT, TRAINER_REQUIREMENTS, environment, machine
from rich.console import Console
from rich.table import Table

from kiem import cli
from kiem.compute.speed import prefers_bf16
from kiem.core.processors import num_processors
from kiem.inference.benchmark import copy_bytes_per_second
from kiem.model.io import WEIGHTS_FILE

PROMPT_TOKENS = 512
NEW_TOKENS = 32
PEER = """
import json, statistics, sys, time
import torch
from transformers import Gemma3ForCausalLM

model_path, dtype, num_prompt, num_new = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
started = time.perf_counter()
model = Gemma3ForCausalLM.from_pretrained(model_path, dtype=getattr(torch, dtype)).eval()
load = time.perf_counter() - started
torch.manual_seed(0)
prompt = torch.randint(4, model.config.vocab_size, (1, num_prompt))
mask = torch.ones_like(prompt)

def seconds(new):
    started = time.perf_counter()
    how = dict(do_sample=False, eos_token_id=None, max_new_tokens=new, min_new_tokens=new)
    model.generate(prompt, attention_mask=mask, **how)
    return time.perf_counter() - started

seconds(2)
first = statistics.median(seconds(1) for _ in range(3))
whole = statistics.median(seconds(1 + num_new) for _ in range(3))
rates = {"prefill": num_prompt / first, "decode": num_new / (whole - first)}
print(json.dumps({**rates, "load": load}))
"""


@dataclass(frozen=True)
class Options:
    """Time kiem's engine beside transformers and llama.cpp."""

    model_path: Path
    """Model directory."""
    quantize: tuple[Literal["none", "int8", "int4"], ...] = ("none", "int8", "int4")
    """How kiem keeps the weights."""
    transformers: bool = True
    """Whether transformers takes part."""
    llama_bench: Path | None = None
    """A built llama-bench."""
    gguf: tuple[Path, ...] = ()
    """Files for it."""


def main(options: Options, console: Console) -> None:
    columns = "prefill", "decode", "bandwidth", "batch of 8", "load"
    table = Table("", *columns, title="tokens/s; share; seconds")
    device = torch.device("cpu")
    bytes_per_second = copy_bytes_per_second(device)
    console.print(f"{machine()}, memory: {bytes_per_second / 1e9:.1f} GB/s")
    for quantize in options.quantize:
        figures = time_kiem(options.model_path, quantize)
        single, eight = figures["batch_1"], figures["batch_8"]
        table.add_row(
            f"kiem, {quantize}",
            f"{single['prefill_tokens_per_second']:.1f}",
            f"{single['decode_tokens_per_second']:.1f}",
            f"{figures['bandwidth_share']:.0%}",
            f"{eight['decode_tokens_per_second']:.1f}",
            f"{figures['load_seconds']:.1f}",
        )
    # Where bf16 is emulated transformers would take minutes for a prompt.
    dtypes = {"bfloat16": 1, "float32": 2} if prefers_bf16(device) else {"float32": 2}
    for dtype, factor in dtypes.items() if options.transformers else ():
        python = environment("peer-transformers", TRAINER_REQUIREMENTS, console)
        arguments = str(options.model_path), dtype, str(PROMPT_TOKENS), str(NEW_TOKENS)
        found = json.loads(run([str(python), "-c", PEER, *arguments]).splitlines()[-1])
        # The file has bf16.
        read_bytes = (options.model_path / WEIGHTS_FILE).stat().st_size * factor * found["decode"]
        rates = f"{found['prefill']:.1f}", f"{found['decode']:.1f}"
        share = f"{read_bytes / bytes_per_second:.0%}"
        table.add_row(f"transformers, {dtype}", *rates, share, "", f"{found['load']:.1f}")
    for file in options.gguf if options.llama_bench else ():
        prefill, decode = (time_llama(options.llama_bench, file, n) for n in (True, False))
        share = ""
        if isinstance(decode, float):
            share = f"{file.stat().st_size * decode / bytes_per_second:.0%}"
        cells = (f"{cell:.1f}" if isinstance(cell, float) else cell for cell in (prefill, decode))
        table.add_row(f"llama.cpp, {file.name}", *cells, share, "", "")
    console.print(table)


def time_kiem(model_path: Path, quantize: str) -> dict[str, Any]:
    """Returns what `inference.py --benchmark --json` writes."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "figures.json"
        command = [sys.executable, str(ROOT / "inference.py"), "--model-path", str(model_path)]
        run([*command, "--quantize", quantize, "--benchmark", "--json", str(file)])
        return json.loads(file.read_text(encoding="utf-8"))


def time_llama(llama_bench: Path, file: Path, of_prefill: bool) -> float | str:
    """Returns tokens/s of prefill or of decoding, or why there are none.

    Each is a run of its own: one build's prefill of q8_0 ended with a segmentation fault.
    """
    sizes = (PROMPT_TOKENS, 0) if of_prefill else (0, NEW_TOKENS)
    lengths = ["-p", str(sizes[0]), "-n", str(sizes[1])]
    command = [str(llama_bench), "-m", str(file), "-t", str(num_processors()), *lengths]
    done = subprocess.run(
        [*command, "-r", "3", "-o", "json"], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        return f"exit code {done.returncode}"
    return statistics.median(json.loads(done.stdout)[0]["samples_ts"])


def run(command: list[str]) -> str:
    """Returns a command's standard output; its failure ends the benchmark."""
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    sys.exit(cli.run(Options, __file__, main))
