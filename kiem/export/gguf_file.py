"""Writer of GGUF files, the format of llama.cpp and programs built on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np

from kiem.core.errors import ExitCode, UserError
from kiem.core.files import new_file
from kiem.export.origin import Origin
from kiem.export.vocabulary import make_vocabulary
from kiem.model.config import Gemma3Config
from kiem.model.gemma3 import Gemma3
from kiem.tokenizer.tokenizer import Tokenizer

# What llama.cpp takes for granted in Gemma 3 models.
_LAYER_PATTERN = 6
_LOCAL_ROPE_BASE = 10_000.0


def write_gguf(model: Gemma3, tokenizer: Tokenizer, origin: Origin, dtype: str, path: Path) -> None:
    """Writes a GGUF file; matrices in `dtype`, norms in fp32.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        origin: the model's name, languages and licence.
        dtype: "f32", "f16", "bf16" or "q8_0" (blocks of 32 values with a common scale).
        path: the file.

    Raises:
        UserError: llama.cpp cannot run this shape or tokenizer.
    """
    _check_shape(model.config, dtype)
    vocabulary = make_vocabulary(tokenizer, model.config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3, model.config.num_hidden_layers)
    matrix_type = gguf.GGMLQuantizationType[dtype.upper()]
    tensors = [
        (f"{names[key.removesuffix('.weight')]}.weight", tensor)
        for key, tensor in model.state_dict().items()
    ]
    types = {n: matrix_type if t.ndim == 2 else gguf.GGMLQuantizationType.F32 for n, t in tensors}
    with new_file(path) as file:
        # The writer opens the file by its name; the name goes, the content stays.
        writer = gguf.GGUFWriter(Path(file.name), "gemma3")
        _add_origin(writer, origin)
        _add_config(writer, model.config, dtype)
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(vocabulary.tokens)
        writer.add_token_scores(vocabulary.scores)
        writer.add_token_types(vocabulary.types)
        writer.add_bos_token_id(tokenizer.bos_id)
        writer.add_eos_token_id(tokenizer.eos_id)
        writer.add_pad_token_id(tokenizer.pad_id)
        if "<unk>" in vocabulary.tokens:
            writer.add_unk_token_id(vocabulary.tokens.index("<unk>"))
        writer.add_add_bos_token(True)
        writer.add_add_eos_token(False)
        writer.add_add_space_prefix(False)
        for name, tensor in tensors:
            shape = gguf.quant_shape_to_byte_shape(tuple(tensor.shape), types[name])
            num_bytes = int(np.prod(shape))
            writer.add_tensor_info(name, shape, np.dtype(np.uint8), num_bytes, types[name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in tensors:
            values = tensor.float().cpu().numpy()
            if name.endswith("norm.weight"):
                values = values + 1  # llama.cpp's norms multiply by the weight, Gemma's by 1 more
            writer.write_tensor_data(gguf.quants.quantize(values, types[name]).view(np.uint8))
        writer.close()


def _add_origin(writer: Any, origin: Origin) -> None:
    """Writes what is known; an empty text would be a statement."""
    for key, value in vars(origin).items():
        if value:
            getattr(writer, f"add_{key}")(value)


def _add_config(writer: Any, config: Gemma3Config, dtype: str) -> None:
    file_type = "ALL_F32" if dtype == "f32" else f"MOSTLY_{dtype.upper()}"
    writer.add_type("model")
    writer.add_file_type(int(gguf.LlamaFileType[file_type]))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
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
    problems = [
        f"{name} is {getattr(config, name)}, not {expected}"
        for name, expected in (
            ("sliding_window_pattern", _LAYER_PATTERN),
            ("rope_local_base_freq", _LOCAL_ROPE_BASE),
            ("query_pre_attn_scalar", config.head_dim),
        )
        if getattr(config, name) != expected
    ]
    widths = (config.hidden_size, config.intermediate_size)
    if dtype == "q8_0" and any(width % 32 for width in widths):
        problems.append(f"q8_0 needs widths that are multiples of 32, not {widths}")
    if problems:
        raise UserError(
            f"llama.cpp cannot run this shape: {problems[0]}",
            where="config.json",
            fix="Train a shape of training.py --model, or choose another --format or --dtype.",
            exit_code=ExitCode.NOT_A_MODEL,
        )
