"""Options of inference.py."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta

from kiem.config.limits import MOST, MOST_TOKENS, Name, Penalty, Seed, Share, Temperature, TopP


@dataclass(frozen=True)
class InferenceOptions:
    """Continue text with a trained model; without a prompt, five Dutch ones."""

    model_path: Name
    """Model directory (final_model/ of a run), or the Hub id of a Gemma 3 text model."""
    prompt: str | None = None
    """Text to continue."""
    prompts_file: Path | None = None
    """File with one prompt per line (.txt), or with a column or key "prompt" (.jsonl, .csv and
    others, see docs/formats.md)."""
    interactive: bool = False
    """Read prompts from the keyboard."""
    serve: bool = False
    """Start a server with OpenAI's API (/v1/completions) and a web page (/)."""
    benchmark: bool = False
    """Measure the speed."""
    json: Path | None = None
    """With --benchmark: write the figures to this file."""
    max_new_tokens: Annotated[int, Meta(ge=1, le=MOST_TOKENS)] = 128
    """Most tokens to generate. With --serve this and the sampling options, from --temperature to
    --stop, are the defaults of requests."""
    temperature: Temperature = 0.8
    """Sampling temperature; 0 always takes the likeliest token."""
    top_k: Annotated[int, Meta(ge=0, le=MOST)] = 0
    """Sample from the k likeliest tokens; 0: from all."""
    top_p: TopP = 0.9
    """Sample from the likeliest tokens that together have this probability."""
    min_p: Share = 0.0
    """Sample from tokens with at least this share of the likeliest token's probability."""
    repetition_penalty: Penalty = 1.1
    """Above 1: tokens that occurred before are less likely."""
    stop: tuple[str, ...] = ()
    """Texts that end a continuation and are not part of it."""
    num_return_sequences: Annotated[int, Meta(ge=1, le=2**16)] = 1
    """Continuations per prompt."""
    seed: Seed = 42
    """Seed of the sampling; the same seed gives the same text."""
    output_file: Path | None = None
    """Write prompts and continuations to this JSON Lines file, in batches, and over all processes
    of accelerate launch or torchrun. After an interruption the same command resumes."""
    max_requests: Annotated[int, Meta(ge=1, le=4096)] = 8
    """With --output-file and --serve: continuations in a batch."""
    max_context: Annotated[int, Meta(ge=2, le=MOST_TOKENS)] = 4096
    """With --interactive and --serve: most tokens of prompt and continuation."""
    host: Name = "127.0.0.1"
    """With --serve: address to listen on. Any but the local one needs --api-key."""
    port: Annotated[int, Meta(ge=0, le=65535)] = 8000
    """With --serve: port to listen on; 0: any that is free."""
    api_key: Name | None = None
    """With --serve: key that every request must have as bearer token, or a browser as password."""
    max_waiting: Annotated[int, Meta(ge=0, le=10**6)] = 32
    """With --serve: most continuations in the queue; more are refused."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of what is computed. auto: bf16 on GPUs that support it; on CPUs as the weights are
    stored, or fp32 without AVX512_BF16. For fp32, weights in bf16 take no more memory on a CPU with
    a C++ compiler."""
    quantize: Literal["none", "int8", "int4"] = "none"
    """On CPUs: quantize the matrices and the embedding; --precision then applies to the rest (auto:
    bf16 with AVX512_BF16)."""
