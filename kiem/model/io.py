"""Model directories: config.json and model.safetensors, as transformers writes and reads them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kiem.core.disk import fsync
from kiem.core.errors import ExitCode, UserError, damaged
from kiem.core.files import new_file, sha256_file, write_json
from kiem.core.manifest import MANIFEST_FILE, read_manifest, verify_manifest
from kiem.hub.transfer import download_model, looks_like_hub_id
from kiem.model.config import (
    CONFIG_FILE,
    Gemma3Config,
    check_folder,
    describe,
    not_a_model,
    read_config,
)
from kiem.model.gemma3 import Gemma3
from kiem.tokenizer.tokenizer import Tokenizer, load_tokenizer

WEIGHTS_FILE = "model.safetensors"
_PARTS = "model-*.safetensors"  # of a model that several files share
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
_FIX = "Copy or download it again, or train it again."
_FLOATS = ("F32", "BF16", "F16", "F64")
_OUTPUT_LAYER = "lm_head.weight"


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
                if hasattr(os, "posix_fadvise"):  # not on macOS
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            hashing.result()
    return digest.hexdigest()


def split_tensors(header: bytes, data: Tensor) -> dict[str, Tensor]:
    """Returns the tensors of a file of `write_weights`, which share the memory of its data.

    Args:
        header: the JSON at the start of the file, without its length.
        data: uint8, what follows the header.
    """
    dtypes = {name: dtype for dtype, name in _SAFETENSORS_DTYPES.items()}
    tensors = {}
    for name, entry in json.loads(header).items():
        if name != "__metadata__":
            values = data[slice(*entry["data_offsets"])].view(dtypes[entry["dtype"]])
            tensors[name] = values.view(entry["shape"])
    return tensors


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


def read_model(
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Gemma3:
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
    verify_model(folder)
    config = read_config(folder)
    weights = _read_weights(folder)
    with torch.device("meta"):
        model = Gemma3(config)
    expected = model.state_dict()
    for name, tensor in expected.items():
        found = list(weights[name].shape) if name in weights else "missing"
        if found != list(tensor.shape):
            what = f"{name} is {found}; by {CONFIG_FILE} it should be {list(tensor.shape)}"
            raise not_a_model(folder, what)
    if extra := sorted(weights.keys() - expected.keys()):
        raise not_a_model(folder, f"{extra[0]} is there; by {CONFIG_FILE} it should not be")
    dtypes = {tensor.dtype for tensor in weights.values()}
    if dtype is None and (len(dtypes) > 1 or torch.float64 in dtypes):
        dtype = torch.float32  # a model computes in one precision
    weights = {name: tensor.to(device=device, dtype=dtype) for name, tensor in weights.items()}
    model.load_state_dict(weights, assign=True)
    return model


def verify_model(folder: Path, without: tuple[str, ...] = ()) -> None:
    """Checks the files of a model directory against its manifest, if it has one.

    Args:
        folder: a model directory.
        without: files that are not used.

    Raises:
        UserError: there is no such folder, or a file is missing or damaged.
    """
    check_folder(folder)
    if (folder / MANIFEST_FILE).exists():
        verify_manifest(folder, _FIX, without)


def weight_files(folder: Path) -> list[Path]:
    """Returns the files of a model directory that have its weights."""
    whole = folder / WEIGHTS_FILE
    return [whole] if whole.is_file() else sorted(folder.glob(_PARTS))


def hash_weights(folder: Path) -> dict[str, str]:
    """Returns the SHA-256 of the files with weights, by name, of a model directory that was read.

    The manifest, if there is one, names them: `read_model` has compared them.
    """
    known = read_manifest(folder, _FIX) if (folder / MANIFEST_FILE).exists() else {}
    return {
        file.name: known[file.name].sha256 if file.name in known else sha256_file(file)
        for file in weight_files(folder)
    }


def read_model_tokenizer(
    folder: Path, config: Gemma3Config, loaded: Tokenizer | None = None
) -> Tokenizer:
    """Loads the tokenizer in a model directory, if that is not done, and checks that it fits.

    Raises:
        UserError: there is none, or it can produce ids for which the model has no row.
    """
    tokenizer = loaded or load_tokenizer(str(folder))
    if tokenizer.num_rows > config.vocab_size:
        raise UserError(
            f"the tokenizer has ids up to {tokenizer.num_rows - 1}, the model only "
            f"{config.vocab_size} rows",
            where=str(folder),
            fix="Put the tokenizer.json that the model was trained with into the folder.",
            exit_code=ExitCode.TOKENIZER_MISMATCH,
        )
    return tokenizer


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """Returns all weights by name; those of the output layer, which are tied, are left out.

    Raises:
        UserError: a file is missing or damaged, or holds what cannot be a weight; names it.
    """
    files = weight_files(folder)
    if not files:
        raise not_a_model(folder, f"there is no {WEIGHTS_FILE}")
    weights: dict[str, Tensor] = {}
    for path in files:
        with _opened(path) as file:
            for name in file.keys():  # noqa: SIM118 - it is not a dict
                if name == _OUTPUT_LAYER:
                    continue
                dtype = file.get_slice(name).get_dtype()
                if dtype not in _FLOATS:
                    raise not_a_model(path, f"{name} is {dtype}, not one of {', '.join(_FLOATS)}")
                weights[name] = file.get_tensor(name)
    return weights


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Opens a safetensors file; the error for a damaged one names it."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        fix = "The file is damaged or cut short: copy or download it again."
        raise damaged(str(path), f"the weights cannot be read ({error})", fix) from error
