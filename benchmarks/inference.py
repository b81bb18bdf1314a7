"""Decoding and prefill side by side: kiem, transformers and, on request, llama.cpp.

    python benchmarks/inference.py --model-path final_model \\
        --llama-bench build/bin/llama-bench --gguf model-bf16.gguf model-q8_0.gguf model-q4_0.gguf

All take turns on the same machine, one after the other, with all its cores: 512 prompt tokens, then
new tokens one by one, greedily. transformers needs `pip install -e '.[foreign]'`. The figures
are medians over the repetitions; kiem's load time includes quantizing and, the first time on a
machine, compiling the kernels.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
PROMPT_TOKENS = 512
NEW_TOKENS = 32
PEER = """
import json, sys, time
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
first = min(seconds(1) for _ in range(2))
whole = min(seconds(1 + num_new) for _ in range(2))
rates = {"prefill": num_prompt / first, "decode": num_new / (whole - first)}
print(json.dumps({**rates, "load": load}))
"""


@dataclass(frozen=True)
class Options:
    """Time kiem's engine beside transformers and llama.cpp."""

    model_path: Path
    """Model directory."""
    llama_bench: Path | None = None
    """A built llama-bench."""
    gguf: tuple[Path, ...] = ()
    """Files for it."""


def main() -> int:
    options = tyro.cli(Options)
    console = Console()
    table = Table("", "prefill", "decode", "batch of 8", "load", title="tokens/s; seconds")
    for quantize in ("none", "int8", "int4"):
        figures = time_kiem(options.model_path, quantize)
        table.add_row(
            f"kiem, {quantize}",
            *(f"{figures[batch][what]:.1f}" for batch, what in _COLUMNS),
            f"{figures['load_seconds']:.1f}",
        )
    for dtype in ("bfloat16", "float32"):
        arguments = str(options.model_path), dtype, str(PROMPT_TOKENS), str(NEW_TOKENS)
        found = json.loads(run([sys.executable, "-c", PEER, *arguments]).splitlines()[-1])
        row = (f"{found[name]:.1f}" for name in ("prefill", "decode"))
        table.add_row(f"transformers, {dtype}", *row, "", f"{found['load']:.1f}")
    for file in options.gguf if options.llama_bench else ():
        prefill, decode = time_llama(options.llama_bench, file)
        table.add_row(f"llama.cpp, {file.name}", prefill, decode, "", "")
    console.print(table)
    return 0


_COLUMNS = (
    ("batch_1", "prefill_tokens_per_second"),
    ("batch_1", "decode_tokens_per_second"),
    ("batch_8", "decode_tokens_per_second"),
)


def time_kiem(model_path: Path, quantize: str) -> dict:
    """Returns what `inference.py --benchmark --json` writes."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "figures.json"
        command = [sys.executable, str(ROOT / "inference.py"), "--model-path", str(model_path)]
        run([*command, "--quantize", quantize, "--benchmark", "--json", str(file)])
        return json.loads(file.read_text(encoding="utf-8"))


def time_llama(llama_bench: Path, file: Path) -> tuple[str, str]:
    """Returns tokens/s of prefill and decoding, or why there are none.

    Each is a run of its own: one build's prefill of q8_0 ended with a segmentation fault.
    """
    cells = []
    for sizes in ((PROMPT_TOKENS, 0), (0, NEW_TOKENS)):
        lengths = ["-p", str(sizes[0]), "-n", str(sizes[1])]
        command = [str(llama_bench), "-m", str(file), "-t", str(os.cpu_count()), *lengths]
        done = subprocess.run(
            [*command, "-r", "3", "-o", "json"], capture_output=True, text=True, check=False
        )
        if done.returncode == 0:
            cells.append(f"{json.loads(done.stdout)[0]['avg_ts']:.1f}")
        else:
            cells.append(f"exit code {done.returncode}")
    return cells[0], cells[1]


def run(command: list[str]) -> str:
    """Returns a command's standard output; its failure ends the benchmark."""
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    sys.exit(main())
