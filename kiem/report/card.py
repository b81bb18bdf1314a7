"""Model cards: the README.md of a model directory, with facts from the run only."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from kiem.core.console import printable
from kiem.core.files import format_bytes
from kiem.data.source_record import describe_source, list_sources, show_licence
from kiem.model.config import GEMMA_VOCABULARY

_MARKUP = "\\`*_[]<>|#~$"


def model_card(summary: dict[str, Any], run_name: str, language: str) -> str:
    """Returns the text of README.md, with the metadata that the Hub reads at its top.

    Args:
        summary: the content of training_summary.json.
        run_name: the model's title.
        language: code of the text's language.
    """
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, keep_trailing_newline=True
    )
    environment.filters["line"] = _one_line
    text = resources.files("kiem.report").joinpath("card.md").read_text(encoding="utf-8")
    samples = summary.get("samples", [])
    body = environment.from_string(text).render(
        name=run_name,
        prompt=json.dumps(samples[0]["prompt"] if samples else "Nederland", ensure_ascii=False),
        summary={"samples": samples, **summary},
        facts=[(name, _one_line(value)) for name, value in _facts(summary)],
        texts=[(_one_line(name), *figures) for name, *figures in _texts(summary)],
        pairs=summary.get("minimal_pairs"),
        is_gemmas=_is_gemmas(summary),
    )
    return f"---\n{_metadata(summary, run_name, language)}\n---\n\n{body}"


def _metadata(summary: dict[str, Any], run_name: str, language: str) -> str:
    """Returns the YAML that the Hub reads."""
    from huggingface_hub import EvalResult, ModelCardData  # slow to import, once at the end

    sources = list_sources(summary["data"]["source"])
    datasets = list(dict.fromkeys(s["dataset"] for s in sources if s["kind"] == "hub"))
    test_text = " and ".join(dict.fromkeys(s.get("dataset", s["kind"]) for s in sources))
    start = summary["initialized_from"]
    is_hub_model = start.count("/") == 1 and not Path(start).exists()
    common: dict[str, Any] = {
        "task_type": "text-generation",
        "dataset_type": "held-out",
        "dataset_name": f"held-out documents of {test_text}",
    }
    results = [
        EvalResult(metric_type=name, metric_value=round(summary[key], 4), **common)
        for name, key in (("bits_per_byte", "test_bpb"), ("perplexity", "test_perplexity"))
        if key in summary  # an evaluation may have failed
    ]
    return ModelCardData(
        language=[language],
        library_name="transformers",
        pipeline_tag="text-generation",
        license="gemma" if _is_gemmas(summary) else "unknown",
        tags=["kiem", "gemma3"],
        datasets=datasets or None,
        base_model=start if is_hub_model else None,
        model_name=run_name,
        eval_results=results or None,
    ).to_yaml()


def _facts(summary: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields names and texts of what was trained on what."""
    data, recipe, hardware = summary["data"], summary["recipe"], summary["hardware"]
    tokenizer = summary["tokenizer"]
    chunk_size = data["options"]["chunk_size"]
    yield "model", f"{summary['model']}, {summary['parameters']:,} parameters"
    yield "started from", summary["initialized_from"]
    yield "text", "; ".join(map(describe_source, list_sources(data["source"])))
    yield "training documents", f"{data['train_documents']:,}"
    yield "training text", format_bytes(sum(data["bytes_per_source"].values()))
    yield "training tokens", f"{data['train_tokens']:,} in chunks of {chunk_size:,}"
    yield "test documents", f"{data['test_documents']:,}"
    yield "tokenizer", f"{tokenizer['origin']}, {tokenizer['num_rows']:,} rows"
    num_small = recipe["batch_warmup_steps"]
    fewer = f", fewer in the first {num_small:,} updates" if num_small else ""
    yield "tokens per update", f"{recipe['chunks_per_step'] * chunk_size:,}{fewer}"
    yield "highest learning rate", f"{recipe['learning_rate']:g}"
    yield "hardware", f"{hardware['devices']} x {hardware['device']}, {hardware['precision']}"
    yield "versions", ", ".join(f"{name} {value}" for name, value in summary["versions"].items())
    for directory in (*data["directories"], *data["anneal"]):
        yield f"sha256 of {directory['name']}", directory["manifest_sha256"][:16]
    yield "tokenizer's sha256", tokenizer["sha256"][:16]
    yield "tokens trained on", f"{summary['tokens']:,} in {summary['steps']:,} updates"
    yield "training time", f"{summary['seconds'] / 3600:.2f} hours"
    yield "finished", summary["finished"]


def _texts(summary: dict[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """Yields each text with its documents, its share of the tokens that were read, and licence."""
    texts = summary.get("texts", [])
    is_one = len({text["directory"] for text in texts}) == 1
    for text in texts:
        name = text["text"] if is_one else f"{text['directory']}: {text['text']}"
        licence = _one_line(show_licence(text["licence"]))
        yield name, f"{text['documents']:,}", f"{100 * text['share']:.1f} %", licence


def _is_gemmas(summary: dict[str, Any]) -> bool:
    return bool(summary["tokenizer"]["num_rows"] == GEMMA_VOCABULARY)


def _one_line(text: str) -> str:
    """Returns text on one line, with what Markdown would read as markup escaped."""
    line = " ".join(printable(text).splitlines())
    return "".join(f"\\{c}" if c in _MARKUP else c for c in line)
