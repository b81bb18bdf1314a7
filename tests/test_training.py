"""Training: the same result however it is cut up, and a model that others can load."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, run_script
from datasets import load_from_disk
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoTokenizer, Gemma3ForCausalLM

from kiem.config import TrainingOptions
from kiem.core.errors import ExitCode, UserError
from kiem.inference.loading import load_for_inference
from kiem.model.config import preset
from kiem.optim.optimizer import learning_rate_share
from kiem.parallel.distributed import Distributed
from kiem.planning.memory_estimate import setting_of
from kiem.planning.recipe import resolve_recipe
from kiem.training.resume import check_same_run

# In fp32, since these tests compare the same sums in another order.
QUICK = ("--eval-steps", "0", "--save-steps", "0", "--max-steps", "4", "--precision", "fp32")
MICRO = ("--model", "gemma3-micro", *QUICK)
SMALL_BATCH = ("--batch-size", "4", "--gradient-accumulation-steps", "1")


def train(chunks: Path, folder: Path, *options: str, launcher: tuple[str, ...] = ()) -> Path:
    """Trains and returns the run directory."""
    command = [*launcher, "training.py", "--dataset-path", chunks, "--output-dir", folder]
    done = run_script(*command, "--run-name", "run", *options)
    assert done.returncode == 0, done.stderr
    return folder / "run"


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in metrics(run) if "loss" in line]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "final_model" / "model.safetensors")


def torchrun(processes: int) -> tuple[str, ...]:
    return ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}")


def test_run_directory_holds_what_it_should(trained_run: Path) -> None:
    config = yaml.safe_load((trained_run / "config.yaml").read_text())
    assert config["max_steps"] == 12
    lines = metrics(trained_run)
    updates = [line for line in lines if "loss" in line]
    assert [line["step"] for line in updates] == list(range(1, 13))
    assert updates[-1]["tokens"] == 12 * 8 * 64
    for name in (
        "learning_rate",
        "grad_norm",
        "tokens_per_second",
        "mfu",
        "memory_bytes",
        "seconds",
    ):
        assert all(line[name] > 0 for line in updates), name
    evaluations = [line for line in lines if "test_loss" in line]
    assert [line["step"] for line in evaluations] == [6, 12]
    assert evaluations[1]["test_loss"] < evaluations[0]["test_loss"] < math.log(1024)
    first = evaluations[0]["samples"][0]
    assert first["prompt"] == "Nederland is"
    assert len(first["text"]) > 0
    # Checkpoints at 4, 8 and 12, of which two are kept.
    assert sorted(p.name for p in (trained_run / "checkpoints").iterdir()) == ["step-12", "step-8"]
    latest = trained_run.parent / "gemma3-micro-dutch-latest"
    assert latest.readlink() == Path("short")


def test_final_model_equals_transformers(trained_run: Path) -> None:
    folder = trained_run / "final_model"
    reference = Gemma3ForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    own = load_for_inference(str(folder), "auto")
    ids = tokenizer("Nederland is een land", return_tensors="pt")["input_ids"]
    assert ids[0].tolist() == [own.tokenizer.bos_id, *own.tokenizer.encode("Nederland is een land")]
    with torch.no_grad():
        expected = reference(ids).logits
        found = own.model.logits(own.model.hidden_states(ids))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert reference.generation_config.eos_token_id == 1
    summary = json.loads((folder / "training_summary.json").read_text())
    assert summary["steps"] == 12
    assert summary["parameters"] == reference.num_parameters()
    card = (folder / "README.md").read_text()
    assert f"{reference.num_parameters():,} parameters" in card
    assert f"{summary['test_bpb']:.4f}" in card


def test_minimal_pairs_disturb_nothing(sample_chunks: Path, tmp_path: Path) -> None:
    """The same figures as evaluate.py's, once in the summary and once in the log; the same weights,
    test loss and sample of text as without them."""
    options = (*MICRO, *SMALL_BATCH)
    always = ("--minimal-pairs", "always")
    with_pairs = train(sample_chunks, tmp_path / "with", *options, *always)
    without = train(sample_chunks, tmp_path / "without", *options)  # too few tokens for them
    for name, weight in weights(with_pairs).items():
        assert torch.equal(weight, weights(without)[name])
    last, last_without = metrics(with_pairs)[-1], metrics(without)[-1]
    found = last.pop("minimal_pairs")
    for name in ("test_loss", "test_bpb", "samples"):
        assert last[name] == last_without[name]
    assert "minimal_pairs" not in last_without
    summary = json.loads((with_pairs / "final_model" / "training_summary.json").read_text())
    assert summary["minimal_pairs"] == found
    model = ("--model-path", with_pairs / "final_model", "--json", tmp_path / "out.json")
    assert run_script("evaluate.py", *model).returncode == 0
    assert json.loads((tmp_path / "out.json").read_text())["minimal_pairs"] == found
    card = (with_pairs / "final_model" / "README.md").read_text()
    assert f"of {found['pairs']} (95 %" in card


@pytest.mark.slow
def test_two_processes_measure_all_minimal_pairs(sample_chunks: Path, tmp_path: Path) -> None:
    options = (*MICRO, *SMALL_BATCH, "--minimal-pairs", "always")
    one = train(sample_chunks, tmp_path / "one", *options)
    two = train(sample_chunks, tmp_path / "two", *options, launcher=torchrun(2))
    found = [metrics(run)[-1]["minimal_pairs"]["pairs"] for run in (one, two)]
    assert found[0] == found[1] > 0


def test_evaluation_equals_transformers(trained_run: Path, sample_chunks: Path) -> None:
    """Test loss and bits per byte by hand: one document a row, as transformers sees it."""
    summary = json.loads((trained_run / "final_model" / "training_summary.json").read_text())
    counts = json.loads((sample_chunks / "manifest.json").read_text())["splits"]["test"]
    reference = Gemma3ForCausalLM.from_pretrained(trained_run / "final_model")
    assert counts["documents"] == 1  # so no two documents share a chunk
    nats, num_tokens = 0.0, 0
    for row in load_from_disk(str(sample_chunks))["test"]["input_ids"]:
        ids = torch.tensor([[token for token in row if token != 0]])
        if ids.shape[1] > 1:
            with torch.no_grad():
                nats += float(reference(ids, labels=ids).loss) * (ids.shape[1] - 1)
            num_tokens += ids.shape[1] - 1
    assert summary["test_loss"] == pytest.approx(nats / num_tokens, abs=1e-4)
    bits = nats / num_tokens * (counts["tokens"] - 1) / math.log(2)
    assert summary["test_bpb"] == pytest.approx(bits / counts["bytes"], abs=1e-4)


def test_passes_and_processes_do_not_change_the_result(sample_chunks: Path, tmp_path: Path) -> None:
    # Muon multiplies in bf16, where noise of fp32 becomes larger; test_devices.py has it too.
    options = (*MICRO, "--optimizer", "adamw", "--learning-rate", "4e-3")
    cut = ("--batch-size", "8", "--gradient-accumulation-steps", "1")
    whole = train(sample_chunks, tmp_path / "a", *options, *cut)
    cut = ("--batch-size", "2", "--gradient-accumulation-steps", "4")
    parts = train(sample_chunks, tmp_path / "b", *options, *cut)
    cut = ("--batch-size", "2", "--gradient-accumulation-steps", "2")
    ranks = train(sample_chunks, tmp_path / "c", *options, *cut, launcher=torchrun(2))
    assert losses(parts) == pytest.approx(losses(whole), abs=1e-5)
    assert losses(ranks) == pytest.approx(losses(whole), abs=1e-5)
    tests = [metrics(run)[-1]["test_loss"] for run in (whole, parts, ranks)]
    assert tests == pytest.approx([tests[0]] * 3, abs=1e-5)


def test_accelerate_launch_gives_the_same(sample_chunks: Path, tmp_path: Path) -> None:
    plain = train(sample_chunks, tmp_path / "a", *MICRO, *SMALL_BATCH)
    launcher = ("-m", "accelerate.commands.launch", "--num_processes=1", "--cpu")
    launched = train(sample_chunks, tmp_path / "b", *MICRO, *SMALL_BATCH, launcher=launcher)
    assert losses(launched) == losses(plain)


@pytest.mark.parametrize("optimizer", [pytest.param("adamw", marks=pytest.mark.slow), "muon"])
def test_resumed_run_equals_an_undisturbed_one(
    optimizer: str, sample_chunks: Path, tmp_path: Path
) -> None:
    """Also in the batch's warm-up, which it keeps without the option."""
    options = ("--model", "gemma3-micro", "--eval-steps", "3", "--save-steps", "2")
    options = (*options, "--batch-size", "1", "--gradient-accumulation-steps", "4")
    options = (*options, "--optimizer", optimizer, "--max-steps", "6")
    warmup = ("--batch-warmup-steps", "4")
    whole = train(sample_chunks, tmp_path / "a", *options, *warmup)
    tokens = [line["tokens"] for line in metrics(whole) if "loss" in line]
    assert tokens == [64 * num_chunks for num_chunks in (1, 2, 4, 6, 10, 14)]
    # Stop a twin in the middle: kill it as soon as its first checkpoint is there.
    command = [sys.executable, "training.py", "--dataset-path", sample_chunks, *options]
    command += [*warmup, "--output-dir", tmp_path / "b", "--run-name", "run"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
    while process.poll() is None and not (tmp_path / "b/run/checkpoints/step-2").exists():
        pass
    process.kill()
    process.communicate()
    assert not (tmp_path / "b" / "run" / "final_model").exists()
    resumed = train(sample_chunks, tmp_path / "b", *options)
    assert losses(resumed) == losses(whole)
    for name, tensor in weights(whole).items():
        assert torch.equal(weights(resumed)[name], tensor), name
    expected = [line["step"] for line in metrics(whole)]
    assert [line["step"] for line in metrics(resumed)] == expected


def test_evaluations_do_not_disturb_the_training(sample_chunks: Path, tmp_path: Path) -> None:
    options = ("--model", "gemma3-micro", "--save-steps", "0", "--max-steps", "4", *SMALL_BATCH)
    looked_at = train(sample_chunks, tmp_path / "a", *options, "--eval-steps", "1")
    left_alone = train(sample_chunks, tmp_path / "b", *options, "--eval-steps", "0")
    assert len([line for line in metrics(looked_at) if "test_loss" in line]) == 4
    assert losses(looked_at) == losses(left_alone)
    for name, tensor in weights(left_alone).items():
        assert torch.equal(weights(looked_at)[name], tensor), name


def test_training_can_go_on_from_a_model(
    trained_run: Path, sample_chunks: Path, tmp_path: Path
) -> None:
    options = ("--init-from", str(trained_run / "final_model"), *QUICK, *SMALL_BATCH)
    run = train(sample_chunks, tmp_path, *options)
    assert losses(run)[0] < losses(trained_run)[0] - 0.3
    assert json.loads((run / "final_model" / "training_summary.json").read_text())[
        "initialized_from"
    ] == str(trained_run / "final_model")


def test_a_long_evaluation_at_the_end_has_a_checkpoint_before_it(
    sample_chunks: Path, tmp_path: Path
) -> None:
    """One that takes as many tokens as the training did: a kill in it must not cost the run."""
    num_test = json.loads((sample_chunks / "manifest.json").read_text())["splits"]["test"]["chunks"]
    options = ("--model", "gemma3-micro", "--max-steps", "1", "--eval-steps", "0")
    for num_chunks, expected in ((num_test - 1, ["step-1"]), (num_test, [])):
        size = ("--batch-size", str(num_chunks), "--gradient-accumulation-steps", "1")
        run = train(sample_chunks, tmp_path / str(num_chunks), *options, *size)
        assert [path.name for path in run.glob("checkpoints/*")] == expected


def test_minutes_end_the_run(sample_chunks: Path, tmp_path: Path) -> None:
    run = train(sample_chunks, tmp_path, *MICRO[:2], "--max-minutes", "0.05", *SMALL_BATCH)
    lines = [line for line in metrics(run) if "loss" in line]
    assert all(line["seconds"] < 3 for line in lines[:-1])
    assert lines[-1]["seconds"] >= 3
    assert lines[-1]["learning_rate"] < max(line["learning_rate"] for line in lines) / 2


def test_checkpoints_of_earlier_versions_suit_runs_without_small_updates() -> None:
    state = {"fingerprint": {"seed": 1}, "changeable": {}}
    check_same_run(Path(), state, {"seed": 1, "batch_warmup_steps": 0}, {}, Console())
    with pytest.raises(UserError, match="batch_warmup_steps was 0, is 8"):
        check_same_run(Path(), state, {"seed": 1, "batch_warmup_steps": 8}, {}, Console())


def test_config_file_gives_options_and_the_command_line_goes_first(
    trained_run: Path, tmp_path: Path
) -> None:
    done = run_script(
        "training.py",
        *("--config", trained_run / "config.yaml", "--max-steps", "2"),
        *("--output-dir", tmp_path, "--run-name", "again"),
    )
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "again")[0] == losses(trained_run)[0]
    assert len(losses(tmp_path / "again")) == 2
    config = yaml.safe_load((tmp_path / "again" / "config.yaml").read_text())
    assert (config["max_steps"], config["batch_size"]) == (2, 4)


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--dataset-path", "nergens"), ExitCode.NOT_FOUND, "no such chunk directory"),
        (("--dataset-path", "docs"), ExitCode.BAD_INPUT, "not a chunk directory"),
        (("--wandb-project", "x"), ExitCode.NO_EFFECT, "without --use-wandb"),
        (("--epochs", "2", "--max-steps", "3"), ExitCode.NO_EFFECT, "--epochs: has no effect"),
        (("--batch-size", "0"), ExitCode.BAD_OPTION, "--batch-size"),
        (("--warmup-ratio", "1"), ExitCode.BAD_OPTION, "below 1"),
        (("--run-name", "a/b"), ExitCode.BAD_OPTION, "cannot be a folder name"),
        (("--init-from", "docs"), ExitCode.NOT_A_MODEL, "config.json"),
        (("--init-from", "nergens"), ExitCode.NOT_FOUND, "no such model directory"),
        (("--init-from", "/nergens"), ExitCode.NOT_FOUND, "no such model directory"),
        (("--config", "nergens.yaml"), ExitCode.BAD_OPTION, "cannot be read"),
        (("--model", "gpt2"), ExitCode.BAD_OPTION, "gemma3-nano"),
        (("--output-dir", "/proc/nee"), None, "error: "),
    ],
)
def test_mistakes_get_one_message(
    sample_chunks: Path, tmp_path: Path, options: tuple[str, ...], code: int | None, message: str
) -> None:
    defaults = {"--dataset-path": str(sample_chunks), "--model": "gemma3-micro"}
    defaults["--output-dir"] = str(tmp_path)
    if "--init-from" in options:
        del defaults["--model"]
    words = [w for name, value in defaults.items() if name not in options for w in (name, value)]
    done = run_script("training.py", *words, *options)
    assert done.returncode == code if code else done.returncode not in (0, 1)
    assert message in done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_finished_or_foreign_runs_are_not_touched(
    trained_run: Path, sample_chunks: Path, tmp_path: Path
) -> None:
    common = ("training.py", "--dataset-path", sample_chunks, "--model", "gemma3-micro")
    done = run_script(*common, "--output-dir", trained_run.parent, "--run-name", "short")
    assert done.returncode == ExitCode.ALREADY_EXISTS
    assert "this run is finished" in done.stderr
    other = (*common, *QUICK, "--output-dir", tmp_path, "--batch-size", "2")
    done = run_script(*other, "--resume", trained_run / "checkpoints" / "step-8")
    assert done.returncode == ExitCode.ALREADY_EXISTS
    assert "chunks_per_step was 8" in done.stderr


