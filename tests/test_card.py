"""The model card: what the Hub reads, what people read, and a snippet that works."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import run_script
from huggingface_hub import ModelCard

from kiem.model.config import GEMMA_VOCABULARY
from kiem.report.card import model_card


@pytest.fixture
def summary(trained_run: Path) -> dict[str, Any]:
    text = (trained_run / "final_model" / "training_summary.json").read_text(encoding="utf-8")
    return dict(json.loads(text))


def test_hub_reads_the_metadata(trained_run: Path, summary: dict[str, Any]) -> None:
    card = ModelCard.load(trained_run / "final_model" / "README.md")
    assert card.data.language == ["nl"]
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.license == "unknown"
    assert card.data.datasets is None
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results["bits_per_byte"] == pytest.approx(summary["test_bpb"], abs=1e-4)


def test_the_snippet_works_as_it_stands(trained_run: Path) -> None:
    folder = trained_run / "final_model"
    match = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert match
    done = run_script("-c", match[1], cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "Nederland is" in done.stdout


def test_facts_are_the_runs(trained_run: Path, summary: dict[str, Any]) -> None:
    text = (trained_run / "final_model" / "README.md").read_text(encoding="utf-8")
    for row in (
        "| tokens trained on | 6,144 in 12 updates |",
        "| training documents | 79 |",
        "| tokens per update | 512 |",
        "| tokenizer | train:1024, 1,024 rows |",
        f"| bits per byte | {summary['test_bpb']:.4f} |",
    ):
        assert row in text, row
    assert "> **Nederland is**" in text
    assert "Gemma terms" not in text


def test_terms_and_minimal_pairs(summary: dict[str, Any]) -> None:
    summary["tokenizer"]["num_rows"] = GEMMA_VOCABULARY
    summary["initialized_from"] = "google/gemma-3-270m"
    source = {"kind": "hub", "dataset": "a/b", "config": "10k", "revision": "0123"}
    summary["data"]["source"] = source
    share = {"accuracy": 0.75, "accuracy_low": 0.7, "accuracy_high": 0.8, "pairs": 20}
    summary["minimal_pairs"] = {**share, "phenomena": {"om|te": share}}
    summary["samples"] = [{"prompt": "Er was", "text": " | eens\n# een <b>*kop*"}]
    text = model_card(summary, "run", "fy")
    data = ModelCard(text).data
    assert (data.license, data.base_model) == ("gemma", "google/gemma-3-270m")
    assert (data.datasets, data.language) == (["a/b"], ["fy"])
    assert "https://ai.google.dev/gemma/terms" in text
    assert "75.0 % of 20 (95 %: 70.0 to 80.0 %; chance is 50 %)" in text
    assert "|---|---|---|---|\n| om\\|te | 75.0 % | 70.0 to 80.0 % | 20 |\n" in text
    assert r"> **Er was** \| eens \# een \<b\>\*kop\*" in text


def test_several_sources_are_all_named(summary: dict[str, Any]) -> None:
    hub = {"kind": "hub", "config": "nl", "split": "train", "revision": "0123", "files": ["x"]}
    sources = [
        {**hub, "dataset": "a/b"},
        {"kind": "files", "sha256": {"x.txt": "00"}},
        {**hub, "dataset": "c/d"},
    ]
    summary["data"]["source"] = {"kind": "several", "sources": sources}
    text = model_card(summary, "run", "nl")
    assert ModelCard(text).data.datasets == ["a/b", "c/d"]
    assert "held-out documents of a/b and files and c/d" in text
    a, c = (rf"dataset {name}, config nl, split train, revision 0123" for name in ("a/b", "c/d"))
    assert f"| text | {a}; local file x.txt; {c} |" in text
