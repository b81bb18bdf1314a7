"""report.html: one page that holds all it shows, whatever state the run is in."""

from __future__ import annotations

import json
import math
import shutil
import tracemalloc
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, run_script

from kiem.core.errors import ExitCode
from kiem.core.files import sha256_file
from kiem.report.charts import curves
from kiem.report.comparison import compare_ways
from kiem.report.page import render, write_report
from kiem.report.record import Line, Sample, read_metrics, read_record

SECTIONS = ["warnings", "curves", "samples", "run"]
VOID = {"meta", "br", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """A page taken apart; stops at tags that do not nest and at whatever would be fetched."""

    def __init__(self, html: str):
        super().__init__()
        self.sections: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.data: list[dict[str, Any]] = []
        self._open: list[str] = []
        self._is_data = False
        self.feed(html)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        assert not {"src", "href", "srcset", "data", "action", "poster"} & given.keys()
        assert tag not in ("link", "img", "iframe", "object", "embed", "base")
        if tag == "section" and "id" in given:
            self.sections.append(str(given["id"]))
        self.tags.append(tag)
        self._is_data = given.get("type") == "application/json"
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "style":
            assert "url(" not in data
            assert "@import" not in data
        elif self._open and self._open[-1] == "script":
            if self._is_data:
                self.data.append(json.loads(data))
        else:
            self.text += data

    def chart(self, title: str) -> dict[str, Any]:
        return next(chart for chart in self.data if chart["title"] == title)


def write_run(folder: Path, num_steps: int) -> Path:
    """A run directory with a log of `num_steps` updates and an evaluation every tenth of them."""
    folder.mkdir()
    lines: list[dict[str, Any]] = []
    for step in range(1, num_steps + 1):
        loss = 3 + 7 / math.sqrt(step)
        update = {"loss": loss, "learning_rate": 1e-3, "grad_norm": 1.0 + step % 7, "mfu": 0.5}
        progress = {"step": step, "tokens": 1024 * step, "seconds": 0.5 * step}
        lines.append({**progress, **update, "tokens_per_second": 2048.0, "memory_bytes": 10**9})
        if step % max(1, num_steps // 10) == 0:
            sample = {"prompt": "Er was eens", "text": f" een stap {step} <script>x</script> & co"}
            figures = {"test_loss": loss, "test_bpb": loss / 3, "samples": [sample]}
            lines.append({"step": step, **figures})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    (folder / "config.yaml").write_text("seed: 42\nmodel: gemma3-micro\n", encoding="utf-8")
    return folder


def test_every_run_leaves_a_report(trained_run: Path) -> None:
    page = Page((trained_run / "report.html").read_text(encoding="utf-8"))
    measured = ("per-source", "minimal-pairs")
    assert [section for section in page.sections if section not in measured] == SECTIONS
    for words in ("gemma3-micro", "train:1024", "Nederland is", "smaller model may do better"):
        assert words in page.text, words
    lines, _ = read_metrics(trained_run / "metrics.jsonl", dict[str, Any])
    training = page.chart("Loss")["series"][0]
    assert training["step"] == list(range(1, 13))
    losses = [line["loss"] for line in lines if "loss" in line]
    assert training["y"] == pytest.approx(losses, rel=1e-4)
    last = [line for line in lines if "test_bpb" in line][-1]
    assert f"{last['test_bpb']:.3f}" in page.text
    assert page.chart("Bits per byte")["series"][0]["tokens"] == [6 * 8 * 64, 12 * 8 * 64]


def test_text_of_a_run_stays_text(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 20)
    (run / "config.yaml").write_text("init_from: </td><script>alert(1)</script>\n")
    page = Page(render([read_record(run)]))
    assert " een stap 20 <script>x</script> & co" in page.text
    assert "</td><script>alert(1)</script>" in page.text
    charts = len(page.data)
    assert page.tags.count("script") == charts + 2  # the library and the page's own


def test_sources_and_minimal_pairs_are_drawn_when_there(trained_run: Path, tmp_path: Path) -> None:
    def share(accuracy: float, low: float, high: float) -> dict[str, Any]:
        return {"accuracy": accuracy, "accuracy_low": low, "accuracy_high": high, "pairs": 20}

    phenomena = {"negation <niet>": share(0.75, 0.6, 0.9), "word order": share(0.9, 0.8, 0.95)}
    sources = {"wiki": {"bpb": 1.5, "bpb_low": 1.4, "bpb_high": 1.6}, "law": {"bpb": 1.25}}
    evaluation = {"minimal_pairs": {**share(0.825, 0.7, 0.9), "phenomena": phenomena}}
    run = tmp_path / "run"
    shutil.copytree(trained_run, run)
    (run / "evaluation.json").write_text(json.dumps({**evaluation, "per_source": sources}))
    page = Page(render([read_record(run)]))
    assert "82.5%" in page.text
    assert page.sections[2:4] == ["per-source", "minimal-pairs"]
    chart = page.chart("Minimal pairs by phenomenon")
    assert chart["groups"] == ["word order", "negation <niet>"]
    assert chart["series"][0]["value"] == [90, 75]
    assert chart["series"][0]["low"] == [80, 60]
    assert page.chart("Bits per byte by source")["series"][0]["high"] == [1.6, None]
    assert "1.5 (1.4 to 1.6)" in page.text


def test_an_evaluation_of_a_run_that_says_nothing_of_itself(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 3)
    (run / "evaluation.json").write_text(json.dumps({"per_source": {"law": {"bpb": 1.25}}}))
    page = Page(render([read_record(run)]))
    assert page.chart("Bits per byte by source")["groups"] == ["law"]


def test_damaged_and_repeated_lines(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 20)
    path = run / "metrics.jsonl"
    whole = path.read_text()
    # Stopped after step 20 in the middle of a line, and gone on from a checkpoint after step 10.
    again = whole[whole.index('{"step": 11,') :].replace("2048.0", "4096.0")
    path.write_text(whole + '{"step": 21, "tok\n' + again)
    record = read_record(run)
    assert [line.step for line in record.updates] == list(range(1, 21))
    assert [line.tokens_per_second for line in record.updates] == [2048.0] * 10 + [4096.0] * 10
    assert [line.step for line in record.evaluations] == list(range(2, 21, 2))
    assert record.num_damaged == 1
    assert "1 damaged lines" in render([record])
    assert "running, or stopped" in render([record])


def test_an_empty_log_makes_a_page(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 0)
    assert "No update is logged yet." in Page(render([read_record(run)])).text


def test_several_runs_on_one_page(trained_run: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path / "other", 30)
    output = tmp_path / "both.html"
    runs = ("--runs", trained_run, other)
    done = run_script("report.py", *runs, "--output", output, "--price", "3.6")
    assert done.returncode == 0, done.stderr
    page = Page(output.read_text(encoding="utf-8"))
    series = page.chart("Loss")["series"]
    assert {(row["run"], row["kind"]) for row in series} == {
        (run, kind) for run in ("short", "other") for kind in ("training", "test")
    }
    assert "0.01" in page.text  # 15 s at 3.60 an hour are 1.5 cents
    done = run_script("report.py", "--runs", tmp_path)
    assert done.returncode == ExitCode.NOT_FOUND
    assert "not a run directory" in done.stderr


def test_runs_that_differ_only_in_their_seed_are_compared_together(tmp_path: Path) -> None:
    """Three seeds each of two ways; one more run is not finished, another has a seed of its own."""
    records = []
    figures = {"linear": [1.50, 1.60, 1.55, 9.0], "wsd": [1.48, 1.585, 1.535, 1.53]}
    for schedule, values in figures.items():
        for seed, bpb in enumerate(values):
            run = write_run(tmp_path / f"{schedule}-{seed}", 1)
            options = f"seed: {seed}\nschedule: {schedule}\noutput_dir: /{seed}\nz_loss: 0.1\n"
            (run / "config.yaml").write_text(options)
            with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": 1, "test_loss": 3.0, "test_bpb": bpb}) + "\n")
            if bpb < 9:
                (run / "final_model").mkdir()
                summary = json.dumps({"finished": "2026-11-30T12:00:00"})
                (run / "final_model" / "training_summary.json").write_text(summary)
            records.append(read_record(run))
    assert compare_ways(records) == [
        ("schedule linear", ["3", "1.5500", ""]),
        ("schedule wsd", ["4", "1.5325", "better by 0.0167 ± 0.0017"]),
    ]
    page = Page(render(records))
    assert "comparison" in page.sections
    assert "better by 0.0167 ± 0.0017" in page.text
    assert compare_ways(records[:4]) == []
    assert "comparison" not in Page(render(records[:4])).sections


def test_ten_thousand_steps_cost_little(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 10_000)
    write_report([run], run / "report.html")
    assert (run / "report.html").stat().st_size < 600_000
    chart = Page((run / "report.html").read_text()).chart("Gradient norm")
    noise, means = chart["series"]
    assert (min(noise["y"]), max(noise["y"])) == (1, 7)
    assert means["y"] == pytest.approx([4] * len(means["y"]), abs=0.2)


def test_thinned_curves_keep_their_extremes(tmp_path: Path) -> None:
    record = read_record(write_run(tmp_path / "run", 5000))
    record.updates[1234].loss, record.updates[4321].loss = 99.0, -99.0
    noise, means = curves([record])[0]["series"][:2]
    assert len(noise["y"]) <= 500
    assert noise["step"] == sorted(noise["step"])
    assert (noise["y"][noise["step"].index(1235)], noise["y"][noise["step"].index(4322)]) == (
        99,
        -99,
    )
    assert len(means["y"]) == 250


def test_a_report_that_cannot_be_written_stops_nothing(sample_chunks: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "report.html").mkdir(parents=True)
    done = run_script(
        "training.py",
        *("--dataset-path", sample_chunks, "--model", "gemma3-micro", "--max-steps", "2"),
        *("--output-dir", tmp_path, "--run-name", "run", "--eval-steps", "1"),
    )
    assert done.returncode == 0, done.stderr
    assert "warning: the report failed" in done.stdout
    assert (tmp_path / "run" / "final_model").is_dir()


def test_a_run_that_stops_says_why(sample_chunks: Path, tmp_path: Path) -> None:
    done = run_script(
        "training.py",
        *("--dataset-path", sample_chunks, "--model", "gemma3-micro", "--max-steps", "50"),
        *("--output-dir", tmp_path, "--run-name", "run", "--precision", "fp32"),
        *("--learning-rate", "10", "--weight-decay", "10"),  # weights are multiplied by -99
        *("--batch-size", "4", "--gradient-accumulation-steps", "1", "--eval-steps", "0"),
    )
    assert done.returncode == ExitCode.NOT_FINITE
    page = Page((tmp_path / "run" / "report.html").read_text(encoding="utf-8"))
    assert "gradient norm nan are not both finite" in page.text
    assert "running, or stopped" in page.text


def test_damaged_files_are_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 3)
    (run / "run.json").write_text("{")
    done = run_script("report.py", "--runs", run)
    assert done.returncode == ExitCode.DAMAGED
    assert "run.json:1: not JSON" in done.stderr


def test_a_report_needs_no_torch() -> None:
    done = run_script("-c", "import kiem.report.page, sys; print('torch' in sys.modules)")
    assert done.stdout == "False\n"


def test_the_plotting_library_is_the_published_one() -> None:
    """Its bytes are those that `make chart-js` takes from the npm package."""
    file = ROOT / "kiem" / "report" / "chart.umd.min.js"
    assert sha256_file(file) in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_a_text_may_hold_any_line_break(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 10)
    sample = {"prompt": "Er was eens", "text": "een\u2028twee\u0085drie\x0b"}
    line = {"step": 11, "test_loss": 3.0, "test_bpb": 1.0, "samples": [sample]}
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")
    record = read_record(run)
    assert record.num_damaged == 0
    assert record.evaluations[-1].samples == (Sample(**sample),)


def test_updates_are_what_was_logged_whatever_figures_they_have(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 3)
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    expected = [line for line in logged if "loss" in line]
    expected.append({**expected[-1], "step": 4})
    del expected[-1]["mfu"]
    expected.append({**expected[0], "step": 5})
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in expected[3:])
    assert read_record(run).updates == [Line(**line) for line in expected]


def test_drawing_a_long_run_takes_little_memory(tmp_path: Path) -> None:
    """A report is drawn at every evaluation; what it takes must not grow with the run."""
    peaks = []
    for num_steps in (2_000, 12_000):
        run = write_run(tmp_path / str(num_steps), num_steps)
        tracemalloc.start()
        write_report([run], tmp_path / "page.html")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # Lines of ten figures, and the points of one curve: some 0.4 MB for 1000 steps.
    assert peaks[1] - peaks[0] < 5e6, peaks
