"""Inference: the same choices as transformers, the same text alone or in company."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, run_bash, run_script
from rich.console import Console
from transformers import Gemma3ForCausalLM

from kiem.config import InferenceOptions
from kiem.core.console import printable
from kiem.core.errors import ExitCode, UserError
from kiem.inference.benchmark import run_benchmark
from kiem.inference.engine import Engine, Request
from kiem.inference.generate import generate
from kiem.inference.loading import LoadedModel, load_for_inference
from kiem.inference.sampling import SamplingParams
from kiem.tokenizer.text_stream import TextStream

GREEDY = SamplingParams(temperature=0, repetition_penalty=1, max_new_tokens=20)


@pytest.fixture(scope="module")
def loaded(trained_run: Path) -> LoadedModel:
    return load_for_inference(str(trained_run / "final_model"), "auto")


@pytest.mark.parametrize("prompt_tokens", [2, 127, 128, 129, 150])
def test_greedy_equals_transformers_generate(
    loaded: LoadedModel, trained_run: Path, prompt_tokens: int
) -> None:
    """The micro model's window is 128: prompts end before, at and after it."""
    reference = Gemma3ForCausalLM.from_pretrained(trained_run / "final_model")
    generator = torch.Generator().manual_seed(prompt_tokens)
    prompt = torch.randint(4, 1024, (1, prompt_tokens), generator=generator)
    prompt[0, 0] = 2
    expected = reference.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=20,
        do_sample=False,
        eos_token_id=None,
    )
    engine = Engine(loaded.model, None, max_requests=1, max_tokens=prompt_tokens + 20)
    request = Request(prompt[0].tolist(), GREEDY, seed=0)
    tokens = [output.token for _, output in engine.stream([request])]
    assert tokens == expected[0, prompt_tokens:].tolist()


def test_sequences_do_not_depend_on_their_neighbours(loaded: LoadedModel) -> None:
    def texts(num_sequences: int, seed: int) -> list[str]:
        model, tokenizer = loaded.model, loaded.tokenizer
        engine = Engine(model, tokenizer, max_requests=num_sequences, max_tokens=30)
        ids, params = [2, *tokenizer.encode("De stad")], SamplingParams(max_new_tokens=12)
        places = range(num_sequences)
        found = [""] * num_sequences
        for place, output in engine.stream(Request(ids, params, seed, 0, n) for n in places):
            found[place] += output.text
        return found

    assert texts(3, seed=1)[:1] == texts(1, seed=1)
    assert len(set(texts(3, seed=1))) == 3
    assert texts(1, seed=2) != texts(1, seed=1)


@pytest.mark.parametrize(
    "text", ["één 🇳🇱 vlag, 日本 en 👩‍👩‍👧‍👦!", "\ufffd tussen \ufffd", " a  b\n\n"]
)
def test_streaming_never_gives_half_a_character(loaded: LoadedModel, text: str) -> None:
    """Most characters here are byte tokens in a vocabulary of 1024."""
    stream = TextStream(loaded.tokenizer)
    shown = ""
    for token in loaded.tokenizer.encode(text):
        shown += stream.add(token)
        assert text.startswith(shown)
    assert shown + stream.end() == text


def test_bytes_that_are_no_text_do_not_stop_the_stream(loaded: LoadedModel) -> None:
    stream = TextStream(loaded.tokenizer)
    byte = [loaded.tokenizer.implementation.token_to_id(f"<0x{b:02X}>") for b in range(256)]
    tokens = [byte[0xE6], *loaded.tokenizer.encode("x"), *[byte[0xFF]] * 20, byte[0xC3]]
    text = "".join(stream.add(token) for token in tokens) + stream.end()
    assert text.replace("\ufffd", "") == "x"
    assert text.startswith("\ufffdx")


def test_text_cannot_steer_the_terminal() -> None:
    assert printable("a\x1b[2Jb\r\x9bc\n\t👩‍👧") == "a[2Jbc\n\t👩‍👧"


