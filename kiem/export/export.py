"""What export.py does: read a model directory, write it in another format, upload it."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console

from kiem.config import ExportOptions
from kiem.core.console import warn
from kiem.core.errors import ExitCode, UserError, no_effect
from kiem.core.files import (
    check_new_file,
    format_bytes,
    new_folder,
    require_free_space,
    write_bytes,
)
from kiem.core.leftovers import recover_folder
from kiem.core.manifest import write_manifest
from kiem.export.gguf_file import write_gguf
from kiem.export.origin import CARD_FILE, read_origin
from kiem.hub import looks_like_hub_id, upload
from kiem.model.config import CONFIG_FILE
from kiem.model.gemma3 import Gemma3
from kiem.model.io import (
    find_model,
    read_model,
    read_model_tokenizer,
    write_model,
)
from kiem.tokenizer.tokenizer import Tokenizer, write_tokenizer

_BYTES_PER_VALUE = {"f32": 4.0, "bf16": 2.0, "f16": 2.0, "q8_0": 34 / 32}
_TORCH_DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
# Files of a model directory that say what it is and are the same in every precision.
_KEPT_FILES = (CARD_FILE, "training_summary.json")


def export(options: ExportOptions, console: Console) -> None:
    """Runs export.py.

    Args:
        options: all options of export.py.
        console: where messages go.

    Raises:
        UserError: anything about options, model, disk or Hub that a person can mend.
    """
    _check_options(options)
    if options.format == "gguf":
        check_new_file(options.output)
    folder = find_model(options.model_path)
    origin = read_origin(folder, options.model_path)
    model = read_model(folder)
    tokenizer = read_model_tokenizer(folder, model.config)
    needed = int(model.config.num_parameters() * _BYTES_PER_VALUE[options.dtype])
    require_free_space(options.output.parent, needed, "the exported model")
    if options.format == "gguf":
        if missing := [name for name in ("name", "languages", "license") if not vars(origin)[name]]:
            what = f"the GGUF file says nothing of the model's {', '.join(missing)}"
            warn(console, f"{what}: {folder / CARD_FILE} does not either")
        write_gguf(model, tokenizer, origin, options.dtype, options.output)
    else:
        _write_folder(model, tokenizer, folder, options)
    files = _files(options.output)
    size = sum(path.stat().st_size for path in files)
    console.print(f"{options.output}: {format_bytes(size)}, {options.dtype}")
    if options.push_to_hub is None:
        return
    if options.dry_run:
        console.print(f"would be uploaded to {options.push_to_hub}, but for --dry-run:")
        for path in files:
            console.print(f"  {path.name}  {format_bytes(path.stat().st_size)}")
    else:
        url = upload(options.push_to_hub, options.output, private=options.private)
        console.print(f"uploaded: {url}")


def _write_folder(
    model: Gemma3, tokenizer: Tokenizer, source: Path, options: ExportOptions
) -> None:
    with new_folder(options.output, overwrite=options.output.exists()) as unfinished:
        model.to(_TORCH_DTYPES[options.dtype])
        known = write_model(model, unfinished, tokenizer.special_ids)
        write_tokenizer(tokenizer, unfinished)
        for name in _KEPT_FILES:
            if (source / name).is_file():
                write_bytes(unfinished / name, (source / name).read_bytes())
        write_manifest(unfinished, known, without=(CARD_FILE,))


def _files(output: Path) -> list[Path]:
    return sorted(output.iterdir()) if output.is_dir() else [output]


def _check_options(options: ExportOptions) -> None:
    def bad(option: str, what: str, fix: str, code: ExitCode = ExitCode.BAD_OPTION) -> UserError:
        return UserError(what, where=option, fix=fix, exit_code=code)

    output, place = options.output, f"--output {options.output}"
    if options.format == "safetensors" and options.dtype == "q8_0":
        fix = "Choose bf16, f16 or f32, or --format gguf."
        raise bad("--dtype q8_0", "safetensors has no q8_0", fix)
    if options.format == "gguf" and (output.suffix != ".gguf" or output.is_dir()):
        raise bad(place, "this is not the name of a GGUF file", "Name one, such as model.gguf.")
    if options.push_to_hub is None:
        if options.dry_run:
            raise no_effect("--dry-run", "without --push-to-hub")
        if not options.private:
            raise no_effect("--no-private", "without --push-to-hub")
    elif not looks_like_hub_id(options.push_to_hub):
        fix = "Write it as OWNER/NAME."
        raise bad(f"--push-to-hub {options.push_to_hub}", "this is not a Hub name", fix)
    if not recover_folder(output).exists():
        return
    exists = ExitCode.ALREADY_EXISTS
    if not options.overwrite:
        raise bad(place, "it exists already", "Choose another name, or --overwrite.", exists)
    if output.resolve() == Path(options.model_path).resolve():
        raise bad(place, "this is the model itself", "Choose another name.", exists)
    # --overwrite replaces a folder with all that is in it.
    if options.format == "safetensors" and not (output / CONFIG_FILE).is_file():
        what = "it holds something else than a model, which would be lost"
        raise bad(place, what, "Choose another name.", exists)
