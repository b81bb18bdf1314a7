"""Ladders: laws recover known constants, and a ladder goes on where it stopped."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from conftest import ROOT, run_script

from kiem.config import TrainingOptions
from kiem.core.console import PlainConsole
from kiem.core.errors import ExitCode, UserError
from kiem.ladder.order import Place, Trial, default_lengths, next_trial
from kiem.model.config import preset
from kiem.planning.forecast import check_law, fit_law
from kiem.planning.ladder_runs import (
    LadderRun,
    Rung,
    built_in_runs,
    read_runs,
    rungs_of,
    runs_like_the_last,
)
from kiem.planning.print_forecast import Budget, find_ladder, print_forecast
from kiem.planning.time_estimate import flops_per_token
from kiem.planning.transfer import check_rates, fit_rates

MODELS = ("gemma3-0.358m", "gemma3-micro", "gemma3-3.21m", "gemma3-nano", "gemma3-11.9m")
LENGTHS = (262_144, 524_288, 1_048_576, 2_097_152)
TRIAL = LadderRun(
    *("gemma3-micro", 1_427_000, 8192, 262_144, 4096, 0.01, 2.0, 60.0, 65.0),
    *(1, "data", "text", "cpu", "2026-11-30"),
)


def truth(size: float, tokens: float, irreducible: float = 0.75) -> float:
    """Returns bits per byte at the best rate."""
    return irreducible + 0.45 * (size / 1e6) ** -0.3 + 0.8 * (tokens / 1e6) ** -0.37


def best_rate(size: float, tokens: float) -> float:
    return 0.012 * (size / 1e6) ** -0.2 * (tokens / 1e6) ** 0.1


def made_up(noise: float, seed: int, irreducible: float = 0.75) -> Iterator[LadderRun]:
    """Yields the runs of a triangle of sizes and lengths, with three rates each."""
    random = np.random.default_rng(seed)
    for model in MODELS:
        size = preset(model, 1).num_layer_parameters()
        for tokens in LENGTHS:
            if size * tokens > 8e12:
                continue
            for factor in (0.5, 1.0, 2.0):
                rate = factor * best_rate(size, tokens) * math.exp(0.1 * random.standard_normal())
                from_best = math.log(rate / best_rate(size, tokens))
                bpb = truth(size, tokens, irreducible) + 0.03 * from_best**2
                yield msgspec.structs.replace(
                    TRIAL,
                    model=model,
                    num_layer_parameters=size,
                    tokens=tokens,
                    learning_rate=rate,
                    bpb=bpb * math.exp(noise * random.standard_normal()),
                )


def write(path: Path, runs: list[LadderRun]) -> Path:
    path.write_bytes(b"".join(msgspec.json.encode(run) + b"\n" for run in runs))
    return path


def test_forecasts_contain_what_is_true() -> None:
    """Of 95 % intervals some may miss; most of these are extrapolated by a factor of 100."""
    hits = [
        forecast.low <= truth(size, tokens, irreducible) <= forecast.high
        for seed, irreducible in enumerate((0.5, 0.6, 0.7, 0.75, 0.8, 0.9, 1.0, 1.1))
        if (law := fit_law(rungs_of(made_up(0.004, seed, irreducible))))
        for size, tokens in ((6e6, 2e6), (20e6, 8e6), (100e6, 2e9), (700e6, 14e9))
        for forecast in [law.forecast(size, tokens)]
    ]
    assert len(hits) == 32
    assert sum(hits) >= 29


def test_a_forecast_near_the_ladder_is_close_and_one_far_away_says_that_it_is_not() -> None:
    law = fit_law(rungs_of(made_up(0.004, 1)))
    assert law is not None
    near, far = law.forecast(12e6, 2e6), law.forecast(700e6, 14e9)
    assert near.bpb == pytest.approx(truth(12e6, 2e6), rel=0.02)
    assert near.high - near.low < 0.1 < far.high - far.low


def test_the_largest_size_is_left_out_to_check() -> None:
    rungs = rungs_of(made_up(0.004, 2))
    check = check_law(rungs)
    assert check is not None
    assert check.rung is rungs[-1]
    assert check.holds
    # A largest size that breaks the law is noticed.
    worse = replace(rungs[-1], runs=(msgspec.structs.replace(rungs[-1].runs[0], bpb=3.0),))
    check = check_law([*rungs[:-1], worse])
    assert check is not None
    assert not check.holds


def test_rates_are_recovered_and_checked() -> None:
    rungs = rungs_of(made_up(0.0005, 3))
    law = fit_rates(rungs)
    assert law is not None
    assert law.num_runs > 30
    assert abs(law.size_power + 0.2) < 2 * law.size_error + 0.01
    assert abs(law.token_power - 0.1) < 2 * law.token_error + 0.01
    check = check_rates(rungs)
    assert check is not None
    assert check.rung.num_layer_parameters == rungs[-1].num_layer_parameters
    assert check.predicted == pytest.approx(check.found, rel=0.15)
    assert 0 <= check.lost_bpb < 0.001


def test_few_rungs_tell_nothing() -> None:
    rungs = rungs_of(made_up(0.004, 4))
    one_size = [rung for rung in rungs if rung.runs[0].model == "gemma3-micro"]
    for few in ([], rungs[:3], one_size):
        assert fit_law(few) is None
        assert fit_rates(few) is None
    # Nor do rates that are all too low tell where the best one is.
    low = [
        replace(rung, runs=tuple(sorted(rung.runs, key=lambda run: run.learning_rate)[:1]))
        for rung in rungs_of(made_up(0.004, 4))
    ]
    assert fit_rates(low) is None


def test_an_optimum_lies_between_rates() -> None:
    """At the edge, or beside a run that was not finite, it is not known."""

    def rung(*values: float | None) -> Rung:
        runs = [
            msgspec.structs.replace(TRIAL, learning_rate=0.01 * 2.0**number, bpb=bpb)
            for number, bpb in enumerate(values)
        ]
        return Rung(tuple(reversed(runs)))

    between = rung(2.1, 2.0, 2.1).optimum()
    assert between is not None
    assert between.learning_rate == pytest.approx(0.02)
    assert between.bpb == pytest.approx(2.0)
    for values in ((2.0, 2.1, 2.2), (2.2, 2.1, 2.0), (2.1, 2.0, None), (2.0,), (2.0, 2.1)):
        assert rung(*values).optimum() is None


def climb(places: list[Place], runs: list[LadderRun], seconds: float) -> list[Trial]:
    """Returns what a ladder trains in some seconds, of which a million tokens take 100."""
    trials = []
    while found := next_trial(places, runs, runs, seconds):
        trial, _ = found
        place = next(p for p in places if (p.model, p.num_steps) == trial[:2])
        took = place.tokens / 1e4
        seconds -= took
        from_best = math.log(trial.learning_rate / best_rate(1e6, 1e6))
        runs.append(
            msgspec.structs.replace(
                TRIAL,
                model=place.model,
                num_layer_parameters=place.num_layer_parameters,
                tokens=place.tokens,
                learning_rate=trial.learning_rate,
                bpb=truth(1e6, place.tokens) + 0.03 * from_best**2,
                seconds=took,
                wall_seconds=took,
            )
        )
        trials.append(trial)
    return trials


def places(centre: float) -> list[Place]:
    return [
        Place(model, size, size, tokens // 4096, tokens, centre)
        for model, size in (("gemma3-micro", 1_427_000), ("gemma3-nano", 5_700_000))
        for tokens in (262_144, 524_288, 1_048_576)
    ]


def test_the_shortest_comes_first_and_a_ladder_goes_on_where_it_stopped() -> None:
    whole = climb(places(0.012), [], 10_000)
    assert whole[0] == Trial("gemma3-micro", 64, 0.012)
    assert len(set(whole)) == len(whole) == 6 * 3
    runs: list[LadderRun] = []
    parts = [climb(places(0.012), runs, 500) for _ in range(10)]
    assert [trial for part in parts for trial in part] == whole
    assert 2 < len(parts[0]) < len(whole)


def test_rates_are_tried_beyond_an_edge() -> None:
    """From a rate that is eight times too high down to one below the optimum."""
    tried = climb(places(0.096)[:1], [], 10_000)
    assert [trial.learning_rate for trial in tried] == [0.096, 0.19, 0.048, 0.024, 0.012]
    assert climb(places(0.096)[:1], [], 0) == []


def test_lengths_follow_the_text() -> None:
    assert default_lengths(13_000_000) == [262_144 << number for number in range(6)]
    assert default_lengths(16_000) == [2000, 4000, 8000, 16_000]
    assert default_lengths(3)[0] >= 0


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "runs.jsonl", [TRIAL, TRIAL])
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])  # as a kill leaves it
    assert read_runs(path) == [TRIAL]
    for text in (b"x", b'{"model": 3}'):
        path.write_bytes(whole + text + b"\n")
        with pytest.raises(UserError, match=r"runs.jsonl:3"):
            read_runs(path)


def test_kiems_own_ladder_tells_something() -> None:
    runs = built_in_runs()
    assert runs_like_the_last(runs) == runs
    law = fit_law(rungs_of(runs))
    assert law is not None
    # gemma3-nano on a million tokens of the same text, with a vocabulary of 16 384: docs/recipe.md.
    expected = law.forecast(preset("gemma3-nano", 1).num_layer_parameters(), 500 * 2048)
    assert expected.low < 1.834 < expected.high
    for run in runs:
        assert run.num_layer_parameters == preset(run.model, 1).num_layer_parameters()


def test_a_plan_says_what_to_expect(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    chunks, ladder = tmp_path / "chunks", tmp_path / "chunks.ladder" / "runs.jsonl"
    ladder.parent.mkdir()
    write(ladder, [*made_up(0.004, 5)])
    assert find_ladder(TrainingOptions(dataset_path=(chunks,))) == ladder
    assert find_ladder(TrainingOptions(dataset_path=(tmp_path,))) is None
    budget = Budget(preset("gemma3-nano", 8192), 4_000_000, 13_000_000, 512)
    print_forecast(budget, ladder, PlainConsole())
    shown = capsys.readouterr().out
    expected = fit_law(rungs_of(made_up(0.004, 5)))
    assert expected is not None
    assert f"{expected.forecast(budget.config.num_layer_parameters(), 4e6)}" in shown
    for text in ("this training: gemma3-nano", "best size for its time", "Extrapolated beyond"):
        assert text in shown
    print_forecast(budget, write(ladder, [TRIAL]), PlainConsole())
    assert "chunks.ladder/runs.jsonl has too few rungs" in capsys.readouterr().out


def test_what_other_sizes_can_be_trained_on_follows_time_and_text() -> None:
    nano, micro = preset("gemma3-nano", 8192), preset("gemma3-micro", 8192)
    budget = Budget(nano, 4_000_000, 13_000_000, 512)
    assert budget.tokens_of(nano) == 4_000_000
    ratio = flops_per_token(nano, 512) / flops_per_token(micro, 512)
    assert budget.tokens_of(micro) == pytest.approx(4_000_000 * ratio)
    assert replace(budget, num_train_tokens=2_000_000).tokens_of(micro) == 8_000_000


def test_a_true_ladder_is_trained_once(sample_chunks: Path, tmp_path: Path) -> None:
    output = tmp_path / "ladder"
    command = ("-m", "kiem", "ladder", "--dataset-path", sample_chunks, "--output-dir", output)
    command = (*command, "--models", "gemma3-0.09m", "--precision", "fp32", "--tokens")
    done = run_script(*command, "4096")
    assert done.returncode == 0, done.stderr
    lines = (output / "runs.jsonl").read_text().splitlines()
    runs = [json.loads(line) for line in lines]
    assert len(runs) >= 3
    assert {run["tokens"] for run in runs} == {4096}
    assert len({run["learning_rate"] for run in runs}) == len(runs)
    assert all(0.5 < run["bpb"] < 8 for run in runs)
    assert {*output.iterdir()} == {output / "runs.jsonl", output / "report.html"}
    page = (output / "report.html").read_text()
    for text in ("Rungs", "gemma3-0.09m", "4,096", f"{min(run['bpb'] for run in runs):.3f}"):
        assert text in page
    # With another length only that is trained, and with none left nothing.
    done = run_script(*command, "4096", "8192", "--minutes", "0")
    assert done.returncode == 0, done.stderr
    assert (output / "runs.jsonl").read_text().splitlines() == lines
    assert "0.09m" in done.stdout


@pytest.mark.slow
def test_a_stopped_ladder_goes_on_with_its_training(sample_chunks: Path, tmp_path: Path) -> None:
    output = tmp_path / "ladder"
    words = [
        "-m",
        "kiem",
        "ladder",
        "--dataset-path",
        str(sample_chunks),
        "--output-dir",
        str(output),
    ]
    words += ["--models", "gemma3-0.09m", "--precision", "fp32", "--tokens", "122880"]
    process = subprocess.Popen(
        [sys.executable, "-u", *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    while process.poll() is None and not any(
        log.read_bytes().count(b"\n") > 2 for log in output.glob("training/*/metrics.jsonl")
    ):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == ExitCode.STOPPED, errors
    assert b"The same command goes on" in errors
    assert list(output.glob("training/*/checkpoints/step-*"))
    done = run_script(*words, "--minutes", "0.001")
    assert done.returncode == 0, done.stderr
    (run,) = read_runs(output / "runs.jsonl")
    assert run.tokens == 122_880
    assert not (output / "training").exists()
