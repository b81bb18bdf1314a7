"""The command `kiem generate`: continuations on the screen, or another mode of inference.py."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path

from rich.console import Console

from kiem.compute.memory import is_out_of_memory
from kiem.config import InferenceOptions
from kiem.core.console import show, warn
from kiem.core.errors import (
    ExitCode,
    UserError,
    bad_input,
    bad_option,
    no_effect,
    not_installed,
)
from kiem.core.files import check_new_file
from kiem.core.values import given_options, option_flag
from kiem.inference.benchmark import run_benchmark
from kiem.inference.engine import Engine, Request
from kiem.inference.generate_file import generate_file
from kiem.inference.loading import LoadedModel, load_for_inference
from kiem.inference.repl import run_repl
from kiem.inference.sampling import SamplingParams
from kiem.parallel.launch import read_place, use_processors

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
    # Check all that can be checked before the model is loaded.
    _check_options(options)
    params = SamplingParams(**{f.name: getattr(options, f.name) for f in fields(SamplingParams)})
    is_filtered = options.top_p != 0.9 or options.top_k != 0 or options.min_p != 0
    if params.is_greedy and is_filtered:
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
    use_processors(console)
    with contextlib.ExitStack() as stack, _memory_errors():
        if options.serve:
            try:
                from kiem.inference.server.serve import prepare_server, serve
            except ImportError as error:
                raise not_installed("starlette uvicorn prometheus-client", "--serve") from error
            listening = stack.enter_context(prepare_server(options))
        loaded = load_for_inference(options.model_path, options.precision, options.quantize)
        if loaded.warning is not None:
            warn(console, loaded.warning)
        if loaded.kept is not None:
            console.print(f"{loaded.kept}: the {options.quantize} weights, for the next start")
        if options.benchmark:
            run_benchmark(loaded, options.json, options.model_path, console)
        elif options.serve:
            serve(loaded, params, options, listening, console)
        elif options.interactive:
            run_repl(loaded, params, options, console)
        elif options.output_file is not None:
            generate_file(loaded, prompts, params, options, place, console)
        else:
            _generate_to_screen(loaded, prompts, params, options, console)


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


@contextlib.contextmanager
def _memory_errors() -> Iterator[None]:
    """Turns an allocator's refusal into a message."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            "there is not enough memory",
            fix="Give smaller --max-context, --max-requests, --max-new-tokens or "
            "--num-return-sequences; --quantize makes the model smaller.",
            exit_code=ExitCode.OUT_OF_MEMORY,
        ) from error


def _generate_to_screen(
    loaded: LoadedModel,
    prompts: Sequence[str],
    params: SamplingParams,
    options: InferenceOptions,
    console: Console,
) -> None:
    """Continues prompts one after the other, and streams the first continuation of each."""
    num_sequences = options.num_return_sequences
    encoded = loaded.tokenizer.encode_batch(prompts)
    max_tokens = 1 + max(map(len, encoded)) + params.max_new_tokens
    engine = Engine(
        loaded.model, loaded.tokenizer, max_requests=num_sequences, max_tokens=max_tokens
    )
    for number, (prompt, ids) in enumerate(zip(prompts, encoded, strict=True)):
        started = time.perf_counter()
        texts = [""] * num_sequences
        num_tokens = 0
        console.print("> " if number == 0 else "\n> ", style="bold", end="")
        show(console, prompt)
        prompt_ids = [loaded.tokenizer.bos_id, *ids]
        requests = (
            Request(prompt_ids, params, options.seed, number, sequence)
            for sequence in range(num_sequences)
        )
        for sequence, output in engine.stream(requests):
            texts[sequence] += output.text
            num_tokens += output.num_tokens
            if sequence == 0:
                show(console, output.text)
        show(console, "\n")
        for sequence, text in enumerate(texts[1:], start=2):
            console.print(f"({sequence}) ", style="dim", end="")
            show(console, f"{prompt}{text}\n")
        rate = num_tokens / (time.perf_counter() - started)
        console.print(f"{num_tokens} tokens, {rate:.1f} tokens/s", style="dim")


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
