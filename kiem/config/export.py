"""Options of export.py."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kiem.config.limits import Name


@dataclass(frozen=True)
class ExportOptions:
    """Write a trained model in a format for other programs, or publish it."""

    model_path: Name
    """Model directory (final_model/ of a run), or the Hub id of a Gemma 3 text model."""
    output: Path
    """What to write: a file (gguf) or a folder (safetensors)."""
    format: Literal["gguf", "safetensors"] = "gguf"
    """gguf: one file for llama.cpp, Ollama, LM Studio and others. safetensors: a model directory
    for transformers and vLLM, such as this one but in another precision."""
    dtype: Literal["f32", "bf16", "f16", "q8_0"] = "bf16"
    """Precision of the matrices. q8_0 (gguf only): 8 bits and a scale for every 32 values."""
    overwrite: bool = False
    """Replace the output if it exists."""
    push_to_hub: Name | None = None
    """Upload the result to this repository (OWNER/NAME) on the Hub; it is made if missing."""
    private: bool = True
    """With --push-to-hub: make a missing repository private."""
    dry_run: bool = False
    """With --push-to-hub: list what would be uploaded, but upload nothing."""
