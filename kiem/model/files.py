"""The model directory: config.json and model.safetensors, as transformers writes and reads them."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kiem.data.hub import download_model, looks_like_hub_id
from kiem.data.tokenizer import Tokenizer, load_tokenizer
from kiem.direct import write_and_hash
from kiem.errors import ExitCode, UserError
from kiem.files import new_file, write_json
from kiem.leftovers import recover_folder
from kiem.manifest import MANIFEST_FILE, verify_manifest
from kiem.model.gemma3 import Gemma3
from kiem.model.presets import Gemma3Config

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"
_SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
}

# Written as they are, and required when read: another value means another architecture.
_FIXED = {
    "model_type": "gemma3_text",
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "tie_word_embeddings": True,
}
_SHAPE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "sliding_window",
    "query_pre_attn_scalar",
    "max_position_embeddings",
    "rms_norm_eps",
)


def write_model(model: Gemma3, folder: Path, special_ids: dict[str, int]) -> dict[str, str]:
    """Writes config.json, generation_config.json and model.safetensors into an unfinished folder.

    Args:
        model: the model; its weights are written in their own dtype.
        folder: a folder that `files.new_folder` made.
        special_ids: the tokenizer's control ids, as `Tokenizer.special_ids`.

    Returns:
        The SHA-256 of the large file, by its name.
    """
    ids = {f"{name}_token_id": token for name, token in special_ids.items()}
    dtype = model.model.embed_tokens.weight.dtype
    write_json(folder / CONFIG_FILE, {**describe(model.config, dtype), **ids})
    write_json(
        folder / "generation_config.json",
        {"do_sample": True, "cache_implementation": "hybrid", **ids},
    )
    return {WEIGHTS_FILE: write_weights(dict(model.state_dict()), folder / WEIGHTS_FILE)}


def describe(config: Gemma3Config, dtype: torch.dtype) -> dict[str, Any]:
    """Returns what config.json says of a model, but for the tokenizer's ids."""
    return {
        "architectures": ["Gemma3ForCausalLM"],
        **_FIXED,
        **{name: getattr(config, name) for name in _SHAPE},
        # Both spellings of the same facts: transformers changed them between 4.50 and 5.
        "sliding_window_pattern": config.sliding_window_pattern,
        "layer_types": _layer_types(config),
        "rope_theta": config.rope_theta,
        "rope_local_base_freq": config.rope_local_base_freq,
        "rope_scaling": None,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def write_weights(tensors: dict[str, Tensor], path: Path) -> str:
    """Writes tensors as safetensors, with the metadata that transformers asks for.

    The format is simple (https://huggingface.co/docs/safetensors) and written here, so that the
    hash is computed beside the writing, from what is in memory, and a full disk is an OSError.

    Returns:
        The SHA-256 of the file.

    Raises:
        UserError: the disk is full, or the folder cannot be written to.
    """
    # Large elements first, so that all are aligned.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        tensor, start = tensors[name], end
        end += tensor.numel() * tensor.element_size()
        shape = list(tensor.shape)
        header[name] = {
            "dtype": _SAFETENSORS_DTYPES[tensor.dtype],
            "shape": shape,
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start_of_file = memoryview(len(text).to_bytes(8, "little") + text)
    with new_file(path) as file:
        return write_and_hash(file, chain([start_of_file], (_bytes_of(tensors[n]) for n in names)))


def _bytes_of(tensor: Tensor) -> memoryview:
    """Returns a tensor's bytes, without a copy where it is contiguous and on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def read_config(folder: Path) -> Gemma3Config:
    """Returns the shape that a model directory's config.json describes.

    Raises:
        UserError: there is no config.json, or it is not that of a Gemma 3 text model.
    """
    path = folder / CONFIG_FILE
    if not folder.is_dir():
        raise UserError(
            "no such model directory",
            where=str(folder),
            fix="Name the final_model/ folder of a run, or a Hub id.",
            exit_code=ExitCode.NOT_FOUND,
        )
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise not_a_model(folder, f"no readable {CONFIG_FILE} ({error.strerror})") from error
    except ValueError as error:
        raise not_a_model(path, f"not JSON ({error})") from error
    return _parse_config(description, path)


def _parse_config(description: Any, path: Path) -> Gemma3Config:
    if not isinstance(description, dict) or description.get("model_type") != "gemma3_text":
        kind = description.get("model_type") if isinstance(description, dict) else None
        raise not_a_model(path, f"not a Gemma 3 text model (model_type is {kind!r})")
    for name, value in _FIXED.items():
        if description.get(name, value) != value:
            raise not_a_model(path, f"{name} = {description[name]!r} is not supported")
    missing = [name for name in _SHAPE if name not in description]
    if missing:
        raise not_a_model(path, f"it lacks {', '.join(missing)}")
    values = {name: description[name] for name in _SHAPE}
    wrong = [name for name, value in values.items() if not isinstance(value, int | float)]
    if wrong:
        raise not_a_model(path, f"{wrong[0]} = {values[wrong[0]]!r} is not a number")
    layers = description["num_hidden_layers"]
    kinds = description.get("layer_types")
    pattern = description.get("sliding_window_pattern")
    if pattern is None:
        pattern = (
            kinds.index("full_attention") + 1 if kinds and "full_attention" in kinds else layers + 1
        )
    rope = description.get("rope_parameters") or {}
    full, sliding = rope.get("full_attention", {}), rope.get("sliding_attention", {})
    config = Gemma3Config(
        **values,
        sliding_window_pattern=pattern,
        rope_theta=full.get("rope_theta", description.get("rope_theta", 1_000_000.0)),
        rope_local_base_freq=sliding.get(
            "rope_theta", description.get("rope_local_base_freq", 10_000.0)
        ),
    )
    scalings = [description.get("rope_scaling"), full, sliding]
    if any(s and s.get("rope_type", "default") != "default" for s in scalings):
        raise not_a_model(path, "scaled rotary angles are not supported")
    if kinds and kinds != _layer_types(config):
        raise not_a_model(path, "this order of layer_types is not supported")
    return config


def _layer_types(config: Gemma3Config) -> list[str]:
    layers = range(config.num_hidden_layers)
    return ["sliding_attention" if config.is_sliding(n) else "full_attention" for n in layers]


def find_model(name: str) -> Path:
    """Returns the folder of a model: `name` itself, or a download when it is a Hub id and no path.

    Raises:
        UserError: the Hub does not give it; a folder is looked at only when it is read.
    """
    folder = recover_folder(Path(name))
    return download_model(name) if not folder.exists() and looks_like_hub_id(name) else folder


def read_model(folder: Path, *, dtype: torch.dtype | None = None, device: str = "cpu") -> Gemma3:
    """Loads a model directory.

    On the CPU in the file's own dtype the weights stay mapped from the file, without a copy. A
    folder with a manifest, as training makes it, is verified before anything in it is used.

    Args:
        folder: a model directory.
        dtype: precision of the weights; None: as in the file.
        device: where to put them.

    Raises:
        UserError: it is not a Gemma 3 text model, or its weights are missing, damaged or misshapen.
    """
    if (folder / MANIFEST_FILE).exists():
        verify_manifest(folder, fix="Copy or download it again, or train it again.")
    config = read_config(folder)
    with torch.device("meta"):
        model = Gemma3(config)
    expected = model.state_dict()
    weights = {}
    for path in _weight_files(folder):
        try:
            with safe_open(path, framework="pt", device=device) as file:
                for name in file.keys():  # noqa: SIM118 - it is not a dict
                    if name != "lm_head.weight":  # tied: the embedding again
                        weights[name] = file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"the weights cannot be read ({error})",
                where=str(path),
                fix="The file is damaged or cut short: copy or download it again.",
                exit_code=ExitCode.DAMAGED,
            ) from error
    for name, parameter in expected.items():
        found = weights[name].shape if name in weights else None
        if found != parameter.shape:
            shape = f"shape {list(found)}" if found else "missing"
            raise not_a_model(folder, f"{name} is {shape}, not {list(parameter.shape)}")
    if len(weights) > len(expected):
        extra = sorted(weights.keys() - expected.keys())
        raise not_a_model(folder, f"unknown weights: {', '.join(extra[:5])}")
    if dtype is not None:
        weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
    model.load_state_dict(weights, assign=True)
    return model


def read_model_tokenizer(folder: Path, config: Gemma3Config) -> Tokenizer:
    """Loads the tokenizer in a model directory.

    Raises:
        UserError: there is none, or it can produce ids for which the model has no row.
    """
    tokenizer = load_tokenizer(str(folder))
    if tokenizer.num_rows > config.vocab_size:
        raise UserError(
            f"the tokenizer has ids up to {tokenizer.num_rows - 1}, the model only "
            f"{config.vocab_size} rows",
            where=str(folder),
            fix="Put the tokenizer.json that the model was trained with into the folder.",
            exit_code=ExitCode.TOKENIZER_MISMATCH,
        )
    return tokenizer


def not_a_model(where: Path, what: str) -> UserError:
    """Returns the error for a folder that does not hold a Gemma 3 text model."""
    return UserError(
        what,
        where=str(where),
        fix="Name a folder with config.json and model.safetensors of a Gemma 3 text model, such "
        "as the final_model/ of a run.",
        exit_code=ExitCode.NOT_A_MODEL,
    )


def _weight_files(folder: Path) -> list[Path]:
    index = folder / _INDEX_FILE
    if (folder / WEIGHTS_FILE).is_file():
        return [folder / WEIGHTS_FILE]
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError) as error:
        raise not_a_model(folder, f"there is no {WEIGHTS_FILE}") from error
    return [folder / name for name in sorted(names)]
