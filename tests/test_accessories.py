"""What the weights do not need may fail in any way and at any time: the run comes to its end."""

from __future__ import annotations

import asyncio
import errno
import functools
import io
import json
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, SMALL, run_bash
from rich.console import Console

from kiem.compute.speed import measure_matrix_flops
from kiem.config import TrainingOptions
from kiem.core.errors import ExitCode, UserError
from kiem.core.yaml_options import to_dict
from kiem.parallel import distributed as devices
from kiem.report.page import write_report
from kiem.tokenizer.tokenizer import Tokenizer
from kiem.training import trackers
from kiem.training.loop import train
from kiem.training.validation import check_sample_prompts

NUM_STEPS = 4


class WordlessError(Exception):
    def __str__(self) -> str:
        raise ValueError("neither this")


# Each accessory: what of it fails, and what it is called in the warning.
FAULTS = {
    "kiem.training.loop.warnings_after_update": "the sanity checks",
    "kiem.training.validation.token_cross_entropy": "the evaluation",
    "kiem.training.validation.complete": "the sample of text",
    "kiem.training.validation.prefers_good": "measuring the minimal pairs",
    "kiem.training.outputs.write_report": "the report",
    "kiem.training.outputs.Display.start": "the display",
    "kiem.training.outputs.format_bytes": "the display",
    "kiem.training.outputs.model_card": "the model card",
    "kiem.training.outputs.point_link": "the link to the newest run",
}
ERRORS: dict[str, Callable[[], BaseException]] = {
    "out of memory": lambda: torch.OutOfMemoryError("CUDA out of memory"),
    "out of memory later": lambda: MemoryError(),
    "a mistake of a person": lambda: UserError("nee", fix="x", exit_code=ExitCode.NOT_FINITE),
    "the terminal is gone": lambda: OSError(errno.EIO, "Input/output error"),
    "markup": lambda: ValueError("[/b] is [no] markup"),
    "a library's end": lambda: SystemExit(1),
    "a cancelled task": asyncio.CancelledError,
    "no UTF-8": lambda: FileNotFoundError(errno.ENOENT, "No such file", "caf\udce9"),
    "no words": lambda: WordlessError(),
}
# A tracker that fails where it is told to: at its import, its beginning, a call of log, its end.
TRACKER = """
import json, pathlib, time
log = pathlib.Path({log!r})
calls = []
def note(name):
    calls.append(name)
    log.write_text(json.dumps(calls))
    if (name, calls.count(name)) == {fails_at!r}:
        {failure}
class Table:
    def __init__(self, *args, **kwargs): note("table")
class Run:
    summary = {{}}
    def log(self, figures, step): note("log")
    def finish(self, exit_code=0): note("finish")
def init(*args, **kwargs):
    note("init")
    return Run()
note("import")
"""


def options(chunks: Path, output: Path, **more: Any) -> TrainingOptions:
    given: dict[str, Any] = {
        **{"dataset_path": (chunks,), "output_dir": output, "run_name": "run"},
        **{"model": "gemma3-micro", "precision": "fp32", "compile": "never", "eval_chunks": 2},
        **{"max_steps": NUM_STEPS, "batch_size": 2, "gradient_accumulation_steps": 1},
        **{"eval_steps": 1, "save_steps": 2, "minimal_pairs": "never"},
        "sample_prompt": ("Er was eens",),
    }
    return TrainingOptions(**{**given, **more})


def quiet() -> Console:
    return Console(file=io.StringIO(), width=1000)


def weights(output: Path) -> bytes:
    return (output / "run" / "final_model" / "model.safetensors").read_bytes()


def lines(output: Path) -> list[dict[str, Any]]:
    text = (output / "run" / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.rstrip("\n").split("\n")]


def warnings(output: Path) -> list[str]:
    return [line["warning"] for line in lines(output) if "the run goes on" in str(line)]


def losses(output: Path) -> list[float]:
    return [line["loss"] for line in lines(output) if "loss" in line]


