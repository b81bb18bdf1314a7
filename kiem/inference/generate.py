"""The command `kiem generate`: continuations on the screen, or another mode of inference.py."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from kiem.config import InferenceOptions
from kiem.core.console import warn
from kiem.core.errors import ExitCode, UserError, bad_input, bad_option, no_effect
from kiem.core.files import check_new_file
from kiem.core.values import given_options, option_flag
from kiem.parallel.launch import read_place
from kiem.tokenizer.process import tokenizer_process
from kiem.tokenizer.tokenizer import Tokenizer, load_tokenizer

_DEFAULT_PROMPTS = (
    "Nederland is een land waar",
    "De geschiedenis van Amsterdam begint",
    "Vandaag heeft de regering besloten dat",
    "Het belangrijkste verschil tussen een fiets en een auto is",
    "Er was eens een klein meisje dat",
)


def generate(options: InferenceOptions, console: Console) -> None:
    """Runs inference.py; messages go to the console, text to standard output as it comes.

    Raises:
        UserError: an option, the prompts or the model cannot be used.
    """
    # Check all that can be checked before torch is imported and the model loaded.
    _check_options(options)
    is_filtered = options.top_p != 0.9 or options.top_k != 0 or options.min_p != 0
    if options.temperature == 0 and is_filtered:
        warn(console, "--top-k, --top-p and --min-p have no effect with --temperature 0")
    for file in filter(None, (options.json, options.output_file)):
        check_new_file(file)
    reads_prompts = not (options.interactive or options.benchmark or options.serve)
    prompts = read_prompts(options.prompt, options.prompts_file, console) if reads_prompts else []
    place = read_place()
    if place.world_size > 1 and options.output_file is None:
        what = f"several processes need a file to write to, and {place.world_size} were started"
        fix = "Start one with plain python, or give --prompts-file and --output-file."
        raise bad_option("--output-file", what, fix)

    # Load the model and run the chosen mode.
    is_read_as_it_comes = reads_prompts and options.output_file is None
    with _tokenizer_ahead(options.model_path, is_read_as_it_comes) as tokenizer:
        from kiem.inference.modes import run_mode  # slow to import, since it needs torch

        run_mode(options, prompts, place, tokenizer, console)


@contextlib.contextmanager
def _tokenizer_ahead(model_path: str, is_read_as_it_comes: bool) -> Iterator[Tokenizer | None]:
    """Yields the model's tokenizer if a process of its own loads it while this one imports torch.

    Not in other modes: asking the process for each token takes longer, and an answer would be left
    behind where Ctrl-C ends a text and not the program.
    """
    tokenizer = None
    if is_read_as_it_comes and Path(model_path).is_dir():
        with contextlib.suppress(UserError):  # comes again where the model is loaded
            tokenizer = load_tokenizer(model_path)
    if tokenizer is None or not tokenizer.loads_slowly:
        yield None
        return
    with tokenizer_process(tokenizer, 1, _tokenizer_ended) as (client,):
        yield replace(tokenizer, client=client)


def _tokenizer_ended() -> UserError:
    return UserError(
        "the tokenizer's process was ended from outside",
        fix="Run the same command again; if memory ran out, close other programs before.",
        exit_code=ExitCode.OUT_OF_MEMORY,
    )


def read_prompts(
    prompt: str | None, path: Path | None, console: Console | None = None
) -> list[str]:
    """Returns the one prompt, those of a file, or the default ones.

    Raises:
        UserError: the file is missing, empty or malformed; names the line.
    """
    if prompt is not None:
        return [prompt]
    if path is None:
        return list(_DEFAULT_PROMPTS)
    # Here, since most runs read no file, for which pyarrow would be imported.
    from kiem.data.read.formats import READABLE
    from kiem.data.read.readers import read_documents
    from kiem.data.read.sources import local_source
    from kiem.data.read.text_files import EVERY_LINE

    fix = f'Give one prompt a line (.txt), or a column or key "prompt" ({READABLE}).'
    try:
        source = local_source([str(path)], "--prompts-file", console, EVERY_LINE)
        prompts = [row.text for row in read_documents(source, "prompt", fix) if row.text]
    except UserError as error:
        if error.exit_code == ExitCode.BAD_INPUT:
            error.fix = fix  # the readers' own advice is about documents
        raise
    if not prompts:
        raise bad_input(str(path), "the file has no prompts", fix)
    return prompts


def _check_options(options: InferenceOptions) -> None:
    """Refuses what is not possible, and options that have no effect beside the others."""
    has_context = options.serve or options.interactive
    if has_context and options.max_context <= options.max_new_tokens:
        what = f"{options.max_context} leaves no room for a prompt"
        raise bad_option("--max-context", what, "Give a number above --max-new-tokens.")
    if not all(options.stop):
        what, fix = "an empty text ends nothing", "Give texts of at least one character."
        raise bad_option("--stop", what, fix)
    given = given_options(options)
    modes = ("prompt", "prompts_file", "interactive", "serve", "benchmark")
    chosen = [option_flag(name) for name in modes if name in given]
    if len(chosen) > 1:
        raise no_effect(chosen[1], f"together with {chosen[0]}")
    mode = "".join(chosen)
    alone = ("--interactive", "--serve", "--benchmark")
    for name, has_effect, why in (
        ("json", options.benchmark, "without --benchmark"),
        ("output_file", mode not in alone, f"together with {mode}"),
        ("num_return_sequences", mode not in alone, f"together with {mode}"),
        ("seed", not options.serve, "together with --serve"),
        (
            "max_requests",
            options.serve or options.output_file is not None,
            "without --output-file or --serve",
        ),
        ("max_context", has_context, "without --interactive or --serve"),
        *((name, options.serve, "without --serve") for name in ("host", "port", "api_key")),
        ("max_waiting", options.serve, "without --serve"),
    ):
        if name in given and not has_effect:
            raise no_effect(option_flag(name), why)
