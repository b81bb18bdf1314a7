"""The model card: README.md of a model directory, with facts from the run only."""

from __future__ import annotations

from typing import Any

import yaml

from kiem.model.presets import GEMMA_VOCABULARY


def model_card(summary: dict[str, Any], run_name: str) -> str:
    """Returns the text of README.md.

    Args:
        summary: the content of training_summary.json.
        run_name: name of the run, which becomes the model's title.
    """
    source = summary["data"]["source"]
    header: dict[str, Any] = {
        "language": ["nl"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["kiem", "gemma3"],
    }
    if source["kind"] == "hub":
        header["datasets"] = [source["dataset"]]
        data = f"{source['dataset']}, config {source['config']}, revision {source['revision']}"
    else:
        data = {"sample": "the built-in sample", "files": "local files"}[source["kind"]]
    recipe, hardware = summary["recipe"], summary["hardware"]
    rows = [
        ("Model", f"{summary['model']}, {summary['parameters']:,} parameters"),
        ("Started from", summary["initialized_from"]),
        ("Text", data),
        ("Training documents", f"{summary['data']['train_documents']:,}"),
        ("Tokens trained on", f"{summary['tokens']:,} in {summary['steps']:,} updates"),
        ("Highest learning rate", f"{recipe['learning_rate']:g}"),
        ("Time", f"{summary['seconds'] / 3600:.2f} hours"),
        ("Hardware", f"{hardware['devices']} x {hardware['device']}, {hardware['precision']}"),
        ("Test loss", f"{summary['test_loss']:.4f} nats per token"),
        ("Test bits per byte", f"{summary['test_bpb']:.4f}"),
    ]
    if "minimal_pairs" in summary:
        pairs = summary["minimal_pairs"]
        interval = f"{pairs['accuracy_low']:.1%} to {pairs['accuracy_high']:.1%}"
        text = f"{pairs['accuracy']:.1%} of {pairs['pairs']} (95 %: {interval}; chance is 50 %)"
        rows.append(("Dutch minimal pairs", text))
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    licence = (
        "Its tokenizer is Gemma's: the [Gemma terms](https://ai.google.dev/gemma/terms) apply.\n"
        if summary["tokenizer"]["num_rows"] == GEMMA_VOCABULARY
        else ""
    )
    return f"""---
{yaml.safe_dump(header, sort_keys=False).strip()}
---

# {run_name}

A language model for Dutch in the Gemma 3 architecture, trained with kiem. It is a base model: it
continues text and does not follow instructions.

| | |
|---|---|
{table}

```python
from transformers import AutoTokenizer, Gemma3ForCausalLM

tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
model = Gemma3ForCausalLM.from_pretrained("path/to/this/folder")
inputs = tokenizer("Nederland is", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```

{licence}"""
