"""The README's commands, run as they stand."""

from __future__ import annotations

import gzip
import json
import os
import re
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT, run_bash, run_script
from hub_server import HubServer

from kiem.compute.speed import prefers_bf16
from kiem.config import HUB_DATASET, HUB_TOKENIZER
from kiem.core.processors import num_processors
from kiem.tokenizer.train import train_tokenizer

SCRIPTS = tuple(path.stem for path in ROOT.glob("*.py"))
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands(heading: str) -> str:
    """Returns the first block of shell commands below a heading."""
    match = re.search(rf"## {heading}\n.*?```bash\n(.*?)```", README, re.DOTALL)
    assert match, heading
    return match[1]


@pytest.mark.slow
def test_the_three_commands(checkout: Path, tmp_path: Path, sample_texts: list[str]) -> None:
    """Exactly as printed, against a Hub on loopback: four documents and a tiny vocabulary.

    It is the true 1B body (698 million parameters beside the embedding), on the CPU: 12 GB. Where
    bf16 is slow it is gemma3-nano, since an update of the 1B takes minutes there, and also with
    KIEM_TEST_1B=no, as in CI, which has half an hour.
    """
    columns = {"text": sample_texts[:4], "url": ["u"] * 4, "source": ["wikipedia"] * 4}
    pq.write_table(pa.table(columns), tmp_path / "train.parquet")
    parquet = (tmp_path / "train.parquet").read_bytes()
    repositories = {
        f"datasets/{HUB_DATASET}": {"10k/train-00000-of-00001.parquet": parquet},
        HUB_TOKENIZER: {"tokenizer.json": train_tokenizer(sample_texts, 600).json_bytes},
    }
    token = {"tokens": ["hf_test"], "accepted": ["hf_test"]}
    with HubServer(repositories, gated=[HUB_TOKENIZER], **token) as hub:
        env = hub.environment(tmp_path / "cache", token="hf_test")
        env["OMP_NUM_THREADS"] = str(num_processors())  # minutes of products, unlike other tests
        prompt = "Nederland is\n/quit\n"
        script = commands("The three commands")
        assert "/chunked_10k\n" in script
        if os.environ.get("KIEM_TEST_1B") == "no" or not prefers_bf16(torch.device("cpu")):
            script = script.replace("/chunked_10k\n", "/chunked_10k --model gemma3-nano\n")
            script = script.replace("gemma3-1b", "gemma3-nano")
        done = run_bash(script, checkout, env, stdin=prompt)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert "vocabulary of 600" in done.stdout
    assert re.search(r"\d+ tokens, [\d.]+ tokens/s", done.stdout)
    (model,) = (checkout / "trained_models").glob("gemma3-*-dutch-latest")
    assert (model / "final_model" / "model.safetensors").is_file()


def test_own_text(checkout: Path) -> None:
    """As printed but for the vocabulary and the minutes, for which a test has no time."""
    texts = checkout / "my_texts"
    texts.mkdir()
    sample = ROOT / "kiem" / "data" / "read" / "sample" / "dutch.jsonl"
    (texts / "deel1.jsonl").write_bytes(sample.read_bytes())
    script = commands("Your own text")
    assert "train:16384" in script
    assert "--max-minutes 30" in script
    script = script.replace("train:16384", "train:2048").replace("minutes 30", "minutes 0.05")
    done = run_bash(script, checkout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (checkout / "trained_models" / "gemma3-nano-dutch-latest" / "final_model").is_dir()


def test_demo(checkout: Path) -> None:
    """As printed but for the two minutes of training and the installation, which is there."""
    assert commands("Quick start") == "make demo\n"
    venv = checkout / ".venv"
    venv.symlink_to(Path(sys.executable).parent.parent)
    script = f"make --assume-old={venv.name}/installed demo DEMO_MINUTES=0.05"
    done = run_bash(script, checkout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test bits per byte" in done.stdout
    assert "What to try next" in done.stdout


PAGE = """<p>Buiten de eigenlijke bladzijde staat tekst die niemand wil lezen.</p>
<div id="DisplayArea"><h1>Een kop</h1><p>Druk op <span class="switchinline"><span hidden="true"
id="MACx">Commando</span><span hidden="true" id="defaultx">Ctrl</span></span>+<em>Z</em> om dat
ongedaan te maken.</p><p>Click the button and close this window.</p><p>Korte zin.</p>{last}</div>"""


def test_text_of_the_demo(tmp_path: Path) -> None:
    """What the text is made with leaves out what is no Dutch sentence, and what is there twice."""
    long = "<p>" + "Deze zin is lang genoeg om een bladzijde te vullen. " * 8 + "</p>"
    for name in "ab":
        file = tmp_path / "swriter" / "guide" / f"{name}.html"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(PAGE.format(last=long if name == "a" else long.replace("lang", "kort")))
    made = tmp_path / "made.jsonl.gz"
    done = run_script("demo/make_text.py", tmp_path, made)
    assert done.returncode == 0, done.stderr
    first, second = map(json.loads, gzip.decompress(made.read_bytes()).splitlines())
    assert first["text"].splitlines()[0] == "Druk op Ctrl+Z om dat ongedaan te maken."
    assert first["text"].count("\n") == 1
    assert second["text"].startswith("Deze zin is kort genoeg")


def test_options_in_the_documentation_exist() -> None:
    helps = {s: run_bash(f"python {s}.py --help", ROOT).stdout for s in SCRIPTS}
    num_checked = 0
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for script, rest in re.findall(r"(?:python|launch) (\w+)\.py(.*)", text):
            known = set(re.findall(r"--[a-z][a-z-]+", helps[script])) | {"--config"}
            unknown = set(re.findall(r"--[a-z][a-z-]+", rest)) - known
            assert not unknown, f"{page.name}: {script}.py {unknown}"
            num_checked += 1
    assert num_checked > 10
