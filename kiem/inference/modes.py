"""What inference.py does with a model: text on the screen, or another mode."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import fields

from rich.console import Console

from kiem.compute.memory import is_out_of_memory
from kiem.config import InferenceOptions
from kiem.core.console import show, warn
from kiem.core.errors import ExitCode, UserError, not_installed
from kiem.inference.benchmark import run_benchmark
from kiem.inference.engine import Engine, Request
from kiem.inference.generate_file import generate_file
from kiem.inference.loading import LoadedModel, load_for_inference
from kiem.inference.repl import run_repl
from kiem.inference.sampling import SamplingParams
from kiem.parallel.launch import Place, use_processors
from kiem.tokenizer.tokenizer import Tokenizer


def run_mode(
    options: InferenceOptions,
    prompts: Sequence[str],
    place: Place,
    tokenizer: Tokenizer | None,
    console: Console,
) -> None:
    """Loads the model and runs the mode that the options choose.

    Args:
        options: those of inference.py, which have been checked.
        prompts: texts to continue, in modes that have any.
        place: of this process.
        tokenizer: the model's, if it has been loaded.
        console: for messages.

    Raises:
        UserError: the model cannot be loaded, or memory ran out.
    """
    params = SamplingParams(**{f.name: getattr(options, f.name) for f in fields(SamplingParams)})
    use_processors(console)
    with contextlib.ExitStack() as stack, _memory_errors():
        if options.serve:
            try:
                from kiem.inference.server.serve import prepare_server, serve
            except ImportError as error:
                raise not_installed("starlette uvicorn prometheus-client", "--serve") from error
            listening = stack.enter_context(prepare_server(options))
        loaded = load_for_inference(
            options.model_path, options.precision, options.quantize, tokenizer
        )
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
