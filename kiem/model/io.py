"""Model directories: config.json and model.safetensors, as transformers writes and reads them."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kiem.core.disk import fsync
from kiem.core.errors import ExitCode, UserError, damaged
from kiem.core.files import new_file, write_json
from kiem.core.json_input import read_json, shown
from kiem.core.manifest import MANIFEST_FILE, verify_manifest
from kiem.hub import download_model, looks_like_hub_id
from kiem.model.config import (
    CONFIG_FILE,
    NOT_A_MODEL,
    Gemma3Config,
    check_folder,
    describe,
    not_a_model,
    read_config,
)
from kiem.model.gemma3 import Gemma3
from kiem.tokenizer.tokenizer import Tokenizer, load_tokenizer

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
# A tensor of this size leaves the page cache before the next one, which then reuses its pages: for
# new ones a virtual machine takes twice as long.
_SYNC_BYTES = 8 << 20
_FLOATS = ("F32", "BF16", "F16", "F64")
_OUTPUT_LAYER = "lm_head.weight"
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


class _Index(msgspec.Struct):
    """model.safetensors.index.json."""

    weight_map: dict[str, Any]


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
    dtype = str(model.model.embed_tokens.weight.dtype).removeprefix("torch.")
    write_json(folder / CONFIG_FILE, {**describe(model.config, dtype), **ids})
    write_json(
        folder / "generation_config.json",
        {"do_sample": True, "cache_implementation": "hybrid", **ids},
    )
    return {WEIGHTS_FILE: write_weights(dict(model.state_dict()), folder / WEIGHTS_FILE)}


def write_weights(tensors: dict[str, Tensor], path: Path) -> str:
    """Writes tensors as safetensors, with the metadata that transformers asks for.

    The format is simple (https://huggingface.co/docs/safetensors). The library's own `save_file`
    reports a full disk without its errno and makes files that only their owner can read; here the
    hash is computed as well, from memory, while each tensor is written.

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
    digest = hashlib.sha256()
    with new_file(path) as file, ThreadPoolExecutor(1) as hasher:
        for block in chain([start_of_file], (_bytes_of(tensors[name]) for name in names)):
            hashing = hasher.submit(digest.update, block)
            file.write(block)
            if len(block) >= _SYNC_BYTES:
                fsync(file.fileno(), path)
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            hashing.result()
    return digest.hexdigest()


def _bytes_of(tensor: Tensor) -> memoryview:
    """Returns a tensor's bytes, without a copy where it is contiguous and on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def find_model(name: str) -> Path:
    """Returns the folder of a model: `name` itself, or a download when it is a Hub id and no path.

    Raises:
        UserError: the Hub does not give it; a folder is looked at only when it is read.
    """
    folder = Path(name)
    return download_model(name) if looks_like_hub_id(name) and not folder.exists() else folder


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
    check_folder(folder)
    if (folder / MANIFEST_FILE).exists():
        verify_manifest(folder, fix="Copy or download it again, or train it again.")
    config = read_config(folder)
    paths, weights = _read_weights(folder)
    num_layers = len({match[1] for name in weights if (match := _LAYER.match(name))})
    if num_layers != config.num_hidden_layers:
        what = f"num_hidden_layers = {config.num_hidden_layers}, but there are weights of "
        raise not_a_model(folder / CONFIG_FILE, f"{what}{num_layers} layers")
    with torch.device("meta"):
        model = Gemma3(config)
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, shape in expected.items():
        if name not in weights:
            raise not_a_model(folder, f"{name} is missing; it should be {shape}")
        if (found := list(weights[name].shape)) != shape:
            what = f"{name} is {found}; by {CONFIG_FILE} it should be {shape}"
            raise not_a_model(paths[name], what)
    if extra := sorted(weights.keys() - expected.keys()):
        raise not_a_model(paths[extra[0]], f"unknown weights: {', '.join(extra[:5])}")
    dtypes = {tensor.dtype for tensor in weights.values()}
    if dtype is None and (len(dtypes) > 1 or torch.float64 in dtypes):
        dtype = torch.float32  # a model computes in one precision
    weights = {name: tensor.to(device=device, dtype=dtype) for name, tensor in weights.items()}
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


def _read_weights(folder: Path) -> tuple[dict[str, Path], dict[str, Tensor]]:
    """Returns the files of all weights, and the weights; tied ones of the output layer left out.

    Raises:
        UserError: a file is missing or damaged, or holds what cannot be a weight; names it.
    """
    paths: dict[str, Path] = {}
    weights: dict[str, Tensor] = {}
    for path in _weight_files(folder):
        with _opened(path) as file:
            for name in file.keys():  # noqa: SIM118 - it is not a dict
                if name == _OUTPUT_LAYER:
                    continue
                if name in paths:
                    raise not_a_model(path, f"{name} is in {paths[name].name} as well")
                dtype = file.get_slice(name).get_dtype()
                if dtype not in _FLOATS:
                    raise not_a_model(path, f"{name} is {dtype}, not one of {', '.join(_FLOATS)}")
                paths[name], weights[name] = path, file.get_tensor(name)
    return paths, weights


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS_FILE).is_file():
        return [folder / WEIGHTS_FILE]
    index = folder / _INDEX_FILE
    if not index.is_file():
        raise not_a_model(folder, f"there is no {WEIGHTS_FILE}")
    places = read_json(index, _Index, **NOT_A_MODEL).weight_map
    for name, file in places.items():
        if not isinstance(file, str) or not re.fullmatch(r"[^/\\\0]+\.safetensors", file):
            what = f"weight_map[{shown(name)}] = {shown(file)}: expected a file of this folder"
            raise not_a_model(index, what)
    return [folder / file for file in sorted(set(places.values()))]


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Opens a safetensors file; the error for a missing or damaged one names it."""
    try:
        if not path.is_file():
            raise FileNotFoundError("no such file")
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        fix = "The file is damaged or cut short: copy or download it again."
        raise damaged(str(path), f"the weights cannot be read ({error})", fix) from error
