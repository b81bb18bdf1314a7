"""A model as one GGUF file, the format of llama.cpp and what is built on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kiem.core.errors import ExitCode, UserError, not_installed
from kiem.core.files import new_file
from kiem.export.origin import Origin
from kiem.export.vocabulary import make_vocabulary
from kiem.model.config import Gemma3Config
from kiem.model.gemma3 import Gemma3
from kiem.tokenizer.tokenizer import Tokenizer

# What llama.cpp takes for granted in Gemma 3 models.
_LAYER_PATTERN = 6
_LOCAL_ROPE_BASE = 10_000.0
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def write_gguf(model: Gemma3, tokenizer: Tokenizer, origin: Origin, dtype: str, path: Path) -> None:
    """Writes a GGUF file; matrices in `dtype`, norms in fp32.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        origin: what the file says of the model's name, languages and licence.
        dtype: "f32", "f16", "bf16" or "q8_0" (blocks of 32 values with a common scale).
        path: the file.

    Raises:
        UserError: gguf is not installed, or llama.cpp cannot run this shape or tokenizer.
    """
    try:
        import gguf
    except ImportError as error:
        raise not_installed("gguf", "--format gguf") from error
    _check_shape(model.config, dtype)
    vocabulary = make_vocabulary(tokenizer, model.config.vocab_size)
    matrix_type = gguf.GGMLQuantizationType[dtype.upper()]
    tensors = [(gguf_name(key), tensor) for key, tensor in model.state_dict().items()]
    types = {n: matrix_type if t.ndim == 2 else gguf.GGMLQuantizationType.F32 for n, t in tensors}
    with new_file(path) as file:
        # The writer opens the file by its name; the name goes, the content stays.
        writer = gguf.GGUFWriter(Path(file.name), "gemma3")
        _describe(writer, model.config, int(gguf.LlamaFileType[_FILE_TYPES[dtype]]))
        _describe_origin(writer, origin)
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(vocabulary.tokens)
        writer.add_token_scores(vocabulary.scores)
        writer.add_token_types([int(kind) for kind in vocabulary.types])
        writer.add_bos_token_id(tokenizer.bos_id)
        writer.add_eos_token_id(tokenizer.eos_id)
        writer.add_pad_token_id(tokenizer.pad_id)
        if "<unk>" in vocabulary.tokens:
            writer.add_unk_token_id(vocabulary.tokens.index("<unk>"))
        writer.add_add_bos_token(True)
        writer.add_add_eos_token(False)
        writer.add_add_space_prefix(False)
        for key, tensor in tensors:
            shape = gguf.quant_shape_to_byte_shape(tuple(tensor.shape), types[key])
            writer.add_tensor_info(
                key, shape, np.dtype(np.uint8), int(np.prod(shape)), raw_dtype=types[key]
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for key, tensor in tensors:
            values = gguf.quants.quantize(gguf_values(key, tensor), types[key])
            writer.write_tensor_data(values.view(np.uint8))
        writer.close()


def gguf_name(key: str) -> str:
    """Returns llama.cpp's name of a parameter."""
    prefix, rest = "", key.removesuffix(".weight")
    if rest.startswith("model.layers."):
        number, rest = rest.removeprefix("model.layers.").split(".", 1)
        prefix = f"blk.{number}."
    return f"{prefix}{_NAMES[rest]}.weight"


def gguf_values(name: str, tensor: Tensor) -> np.ndarray:
    """Returns a parameter's values in fp32, as llama.cpp uses them.

    Its norms multiply by the weight itself, Gemma's by 1 + weight.
    """
    values = tensor.detach().to("cpu", torch.float32).numpy()
    return values + 1 if name.endswith("norm.weight") else values


_FILE_TYPES = {
    "f32": "ALL_F32",
    "f16": "MOSTLY_F16",
    "bf16": "MOSTLY_BF16",
    "q8_0": "MOSTLY_Q8_0",
}


def _describe_origin(writer: Any, origin: Origin) -> None:
    """Writes what is known; an empty text would be a statement."""
    for value, add in (
        (origin.name, writer.add_name),
        (origin.languages, writer.add_languages),
        (origin.license, writer.add_license),
        (origin.license_name, writer.add_license_name),
        (origin.license_link, writer.add_license_link),
    ):
        if value:
            add(value)


def _describe(writer: Any, config: Gemma3Config, file_type: int) -> None:
    writer.add_type("model")
    writer.add_file_type(file_type)
    writer.add_quantization_version(2)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_freq_base_swa(config.rope_local_base_freq)
    writer.add_sliding_window(config.sliding_window)


def _check_shape(config: Gemma3Config, dtype: str) -> None:
    def refuse(what: str) -> UserError:
        return UserError(
            f"llama.cpp cannot run this shape: {what}",
            where="config.json",
            fix="Train one of the shapes that training.py --model offers, or choose another format "
            "or --dtype.",
            exit_code=ExitCode.NOT_A_MODEL,
        )

    for name, expected in (
        ("sliding_window_pattern", _LAYER_PATTERN),
        ("rope_local_base_freq", _LOCAL_ROPE_BASE),
        ("query_pre_attn_scalar", config.head_dim),
    ):
        if getattr(config, name) != expected:
            raise refuse(f"{name} is {getattr(config, name)}, not {expected}")
    widths = (config.hidden_size, config.intermediate_size)
    if dtype == "q8_0" and any(width % 32 for width in widths):
        raise refuse(f"q8_0 needs widths that are multiples of 32, not {widths}")