def test_prompts_from_a_file_to_a_file(trained_run: Path, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("Nederland is\n\nDe zee\n", encoding="utf-8")
    (tmp_path / "in.jsonl").write_text('{"prompt": "Nederland is"}\n{"prompt": "De zee"}\n')
    results = []
    for name in ("in.txt", "in.jsonl"):
        done = run_script(
            "inference.py",
            *("--model-path", trained_run / "final_model", "--prompts-file", tmp_path / name),
            *("--num-return-sequences", "2", "--max-new-tokens", "8"),
            *("--output-file", tmp_path / "out.jsonl"),
        )
        assert done.returncode == 0, done.stderr
        lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
        assert [line["prompt"] for line in lines] == ["Nederland is"] * 2 + ["De zee"] * 2
        assert {line["finish_reason"] for line in lines} <= {"eos", "length"}
        results.append([line["text"] for line in lines])
        assert all(line["prompt"] + line["text"] in done.stdout for line in lines)
    assert results[0] == results[1]


def test_five_dutch_prompts_by_default(trained_run: Path) -> None:
    done = run_script(
        "inference.py", "--model-path", trained_run / "final_model", "--max-new-tokens", "3"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("> ") == 5
    assert "Nederland is een land waar" in done.stdout


def test_interactive(trained_run: Path) -> None:
    done = run_script(
        "inference.py",
        *("--model-path", trained_run / "final_model", "--interactive", "--max-new-tokens", "5"),
        stdin="Nederland is\n\n/wat [b]\n/quit\nniet meer\n",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("tokens/s") == 1
    assert done.stdout.count("base model") == 2


def test_benchmark_writes_what_the_design_names(trained_run: Path, tmp_path: Path) -> None:
    done = run_script(
        "inference.py",
        *("--model-path", trained_run / "final_model", "--benchmark", "--json", tmp_path / "f"),
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "f").read_text())
    for batch in ("batch_1", "batch_8"):
        assert figures[batch]["prefill_tokens_per_second"] > 0
        assert figures[batch]["decode_tokens_per_second"] > 0
        assert figures[batch]["ttft_ms"] > 0
        itl = figures[batch]["itl_ms"]
        assert 0 < itl["p50"] <= itl["p95"] <= itl["p99"]
    assert {"memory_bytes", "load_seconds", "bandwidth_share"} < figures.keys()
    assert "less was measured" not in done.stdout


def test_benchmark_of_a_slow_machine_measures_less_and_says_so(trained_run: Path) -> None:
    console = Console(record=True, width=200)
    loaded = load_for_inference(str(trained_run / "final_model"), "auto", "none")
    figures = run_benchmark(loaded, None, "model", console, seconds=0)
    for batch in (figures["batch_1"], figures["batch_8"]):
        assert (batch["prompt_tokens"], batch["repetitions"]) == (64, 1)
        assert batch["decode_tokens_per_second"] > 0
    assert "less was measured than 3 repetitions with 512 prompt tokens" in console.export_text()


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--model-path", "nergens"), ExitCode.NOT_FOUND, "no such model directory"),
        (("--model-path", "/nergens"), ExitCode.NOT_FOUND, "no such model directory"),
        (("--model-path", "docs"), ExitCode.NOT_A_MODEL, "config.json"),
        (("--prompts-file", "nergens"), ExitCode.NOT_FOUND, "no such file"),
        (("--prompts-file", "/dev/null"), ExitCode.BAD_INPUT, "not a regular file"),
        (("--prompt", "a", "--interactive"), ExitCode.NO_EFFECT, "has no effect"),
        (("--json", "x"), ExitCode.NO_EFFECT, "without --benchmark"),
        (("--temperature", "-1"), ExitCode.BAD_OPTION, "--temperature"),
        (
            ("--prompt", "a", "--max-new-tokens", "1", "--output-file", "nergens/x"),
            ExitCode.NOT_WRITABLE,
            "cannot write here",
        ),
        (("--top-p", "0"), ExitCode.BAD_OPTION, "--top-p"),
        (("--max-new-tokens", "veel"), ExitCode.BAD_OPTION, "--max-new-tokens"),
    ],
)
def test_mistakes_get_one_message(
    trained_run: Path, options: tuple[str, ...], code: int, message: str
) -> None:
    model = () if "--model-path" in options else ("--model-path", trained_run / "final_model")
    done = run_script("inference.py", *model, *options)
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ({"stop": ("",)}, ExitCode.BAD_OPTION, "--stop"),
        ({"max_requests": 2}, ExitCode.NO_EFFECT, "without --output-file or --serve"),
        ({"max_context": 2}, ExitCode.NO_EFFECT, "without --interactive or --serve"),
        ({"port": 1}, ExitCode.NO_EFFECT, "without --serve"),
        ({"serve": True, "seed": 1}, ExitCode.NO_EFFECT, "together with --serve"),
        ({"serve": True, "output_file": Path("x")}, ExitCode.NO_EFFECT, "together with --serve"),
        ({"interactive": True, "num_return_sequences": 2}, ExitCode.NO_EFFECT, "--interactive"),
        ({"output_file": ROOT}, ExitCode.NOT_WRITABLE, "something else than a file"),
        ({"benchmark": True, "json": ROOT}, ExitCode.NOT_WRITABLE, "something else than a file"),
    ],
)
def test_impossible_options_are_found_before_anything_else(
    options: dict[str, Any], code: int, message: str
) -> None:
    with pytest.raises(UserError) as found:
        generate(InferenceOptions("nergens", **options), Console(quiet=True))
    assert found.value.exit_code == code
    assert message in str(found.value)


