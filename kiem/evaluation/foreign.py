"""Other people's models, through transformers; the only module of the package that imports it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from kiem.compute.speed import prefers_bf16
from kiem.core.errors import ExitCode, UserError
from kiem.evaluation.language_model import LanguageModel

# Logits in a batch, at 4 bytes each.
_LOGITS_PER_BATCH = 1 << 28


def open_foreign_model(
    folder: Path, precision: Literal["auto", "fp32", "bf16"], context: int | None
) -> LanguageModel:
    """Loads a causal language model of any architecture that transformers has.

    Args:
        folder: a folder with config.json, safetensors weights and tokenizer.
        precision: of the weights; auto: as in the file, but fp32 where bf16 is slow.
        context: most tokens in a row; None: the longest that the model is made for.

    Raises:
        UserError: transformers is not installed, does not load it, or it states no longest context.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise UserError(
            "this is not a Gemma 3 text model, and transformers is not installed",
            where=str(folder),
            fix="Install it with: pip install transformers",
            exit_code=ExitCode.NOT_A_MODEL,
        ) from error
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    default = "auto" if prefers_bf16(device) else torch.float32
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}.get(precision, default)
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, torch_dtype=dtype, use_safetensors=True, **options
        )
    except Exception as error:  # whatever it is that transformers does not expect in these files
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(
            f"transformers cannot load it ({reason})",
            where=str(folder),
            fix="Name a folder or Hub id with config.json, *.safetensors and a tokenizer.",
            exit_code=ExitCode.NOT_A_MODEL,
        ) from error
    model.to(device).eval()
    config = model.config.get_text_config()
    # Models without <bos>, such as GPT-2, were trained with the end of a text before the next.
    bos_id = tokenizer.bos_token_id
    if bos_id is None:
        bos_id = tokenizer.eos_token_id
    possible = getattr(config, "max_position_embeddings", None)
    if context is not None and possible is not None and context > possible:
        raise UserError(
            f"{context} tokens are more than its {possible} positions",
            where="--context",
            fix=f"Give {possible} or fewer.",
            exit_code=ExitCode.BAD_OPTION,
        )
    longest = context or possible
    if bos_id is None or longest is None:
        raise UserError(
            "its tokenizer has no <bos> or <eos>" if bos_id is None else "no longest context known",
            where=str(folder),
            fix="Choose another model." if bos_id is None else "Give --context.",
            exit_code=ExitCode.NOT_A_MODEL,
        )

    num_rows = model.get_input_embeddings().weight.shape[0]

    def encode(texts: Sequence[str]) -> list[list[int]]:
        # Literal "<eos>" in a text is text, as in kiem's own tokenizers.
        options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        encoded = [list(ids) for ids in tokenizer(list(texts), **options)["input_ids"]]
        highest = max((max(ids) for ids in encoded if ids), default=0)
        if highest >= num_rows:
            raise UserError(
                f"its tokenizer has the id {highest}, its embedding only {num_rows} rows",
                where=str(folder),
                fix="Put the tokenizer that the model was trained with into the folder.",
                exit_code=ExitCode.TOKENIZER_MISMATCH,
            )
        return encoded

    def nats(ids: Tensor, scored: Tensor) -> Tensor:
        with torch.inference_mode():
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1][scored[:, 1:]]  # N V
            return torch.nn.functional.cross_entropy(
                logits.float(), ids[scored], reduction="none"
            ).clone()

    return LanguageModel(
        encode=encode,
        nats=nats,
        bos_id=bos_id,
        unknown_id=tokenizer.unk_token_id if tokenizer.unk_token_id != bos_id else None,
        context=longest,
        tokens_per_batch=_LOGITS_PER_BATCH // config.vocab_size,
        device=device,
    )
