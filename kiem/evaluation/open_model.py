"""Opens the model that evaluate.py is to measure: kiem's own kind, or another one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec

from kiem.core.errors import ExitCode
from kiem.core.json_input import JsonError, parse_json, read_json
from kiem.evaluation.foreign import open_foreign_model
from kiem.evaluation.language_model import LanguageModel, own_language_model
from kiem.inference.loading import load_for_inference
from kiem.model.config_json import CONFIG_FILE
from kiem.model.gemma3 import Gemma3
from kiem.model.io import find_model


class _Options(msgspec.Struct):
    chunk_size: Annotated[int, msgspec.Meta(ge=2, lt=1 << 31)]


class _Data(msgspec.Struct):
    options: _Options


class _Summary(msgspec.Struct):
    """What is read of training_summary.json."""

    data: _Data


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
    if _is_foreign(folder / CONFIG_FILE):
        return open_foreign_model(folder, precision, context)
    loaded = load_for_inference(str(folder), precision)
    return own_language_model(
        loaded.model, loaded.tokenizer, context or _trained_context(folder, loaded.model)
    )


def _trained_context(folder: Path, model: Gemma3) -> int:
    """Returns how many tokens a kiem model saw at once in training, others' longest context."""
    path = folder / "training_summary.json"
    if not path.is_file():
        return model.config.max_position_embeddings
    fix = "Remove the file and give --context."
    summary = read_json(path, _Summary, fix=fix, exit_code=ExitCode.DAMAGED)
    return summary.data.options.chunk_size


def _is_foreign(path: Path) -> bool:
    """Says whether a config.json is that of another kind of model."""
    try:
        description = parse_json(path.read_bytes())
    except (OSError, JsonError):  # whoever loads the model explains it
        return False
    is_object = isinstance(description, dict)
    return is_object and description.get("model_type", "gemma3_text") != "gemma3_text"
