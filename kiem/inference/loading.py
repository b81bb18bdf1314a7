"""Loading of a model directory for inference."""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from kiem.compute.kernels import SOURCE, Weight, load_kernels
from kiem.compute.native import read_sources
from kiem.compute.quantize import LargePages
from kiem.compute.speed import check_bf16, prefers_bf16
from kiem.core.cache import cache_folder
from kiem.core.errors import UserError, bad_option, damaged
from kiem.core.files import new_folder, remove_folder
from kiem.core.manifest import MANIFEST_FILE, read_manifest, write_manifest
from kiem.inference.decoder import use_kernels, use_packed
from kiem.model.config import CONFIG_FILE, read_config
from kiem.model.gemma3 import Gemma3
from kiem.model.io import (
    WEIGHTS_FILE,
    find_model,
    read_model,
    read_model_tokenizer,
    split_tensors,
    verify_model,
    weight_files,
    write_weights,
)
from kiem.parallel.launch import choose_device
from kiem.tokenizer.tokenizer import Tokenizer

# Quantized weights of larger files are kept: those of smaller ones are made in less than a second.
KEPT_FROM_BYTES = 300_000_000
_MOST_KEPT = 4

QuantizedFormat = Literal["int8", "int4"]


@dataclass(frozen=True)
class LoadedModel:
    """A model ready for inference.

    Attributes:
        model: in evaluation mode, on its device.
        tokenizer: its tokenizer.
        load_seconds: how long loading took.
        warning: why it decodes more slowly than it could, if so.
        kept: where its quantized weights have just been put for the next time, if so.
    """

    model: Gemma3
    tokenizer: Tokenizer
    load_seconds: float
    warning: str | None = None
    kept: Path | None = None


def load_for_inference(
    path: str,
    precision: Literal["auto", "fp32", "bf16"],
    quantize: Literal["none", "int8", "int4"] | None = None,
    tokenizer: Tokenizer | None = None,
) -> LoadedModel:
    """Loads a model directory, or downloads one when `path` is a Hub id and no folder.

    Args:
        path: the folder or Hub id.
        precision: "auto" is fp32 where bf16 is slow; elsewhere bf16 on GPUs and for quantized
            weights, and as in the file for others.
        quantize: the form of the weights for the engine; None: as in the plain model, which
            decodes more slowly.
        tokenizer: the model's, if it has been loaded.

    Raises:
        UserError: it is not a Gemma 3 text model, its tokenizer does not fit, it cannot be
            quantized here, the GPU has no bf16, or there are fewer GPUs than processes.
    """
    started = time.perf_counter()
    folder = find_model(path)
    device = choose_device()
    on_gpu = device.type == "cuda"
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}.get(precision)
    if precision == "bf16":
        check_bf16(device)
    if precision == "auto" and (on_gpu or not prefers_bf16(device)):
        dtype = torch.bfloat16 if prefers_bf16(device) else torch.float32
    warning = kept = None
    if quantize is not None and quantize != "none":
        if on_gpu:
            what = "weights are quantized on CPUs only, and here is a GPU"
            raise bad_option(f"--quantize {quantize}", what, "Leave it out.")
        model, tokenizer, kept = _load_quantized(
            folder, quantize, dtype or torch.bfloat16, tokenizer
        )
    else:
        # Kernels for activations in fp32 read weights as they are stored.
        has_kernels = quantize == "none" and not on_gpu
        stored = None if has_kernels and dtype == torch.float32 else dtype
        model = read_model(folder, dtype=stored, device=device)
        reason = use_kernels(model, "none", dtype) if has_kernels else None
        if reason is not None:
            model.to(dtype or model.dtype)
            warning = f"The fast matrix products are not used: {reason}."
    model.requires_grad_(False).eval()
    tokenizer = read_model_tokenizer(folder, model.config, tokenizer)
    return LoadedModel(model, tokenizer, time.perf_counter() - started, warning, kept)


