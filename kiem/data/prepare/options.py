"""Checks of preprocessing's options that need nothing but the options."""

from __future__ import annotations

import dataclasses

from kiem.config import PreprocessOptions
from kiem.core.errors import ExitCode, UserError, no_effect
from kiem.data.read.find_files import check_one_reader
from kiem.data.read.sources import DEFAULT_HUB_SIZE, check_hub_size, word_limit


def check_options(options: PreprocessOptions) -> None:
    """Checks combinations of options.

    Raises:
        UserError: an option cannot have an effect, or its text stands for nothing.
    """
    check_one_reader(source=options.source, decontaminate=options.decontaminate)
    if options.source == ("hub",):
        check_hub_size(options.dataset_size or DEFAULT_HUB_SIZE)
    else:
        word_limit(options.dataset_size)
    is_cleaned = options.clean != "none" or options.near_duplicates or options.decontaminate
    if options.ray_address is not None and options.executor != "ray":
        raise no_effect("--ray-address", "without --executor ray")
    if options.keep_rejected and not is_cleaned and options.on_bad_document == "stop":
        raise UserError(
            "has no effect: nothing is rejected",
            where="--keep-rejected",
            fix="Leave it out, or give --clean, --near-duplicates, --decontaminate or "
            "--on-bad-document skip as well.",
            exit_code=ExitCode.NO_EFFECT,
        )
    if options.text_column != "text" and options.source == ("sample",):
        raise no_effect("--text-column", "with --source sample")


def check_verify_alone(options: PreprocessOptions) -> None:
    """Checks that nothing else is asked for beside `--verify`.

    Raises:
        UserError: names what is.
    """
    for field in dataclasses.fields(options):
        if field.name != "verify" and getattr(options, field.name) != field.default:
            raise no_effect(f"--{field.name.replace('_', '-')}", "together with --verify")
