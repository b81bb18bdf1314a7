"""Causal models of any architecture, through transformers; no other module imports it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from kiem.compute.speed import prefers_bf16
from kiem.core.errors import ExitCode, UserError, bad_option
from kiem.evaluation.language_model import LanguageModel
from kiem.parallel.launch import choose_device

_LOGIT_BYTES_PER_BATCH = 1 << 30


def open_foreign_model(
    folder: Path, precision: Literal["auto", "fp32", "bf16"], context: int | None
) -> LanguageModel:
    """Loads a causal language model of any architecture that transformers has.

    Args:
        folder: a folder with config.json, safetensors weights and tokenizer.
        precision: "auto" is as in the file, but fp32 where bf16 is slow.
        context: most tokens in a row; None: the longest that the model is made for.

    Raises:
        UserError: transformers does not load it, or tokenizer or context do not fit.
    """
    device = choose_device()
    default = "auto" if prefers_bf16(device) else torch.float32
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}.get(precision, default)
    model, tokenizer = _load(folder, dtype)
    model.to(device).eval()
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if context is not None and positions is not None and context > positions:
        what = f"{context} tokens are more than its {positions} positions"
        raise bad_option("--context", what, f"Give {positions} or fewer.")
    # Models without <bos>, such as GPT-2, saw the end of a text before the next one.
    bos_id = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if bos_id is None:
        raise _unusable(folder, "its tokenizer has no <bos> or <eos>", "Choose another model.")
    longest = context or positions
    if longest is None:
        raise _unusable(folder, "no longest context known", "Give --context.")
    num_rows = model.get_input_embeddings().weight.shape[0]

    def encode(texts: Sequence[str]) -> list[list[int]]:
        # Literal "<eos>" in a text is text, as in kiem's own tokenizers.
        options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        encoded = [list(ids) for ids in tokenizer(list(texts), **options)["input_ids"]]
        highest = max((max(ids) for ids in encoded if ids), default=0)
        if highest >= num_rows:
            what = f"its tokenizer has the id {highest}, its embedding only {num_rows} rows"
            raise _unusable(folder, what, "Use the tokenizer that the model was trained with.")
        return encoded

    def nats(ids: Tensor, scored: Tensor) -> Tensor:
        with torch.inference_mode():
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1][scored[:, 1:]]  # N V
            return cross_entropy(logits.float(), ids[scored], reduction="none").clone()

    return LanguageModel(
        encode=encode,
        nats=nats,
        bos_id=bos_id,
        unknown_id=tokenizer.unk_token_id if tokenizer.unk_token_id != bos_id else None,
        context=longest,
        tokens_per_batch=_LOGIT_BYTES_PER_BATCH // (4 * config.vocab_size),
        device=device,
    )


def _load(folder: Path, dtype: torch.dtype | str) -> tuple[Any, Any]:
    """Returns transformers' model and tokenizer."""
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        what = "this is not a Gemma 3 text model, and transformers is not installed"
        raise _unusable(folder, what, "Install it with: pip install transformers") from error
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        model = AutoModelForCausalLM.from_pretrained(
            folder, torch_dtype=dtype, use_safetensors=True, **options
        )
    except Exception as error:  # whatever transformers does not expect in these files
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        fix = "Name a folder or Hub id with config.json, *.safetensors and a tokenizer."
        raise _unusable(folder, f"transformers cannot load it ({reason})", fix) from error
    return model, tokenizer


def _unusable(folder: Path, what: str, fix: str) -> UserError:
    return UserError(what, where=str(folder), fix=fix, exit_code=ExitCode.NOT_A_MODEL)