def _load_quantized(
    folder: Path, format: QuantizedFormat, dtype: torch.dtype, tokenizer: Tokenizer | None
) -> tuple[Gemma3, Tokenizer | None, Path | None]:
    """Returns a model with quantized weights, its tokenizer if loaded, and where weights were put.

    Quantizing gemma3-1b takes seconds, as does hashing the weights that it is made from. What was
    kept is read and verified instead.
    """
    kept = None
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: the user has no home folder
        kept = cache_folder() / f"quantized-{_identity(folder, format, dtype)}"
        with contextlib.suppress(UserError, ValueError):  # damaged: they are made again
            if kept.is_dir() and not isinstance(load_kernels(), str):
                return *_read_kept(kept, folder, format, dtype, tokenizer), None
    model = read_model(folder)
    reason = use_kernels(model, format, dtype)
    if reason is not None:
        raise bad_option(f"--quantize {format}", f"{folder}: {reason}", "Leave it out.")
    if kept is None or sum(path.stat().st_size for path in weight_files(folder)) < KEPT_FROM_BYTES:
        return model, tokenizer, None
    try:
        with new_folder(kept, overwrite=True) as unfinished:
            hashed = write_weights(dict(model.state_dict()), unfinished / WEIGHTS_FILE)
            write_manifest(unfinished, {WEIGHTS_FILE: hashed})
        others = sorted(kept.parent.glob("quantized-*"), key=lambda path: path.stat().st_mtime)
        for path in others[:-_MOST_KEPT]:
            remove_folder(path)
    except (UserError, OSError):  # the disk is full or read-only: it is made each time
        return model, tokenizer, None
    return model, tokenizer, kept


def _identity(folder: Path, format: str, dtype: torch.dtype) -> str:
    """Returns a digest of all that kept weights depend on, without reading large files."""
    parts = [format.encode(), str(dtype).encode(), *read_sources(SOURCE)]
    if (folder / MANIFEST_FILE).exists():  # it has the hashes of all others
        parts.append((folder / MANIFEST_FILE).read_bytes())
    else:
        parts.append((folder / CONFIG_FILE).read_bytes())
        for path in weight_files(folder):
            stat = path.stat()
            parts.append(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _read_kept(
    kept: Path,
    folder: Path,
    format: QuantizedFormat,
    dtype: torch.dtype,
    tokenizer: Tokenizer | None,
) -> tuple[Gemma3, Tokenizer]:
    """Returns a model with kept weights, and its tokenizer, which is loaded meanwhile.

    Raises:
        UserError: a file is missing or damaged, or the tokenizer does not fit.
        OSError, ValueError: there are no kept weights.
    """
    verify_model(folder, without=(WEIGHTS_FILE,))
    sha256 = read_manifest(kept, fix="")[WEIGHTS_FILE].sha256
    with torch.device("meta"):
        model = Gemma3(read_config(folder))
    with (kept / WEIGHTS_FILE).open("rb") as file, ThreadPoolExecutor(2) as pool:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        start = 8 + int.from_bytes(mapped[:8], "little")  # of the data, after a JSON header
        # Loading Gemma's tokenizer holds Python's lock for a second or more. Each of these is one
        # call that does without it.
        hashing = pool.submit(hashlib.sha256, mapped)
        copying = pool.submit(
            LargePages().copy, torch.frombuffer(mapped, dtype=torch.uint8)[start:]
        )
        tokenizer = read_model_tokenizer(folder, model.config, tokenizer)
        tokenizer.encode("")  # loads it
        if hashing.result().hexdigest() != sha256:
            raise damaged(str(kept / WEIGHTS_FILE), "damaged", fix="")
        tensors = split_tensors(mapped[8:start], copying.result())
    norms = {name: tensors[name] for name in model.state_dict() if name in tensors}
    model.load_state_dict(norms, strict=False, assign=True)

    def packed(name: str, weight: Tensor) -> Weight:
        data, scales = (tensors[f"model.{name}.{part}"] for part in ("data", "scales"))
        return Weight(data, scales, weight.shape[0], weight.shape[1], format)

    use_packed(model, dtype, packed)
    return model, tokenizer
