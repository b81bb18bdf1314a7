"""Writer of GGUF files, the format of llama.cpp and programs built on it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gguf
import msgspec
import yaml

from kiem.core.errors import ExitCode, UserError, bad_input
from kiem.core.files import new_file
from kiem.core.json_input import convert
from kiem.export.vocabulary import make_vocabulary
from kiem.model.config import Gemma3Config
from kiem.model.gemma3 import Gemma3
from kiem.tokenizer.tokenizer import Tokenizer

# What llama.cpp takes for granted in Gemma 3 models.
_LAYER_PATTERN = 6
_LOCAL_ROPE_BASE = 10_000.0
_FRONT_MATTER = re.compile(r"\s*---[ \t]*\r?\n(.*?)^---[ \t]*$", re.DOTALL | re.MULTILINE)


class _Entry(msgspec.Struct):
    name: str = ""


class _Card(msgspec.Struct, rename={"model_index": "model-index"}):
    language: str | list[str] = ""
    license: str = ""
    license_name: str = ""
    license_link: str = ""
    model_name: str = ""
    model_index: list[_Entry] | str = ""  # YAML's nothing is a text here


def write_gguf(
    model: Gemma3, tokenizer: Tokenizer, card: dict[str, Any], dtype: str, path: Path
) -> None:
    """Writes a GGUF file; matrices in `dtype`, norms in fp32.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        card: what `read_card` returns.
        dtype: "f32", "f16", "bf16" or "q8_0" (blocks of 32 values with a common scale).
        path: the file.

    Raises:
        UserError: llama.cpp cannot run this shape or tokenizer.
    """
    _check_shape(model.config, dtype)
    vocabulary = make_vocabulary(tokenizer, model.config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3, model.config.num_hidden_layers)
    with new_file(path) as file:
        # The writer opens the file by its name; the name goes, the content stays.
        writer = gguf.GGUFWriter(Path(file.name), "gemma3")
        for key, value in card.items():
            getattr(writer, f"add_{key}")(value)
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
        for key, tensor in model.state_dict().items():
            values = tensor.float().cpu().numpy()
            kind = gguf.GGMLQuantizationType[dtype.upper()]
            if key.endswith("norm.weight"):
                values = values + 1  # llama.cpp's norms multiply by the weight, Gemma's by 1 more
                kind = gguf.GGMLQuantizationType.F32
            name = f"{names[key.removesuffix('.weight')]}.weight"
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def read_card(folder: Path) -> dict[str, Any]:
    """Returns name, languages and licence of a model by gguf's names, as far as its card says them.

    Raises:
        UserError: the head of the card is damaged; names the key.
    """
    path = folder / "README.md"
    fix = "Correct the lines between '---' at its top, or remove the file."
    try:
        text = path.read_text(encoding="utf-8-sig") if path.is_file() else ""
        head = _FRONT_MATTER.match(text)
        # Not SafeLoader, for which the language `no` is false.
        values = yaml.load(head[1], Loader=yaml.BaseLoader) if head else None
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise bad_input(str(path), f"cannot be read ({reason})", fix) from error
    card = convert(values or {}, _Card, where=str(path), fix=fix, exit_code=ExitCode.BAD_INPUT)
    entries = card.model_index if isinstance(card.model_index, list) else []
    known = {
        "name": entries[0].name if entries else card.model_name,
        "languages": [card.language] if isinstance(card.language, str) else card.language,
        "license": card.license,
        "license_name": card.license_name,
        "license_link": card.license_link,
    }
    # An empty text would be a statement.
    return {key: value for key, value in known.items() if value not in ("", [], [""])}


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
    expected = {
        "sliding_window_pattern": _LAYER_PATTERN,
        "rope_local_base_freq": _LOCAL_ROPE_BASE,
        "query_pre_attn_scalar": config.head_dim,
    }
    problems = [
        f"{name} is {getattr(config, name)}, not {value}"
        for name, value in expected.items()
        if getattr(config, name) != value
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