def test_impossible_options_are_told_before_torch_is_imported() -> None:
    code = (
        "import sys\n"
        "from kiem.cli import run\n"
        "from kiem.config import InferenceOptions\n"
        "from kiem.inference.generate import generate\n"
        "run(InferenceOptions, 'inference.py', generate, ['--model-path', 'x', '--json', 'y'])\n"
        "print('torch' in sys.modules)"
    )
    done = run_script("-c", code)
    assert "without --benchmark" in done.stderr
    assert done.stdout == "False\n"


def test_more_memory_than_there_is_is_told(trained_run: Path) -> None:
    sizes = "--serve --port 0 --max-requests 4096 --max-context 1048576"
    command = f"python inference.py --model-path {trained_run / 'final_model'} {sizes}"
    done = run_bash(f"ulimit -v 50000000; {command}", ROOT)
    assert done.returncode == ExitCode.OUT_OF_MEMORY
    assert "there is not enough memory" in done.stderr
    assert "Traceback" not in done.stderr


def test_tokenizer_that_does_not_fit_is_refused(trained_run: Path, tmp_path: Path) -> None:
    folder = trained_run / "final_model"
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    larger = run_script(
        "preprocess.py",
        *("--source", "sample", "--tokenizer", "train:1100", "--chunk-size", "64"),
        *("--output-dir", tmp_path / "data"),
    )
    assert larger.returncode == 0, larger.stderr
    tokenizer = tmp_path / "data" / "chunked_sample" / "tokenizer.json"
    (tmp_path / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    (tmp_path / "manifest.json").unlink()  # which would tell that the file is another one
    done = run_script("inference.py", "--model-path", tmp_path)
    assert done.returncode == ExitCode.TOKENIZER_MISMATCH
    assert "ids up to 1099, the model only 1024 rows" in done.stderr


@pytest.fixture
def old_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU without bf16, as far as questions about it go."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)


@pytest.mark.usefixtures("old_gpu")
def test_bf16_is_refused_where_a_gpu_would_emulate_it(trained_run: Path) -> None:
    with pytest.raises(UserError, match="this GPU has no bf16"):
        load_for_inference(str(trained_run / "final_model"), "bf16")
