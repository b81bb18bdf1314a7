"""Opens the model that evaluate.py is to measure: kiem's own kind, or another one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from kiem.evaluation.foreign import open_foreign_model
from kiem.evaluation.language_model import LanguageModel, own_language_model
from kiem.inference.loading import load_for_inference
from kiem.model.files import CONFIG_FILE, find_model
from kiem.model.gemma3 import Gemma3


def open_language_model(
    name: str, precision: Literal["auto", "fp32", "bf16"], context: int | None
) -> LanguageModel:
    """Loads a model for evaluation: a Gemma 3 text model, or another one through transformers.

    Args:
        name: a folder or Hub id.
        precision: of the weights.
        context: most tokens in a row; None: what the model was trained with.

    Raises:
        UserError: there is no such model, or transformers is needed and not installed.
    """
    folder = find_model(name)
    description = _read_json(folder / CONFIG_FILE)
    if description.get("model_type", "gemma3_text") != "gemma3_text":
        return open_foreign_model(folder, precision, context)
    loaded = load_for_inference(str(folder), precision)
    return own_language_model(
        loaded.model, loaded.tokenizer, context or _trained_context(folder, loaded.model)
    )


def _trained_context(folder: Path, model: Gemma3) -> int:
    """Returns how many tokens a kiem model saw at once in training, others' longest context."""
    summary = _read_json(folder / "training_summary.json")
    chunk_size = summary.get("data", {}).get("options", {}).get("chunk_size")
    return int(chunk_size or model.config.max_position_embeddings)


def _read_json(path: Path) -> dict[str, Any]:
    """Returns a JSON object, empty if there is none: whoever loads the model explains that."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
