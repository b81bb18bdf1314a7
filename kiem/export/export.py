"""Export of a model directory: write it in another format, upload it."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console

from kiem.config import ExportOptions
from kiem.core.errors import already_exists, bad_option, no_effect, not_installed
from kiem.core.files import check_new_file, format_bytes, new_folder, write_bytes
from kiem.core.manifest import write_manifest
from kiem.hub.transfer import looks_like_hub_id, upload
from kiem.model.config import CONFIG_FILE
from kiem.model.gemma3 import Gemma3
from kiem.model.io import find_model, read_model, read_model_tokenizer, write_model
from kiem.tokenizer.tokenizer import Tokenizer, write_tokenizer

_TORCH_DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
# Files that describe a model and are the same in every precision.
_COPIED_FILES = ("README.md", "training_summary.json")


def export(options: ExportOptions, console: Console) -> None:
    """Runs export.py.

    Raises:
        UserError: a mistake in the options, the model, or of disk or Hub.
    """
    _check_options(options)
    # Read.
    is_gguf, output = options.format == "gguf", options.output
    if is_gguf:
        try:
            from kiem.export.gguf_file import read_card, write_gguf
        except ImportError as error:
            raise not_installed("gguf", "--format gguf") from error
        check_new_file(output)
    folder = find_model(options.model_path)
    model = read_model(folder)
    tokenizer = read_model_tokenizer(folder, model.config)
    # Write.
    if is_gguf:
        write_gguf(model, tokenizer, read_card(folder), options.dtype, output)
    else:
        _write_folder(model, tokenizer, folder, options)
    files = sorted(output.iterdir()) if output.is_dir() else [output]
    size = sum(path.stat().st_size for path in files)
    console.print(f"{output}: {format_bytes(size)}, {options.dtype}")
    # Upload.
    if options.push_to_hub is not None and options.dry_run:
        console.print(f"would be uploaded to {options.push_to_hub}, but for --dry-run:")
        for path in files:
            console.print(f"  {path.name}  {format_bytes(path.stat().st_size)}")
    elif options.push_to_hub is not None:
        url = upload(options.push_to_hub, output, private=options.private)
        console.print(f"uploaded: {url}")


def _write_folder(
    model: Gemma3, tokenizer: Tokenizer, source: Path, options: ExportOptions
) -> None:
    with new_folder(options.output, overwrite=options.output.exists()) as unfinished:
        model.to(_TORCH_DTYPES[options.dtype])
        known = write_model(model, unfinished, tokenizer.special_ids)
        write_tokenizer(tokenizer, unfinished)
        for name in _COPIED_FILES:
            if (source / name).is_file():
                write_bytes(unfinished / name, (source / name).read_bytes())
        write_manifest(unfinished, known, without=("README.md",))


def _check_options(options: ExportOptions) -> None:
    output, where = options.output, f"--output {options.output}"
    if options.format == "safetensors" and options.dtype == "q8_0":
        fix = "Choose bf16, f16 or f32, or --format gguf."
        raise bad_option("--dtype q8_0", "safetensors has no q8_0", fix)
    if options.format == "gguf" and (output.suffix != ".gguf" or output.is_dir()):
        raise bad_option(where, "not the name of a GGUF file", "Name one, such as model.gguf.")
    if options.push_to_hub is None:
        if options.dry_run:
            raise no_effect("--dry-run", "without --push-to-hub")
        if not options.private:
            raise no_effect("--no-private", "without --push-to-hub")
    elif not looks_like_hub_id(options.push_to_hub):
        where = f"--push-to-hub {options.push_to_hub}"
        raise bad_option(where, "not a Hub name", "Write it as OWNER/NAME.")
    if not output.exists():
        return
    if not options.overwrite:
        raise already_exists(where, "it exists already", "Choose another name, or --overwrite.")
    # --overwrite replaces a folder with all that is in it.
    is_model = output.resolve() == Path(options.model_path).resolve()
    if is_model or (options.format == "safetensors" and not (output / CONFIG_FILE).is_file()):
        what = "--overwrite replaces an earlier export, and this is something else"
        raise already_exists(where, what, "Choose another name.")