@pytest.fixture(scope="module", autouse=True)
def measured_once() -> Iterator[None]:
    """The speed of matrix products is measured for the first training alone."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(devices, "measure_matrix_flops", functools.cache(measure_matrix_flops))
        yield


@pytest.fixture(scope="module")
def undisturbed(sample_chunks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed")
    train(options(sample_chunks, output), quiet())
    return output


@pytest.fixture
def is_undisturbed(undisturbed: Path) -> Callable[[Path], None]:
    def check(output: Path) -> None:
        assert weights(output) == weights(undisturbed)
        assert losses(output) == losses(undisturbed)
        assert len(losses(output)) == NUM_STEPS
        assert {p.name for p in (output / "run" / "checkpoints").iterdir()} == {"step-2", "step-4"}

    return check


def fail_from(
    monkeypatch: pytest.MonkeyPatch, place: str, call: int, make: Callable[[], BaseException]
) -> None:
    """Makes a function fail from its call number `call` on, from 0."""
    module, _, name = place.rpartition(".")
    owner: Any = sys.modules.get(module)
    if owner is None:
        outer, _, inner = module.rpartition(".")
        owner = getattr(sys.modules[outer], inner)
    true, num_calls = getattr(owner, name), [0]

    def fails(*arguments: Any, **named: Any) -> Any:
        num_calls[0] += 1
        if num_calls[0] > call:
            raise make()
        return true(*arguments, **named)

    monkeypatch.setattr(owner, name, fails)


@pytest.mark.parametrize(("error", "call"), [(e, n % 2) for n, e in enumerate(ERRORS)])
def test_everything_fails_and_the_model_is_the_same(
    error: str,
    call: int,
    sample_chunks: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    is_undisturbed: Callable[[Path], None],
) -> None:
    """From the first call of each accessory on, or from the second one; each warns once."""
    for place in FAULTS:
        fail_from(monkeypatch, place, call, ERRORS[error])
    console = quiet()
    pairs = "always" if call == 0 else "never"  # which takes long when it succeeds
    train(options(sample_chunks, tmp_path, minimal_pairs=pairs), console)
    is_undisturbed(tmp_path)
    found = [message.split(" failed (")[0] for message in warnings(tmp_path)]
    assert len(found) == len(set(found))
    if call == 0:
        assert set(FAULTS.values()) < set(found), found
        assert not (tmp_path / "run" / "final_model" / "README.md").exists()
        assert not [line for line in lines(tmp_path) if "test_loss" in line]
    else:  # what is done more than once
        card = (tmp_path / "run" / "final_model" / "README.md").read_text()
        assert "Its evaluation failed." in card
        assert {"the evaluation", "the sample of text", "the display", "the sanity checks"} < set(
            found
        )
    summary = json.loads((tmp_path / "run" / "final_model" / "training_summary.json").read_text())
    assert summary["steps"] == NUM_STEPS
    monkeypatch.undo()
    write_report([tmp_path / "run"], tmp_path / "report.html")  # of what there is
    said = console.file.getvalue()  # type: ignore[attr-defined]
    for message in warnings(tmp_path):
        assert message in said.replace("\n", " ") or error == "markup"


def test_what_stands_in_the_way_on_the_disk(
    sample_chunks: Path, tmp_path: Path, is_undisturbed: Callable[[Path], None]
) -> None:
    """Folders where the link and the report go, and lines in the log that are none."""
    link = tmp_path / "gemma3-micro-dutch-latest"
    (link / "mine").mkdir(parents=True)
    (tmp_path / "run" / "report.html" / "mine").mkdir(parents=True)
    odd = ["[" * 100_000, '{"step": 1, "samples": 3}', '{"step": "1"}', "null", '{"step": 0}', "\0"]
    (tmp_path / "run" / "metrics.jsonl").write_text("\n".join(odd))
    train(options(sample_chunks, tmp_path), quiet())
    is_undisturbed(tmp_path)
    assert (link / "mine").is_dir()
    assert (tmp_path / "run" / "report.html" / "mine").is_dir()
    assert any("the report at the end failed" in message for message in warnings(tmp_path))


def test_a_log_that_cannot_be_opened_is_refused_before_the_work(
    sample_chunks: Path, tmp_path: Path
) -> None:
    (tmp_path / "run" / "metrics.jsonl").mkdir(parents=True)
    with pytest.raises(UserError, match="cannot be read"):
        train(options(sample_chunks, tmp_path), quiet())


class Gone(io.StringIO):
    """A terminal whose other end is gone."""

    def write(self, _: str) -> int:
        raise OSError(errno.EIO, "Input/output error")


def test_a_terminal_that_is_gone(
    sample_chunks: Path, tmp_path: Path, is_undisturbed: Callable[[Path], None]
) -> None:
    train(options(sample_chunks, tmp_path), Console(file=Gone(), force_terminal=True))
    is_undisturbed(tmp_path)


def install(
    name: str,
    fails_at: tuple[str, int] | None,
    failure: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """Puts a tracker of that name first on the path; returns where it notes its calls."""
    log = folder / "calls.json"
    (folder / "modules").mkdir(parents=True)
    code = TRACKER.format(log=str(log), fails_at=fails_at, failure=failure)
    (folder / "modules" / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(str(folder / "modules"))
    for module in [m for m in sys.modules if m == name or m.startswith(f"{name}.")]:
        monkeypatch.delitem(sys.modules, module)
    return log


@pytest.mark.parametrize(
    ("name", "place", "failure", "message"),
    [
        ("wandb", "import", "raise ImportError", "needs wandb, which is not installed"),
        ("wandb", "import", "raise SystemExit('nee')", "SystemExit: nee"),
        ("wandb", "init", "raise MemoryError", "does not work here .MemoryError"),
        ("trackio", "import", "1/0", "ZeroDivisionError: division by zero"),
        ("trackio", "init", "raise RuntimeError('nee')", "RuntimeError: nee"),
    ],
)
def test_a_tracker_that_does_not_start_is_an_error_before_the_work(
    name: str,
    place: str,
    failure: str,
    message: str,
    sample_chunks: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(name, (place, 1), failure, tmp_path, monkeypatch)
    with pytest.raises(UserError, match=message) as caught:
        train(options(sample_chunks, tmp_path, trackers=(name,)), quiet())
    assert name in str(caught.value.where)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_tracker_that_does_not_start_again_is_a_warning(
    sample_chunks: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    is_undisturbed: Callable[[Path], None],
) -> None:
    """When torchrun has started the run again, nobody is there to mend it."""
    install("wandb", ("init", 1), "raise RuntimeError('nee')", tmp_path, monkeypatch)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    train(options(sample_chunks, tmp_path, trackers=("wandb",)), quiet())
    is_undisturbed(tmp_path)
    assert [message.split(" failed (")[0] for message in warnings(tmp_path)] == ["wandb"]


@pytest.mark.parametrize(
    "failing",
    [
        {"wandb": (("log", 1), "raise RuntimeError('nee')"), "trackio": (("finish", 1), "1/0")},
        {"wandb": (("log", 3), "raise SystemExit"), "trackio": (("log", 2), "1/0")},
        {"wandb": (("table", 2), "raise MemoryError"), "trackio": (("log", 2), "time.sleep(999)")},
        {"wandb": (("finish", 1), "time.sleep(999)"), "trackio": (("table", 1), "raise OSError")},
        {"wandb": (("log", 1), "raise KeyboardInterrupt"), "trackio": (None, "")},
        {"wandb": (None, ""), "trackio": (None, "")},
    ],
)
def test_a_tracker_that_fails_later_is_a_warning(
    failing: dict[str, tuple[tuple[str, int] | None, str]],
    sample_chunks: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    is_undisturbed: Callable[[Path], None],
) -> None:
    """Whatever the one does, it is told, and the other and the run go on."""
    logs = {}
    for name, (fails_at, failure) in failing.items():
        logs[name] = install(name, fails_at, failure or "pass", tmp_path / name, monkeypatch)
        if "sleep" in failure:
            monkeypatch.setattr(trackers, "FINISH_SECONDS", 2.0)
    train(options(sample_chunks, tmp_path, trackers=tuple(failing)), quiet())
    is_undisturbed(tmp_path)
    warned = sorted(message.split(" failed (")[0] for message in warnings(tmp_path))
    assert warned == sorted(name for name, (fails_at, _) in failing.items() if fails_at)
    for name, (fails_at, _) in failing.items():
        calls = json.loads(logs[name].read_text())
        if fails_at is None:
            assert calls[-1] == "finish"
            assert calls.count("log") >= 2 * NUM_STEPS
        else:
            assert (calls[-1], calls.count(calls[-1])) == fails_at, "it was called again"


def test_tensorboard_that_fails_later_is_a_warning(
    sample_chunks: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    is_undisturbed: Callable[[Path], None],
) -> None:
    import torch.utils.tensorboard  # noqa: F401 - to be changed

    fail_from(monkeypatch, "torch.utils.tensorboard.SummaryWriter.add_scalar", 5, MemoryError)
    train(options(sample_chunks, tmp_path, trackers=("tensorboard",)), quiet())
    is_undisturbed(tmp_path)
    assert [message.split()[0] for message in warnings(tmp_path)] == ["tensorboard"]


@pytest.mark.parametrize(
    ("prompt", "wrong"),
    [
        ("", None),
        ("<eos><bos>", None),
        ("\0\n\t \u2028", None),
        ("😀 漢字 e\u0301", None),
        ("x" * 150, None),
        ("x " * 300, "tokens; the model reads at most 215"),
        ("caf\udce9", "does not work here"),
    ],
)
def test_prompts_are_tried_before_the_work(
    prompt: str, wrong: str | None, trained: Tokenizer, tmp_path: Path
) -> None:
    given = options(tmp_path, tmp_path, sample_prompt=("Nederland", prompt))
    config = SMALL.__class__(**{**vars(SMALL), "vocab_size": trained.num_rows})
    if wrong is None:
        check_sample_prompts(given, trained, config)
        return
    with pytest.raises(UserError, match=wrong) as caught:
        check_sample_prompts(given, trained, config)
    assert caught.value.where == "--sample-prompt, text 2"
    assert caught.value.exit_code == ExitCode.BAD_OPTION


def test_every_possible_prompt_has_a_sample(sample_chunks: Path, tmp_path: Path) -> None:
    prompts = ("", "<eos><bos>", "\0\n\t \u2028", "😀 漢字 e\u0301", "[/b] [red]", "x" * 500)
    train(options(sample_chunks, tmp_path, max_steps=1, sample_prompt=prompts), quiet())
    assert [sample["prompt"] for sample in lines(tmp_path)[-1]["samples"]] == [*prompts]
    assert warnings(tmp_path) == []


def test_nobody_reads_the_output(
    sample_chunks: Path, tmp_path: Path, is_undisturbed: Callable[[Path], None]
) -> None:
    """`training.py | true`: the training goes on, and its exit code is that of a training."""
    given = to_dict(options(sample_chunks, tmp_path))
    known = to_dict(TrainingOptions((sample_chunks,)))
    words = ["python", "training.py", "--dataset-path", str(sample_chunks)]
    for name, value in given.items():
        if value != known.get(name):
            values = value if isinstance(value, list) else [value]
            words += [f"--{name.replace('_', '-')}", *map(str, values)]
    done = run_bash(f"set -o pipefail; {shlex.join(words)} | true", ROOT)
    assert done.returncode == 0, done.stderr
    is_undisturbed(tmp_path)