def test_damaged_checkpoint_is_named(
    trained_run: Path, sample_chunks: Path, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "step-8"
    shutil.copytree(trained_run / "checkpoints" / "step-8", checkpoint)
    data = bytearray((checkpoint / "optimizer-00001-of-00001.safetensors").read_bytes())
    data[-1] ^= 4
    (checkpoint / "optimizer-00001-of-00001.safetensors").write_bytes(data)
    done = run_script(
        "training.py",
        *("--dataset-path", sample_chunks, "--model", "gemma3-micro", "--max-steps", "12"),
        *("--output-dir", tmp_path, "--resume", checkpoint),
        *("--batch-size", "4", "--gradient-accumulation-steps", "2"),
    )
    assert done.returncode == ExitCode.DAMAGED
    assert "optimizer-00001-of-00001.safetensors: damaged" in done.stderr


def test_schedules() -> None:
    assert learning_rate_share(0.025, 0.05, "linear") == pytest.approx(0.5)
    assert learning_rate_share(0.05, 0.05, "linear") == 1
    assert learning_rate_share(0.525, 0.05, "linear") == pytest.approx(0.5)
    assert learning_rate_share(0.525, 0.05, "cosine") == pytest.approx(0.55)
    assert learning_rate_share(1.0, 0.0, "cosine") == pytest.approx(0.1)
    assert learning_rate_share(0.79, 0.05, "wsd") == 1
    assert learning_rate_share(0.9, 0.05, "wsd") == pytest.approx(0.5)


def test_settled_recipe_keeps_the_usual_tokens_per_step() -> None:
    options = TrainingOptions(dataset_path=(Path("x"),))
    config = preset("gemma3-1b", 262_144)
    for world_size in (1, 2, 4, 8):
        distributed = Distributed(0, world_size, torch.device("cpu"), "bf16", 1e12)
        setting = setting_of(config, options, distributed, 1024)
        recipe = resolve_recipe(options, setting, 10_000_000, 10**11)
        assert recipe.chunks_per_step * 1024 == 262_144
        assert recipe.max_steps == math.ceil(10_000_000 / 256)
    small = resolve_recipe(options, replace(setting, world_size=4), 20, 10**11)
    assert (small.chunks_per_step, small.max_steps) == (4, 5)


def test_runs_by_time_begin_with_small_updates() -> None:
    """Where nothing says otherwise, and a quarter of an update can be divided over the devices."""
    chosen = TrainingOptions(dataset_path=(Path("x"),), model="gemma3-nano", max_minutes=10)

    def recipe(options: TrainingOptions, world_size: int = 1) -> tuple[int, int, int]:
        distributed = Distributed(0, world_size, torch.device("cpu"), "fp32", 1e12)
        config = preset(options.model, 16_384)
        setting = setting_of(config, options, distributed, 512)
        recipe = resolve_recipe(options, setting, 10_000, 10**11)
        return recipe.batch_warmup_steps, recipe.batch_size, recipe.accumulation

    assert recipe(chosen) == (400, 2, 4)
    assert recipe(chosen, world_size=2) == (400, 1, 4)
    assert recipe(chosen, world_size=4) == (0, 2, 1)
    assert recipe(replace(chosen, batch_warmup_steps=0)) == (0, 8, 1)
    assert recipe(replace(chosen, batch_warmup_steps=10, batch_size=3)) == (10, 3, 4)
    for other in ({"max_steps": 9}, {"max_minutes": None}, {"batch_size": 8}):
        assert recipe(replace(chosen, **other))[0] == 0
    for model in ("gemma3-micro", "gemma3-270m"):  # have small ones anyway, or have not been tried
        assert recipe(replace(chosen, model=model))[0] == 0


def test_an_epoch_is_as_long_with_small_updates() -> None:
    options = TrainingOptions(dataset_path=(Path("x"),), model="gemma3-nano", batch_warmup_steps=60)
    distributed = Distributed(0, 1, torch.device("cpu"), "fp32", 1e12)
    setting = setting_of(preset(options.model, 16_384), options, distributed, 512)
    lengths = {8000: 60 + math.ceil((8000 - 30 * 2 - 30 * 4) / 8)}
    lengths |= {100: 60 + math.ceil((100 - 30 * 1 - 30 * 2) / 4), 20: 20}  # of 4 chunks at most
    for num_chunks, num_steps in lengths.items():
        assert resolve_recipe(options, setting, num_chunks, 10**11).max_steps == num_steps
