"""What inference.py does: continue prompts on the screen, or hand over to something else."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence

from rich.console import Console

from kiem.compute.memory import is_out_of_memory
from kiem.config import InferenceOptions
from kiem.core.console import show, warn
from kiem.core.errors import ExitCode, UserError, no_effect
from kiem.core.files import check_new_file
from kiem.inference.batch import open_processes, write_file
from kiem.inference.benchmark import run_benchmark
from kiem.inference.loading import LoadedModel, load_for_inference
from kiem.inference.prompts import read_prompts
from kiem.inference.repl import talk
from kiem.inference.sampling import Sampling
from kiem.inference.server.serve import check_key, check_packages, open_socket, serve
from kiem.inference.streaming import Writer, request_for


def write(options: InferenceOptions, console: Console) -> None:
    """Runs inference.py.

    Args:
        options: all options of inference.py.
        console: where messages go; text goes to standard output as it comes.

    Raises:
        UserError: anything about options, prompts or the model that a person can mend.
    """
    sampling = _check_options(options)
    is_filtered = options.top_p != 0.9 or options.top_k != 0 or options.min_p != 0
    if sampling.is_greedy and is_filtered:
        warn(console, "--top-k, --top-p and --min-p have no effect with --temperature 0")
    for file in filter(None, (options.json, options.output_file)):
        check_new_file(file)
    reads_prompts = not (options.interactive or options.benchmark or options.serve)
    prompts = read_prompts(options.prompt, options.prompts_file, console) if reads_prompts else []
    with contextlib.ExitStack() as stack, _memory_errors():
        processes = stack.enter_context(open_processes(options.output_file))
        if options.serve:
            check_packages()
            check_key(options.host, options.api_key)
            listening = stack.enter_context(open_socket(options.host, options.port))
        loaded = load_for_inference(options.model_path, options.precision, options.quantize)
        if loaded.warning is not None:
            warn(console, loaded.warning)
        if options.benchmark:
            run_benchmark(loaded, options.json, options.model_path, console)
        elif options.serve:
            serve(loaded, sampling, options, listening, console)
        elif options.interactive:
            talk(loaded, sampling, options, console)
        elif options.output_file is not None:
            write_file(loaded, prompts, sampling, options, processes, console)
        else:
            _write_to_screen(loaded, prompts, sampling, options, console)


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


def _write_to_screen(
    loaded: LoadedModel,
    prompts: Sequence[str],
    sampling: Sampling,
    options: InferenceOptions,
    console: Console,
) -> None:
    """Continues prompts one after the other, showing the first sequence of each as it comes."""
    num_sequences = options.num_return_sequences
    longest = max(map(len, loaded.tokenizer.encode_batch(prompts)))
    max_tokens = 1 + longest + options.max_new_tokens
    writer = Writer(
        loaded.model, loaded.tokenizer, max_requests=num_sequences, max_tokens=max_tokens
    )
    for number, prompt in enumerate(prompts):
        started = time.perf_counter()
        texts = [""] * num_sequences
        num_tokens = 0
        console.print("> " if number == 0 else "\n> ", style="bold", end="")
        show(console, prompt)
        requests = [
            request_for(
                prompt,
                loaded.tokenizer,
                max_new_tokens=options.max_new_tokens,
                sampling=sampling,
                seed=options.seed,
                prompt_number=number,
                sequence=sequence,
            )
            for sequence in range(num_sequences)
        ]
        for piece in writer.stream(requests, options.stop):
            texts[piece.number] += piece.text
            num_tokens += piece.token is not None
            if piece.number == 0:
                show(console, piece.text)
        show(console, "\n")
        for sequence, text in enumerate(texts[1:], start=2):
            console.print(f"({sequence}) ", style="dim", end="")
            show(console, f"{prompt}{text}\n")
        rate = num_tokens / (time.perf_counter() - started)
        console.print(f"{num_tokens} tokens, {rate:.1f} tokens/s", style="dim")


def _check_options(options: InferenceOptions) -> Sampling:
    """Returns the way of choosing tokens, if all options are possible and have an effect."""
    sampling = Sampling(
        options.temperature,
        options.top_k,
        options.top_p,
        options.min_p,
        options.repetition_penalty,
    )
    has_context = options.serve or options.interactive
    if has_context and options.max_context <= options.max_new_tokens:
        what = f"{options.max_context} leaves no room for a prompt"
        raise _bad("--max-context", what, "Give a number above --max-new-tokens.")
    if not all(options.stop):
        raise _bad("--stop", "an empty text ends nothing", "Give texts of at least one character.")
    _check_effects(options)
    return sampling


def _bad(option: str, what: str, fix: str) -> UserError:
    return UserError(what, where=option, fix=fix, exit_code=ExitCode.BAD_OPTION)


def _check_effects(options: InferenceOptions) -> None:
    """Refuses options that have no effect beside the others."""
    modes = {
        "--prompt": options.prompt is not None,
        "--prompts-file": options.prompts_file is not None,
        "--interactive": options.interactive,
        "--serve": options.serve,
        "--benchmark": options.benchmark,
    }
    chosen = [name for name, is_chosen in modes.items() if is_chosen]
    if len(chosen) > 1:
        raise no_effect(chosen[1], f"together with {chosen[0]}")
    if options.json is not None and not options.benchmark:
        raise no_effect("--json", "without --benchmark")
    alone = options.interactive or options.serve or options.benchmark
    if options.output_file is not None and alone:
        raise no_effect("--output-file", f"together with {chosen[0]}")
    default = InferenceOptions(model_path="")
    only = {
        "num_return_sequences": (not alone, "together with " + "".join(chosen)),
        "seed": (not options.serve, "together with --serve"),
        "max_requests": (
            options.serve or options.output_file is not None,
            "without --output-file or --serve",
        ),
        "max_context": (options.serve or options.interactive, "without --interactive or --serve"),
        **dict.fromkeys(
            ("host", "port", "api_key", "max_waiting"), (options.serve, "without --serve")
        ),
    }
    for name, (has_effect, why) in only.items():
        if getattr(options, name) != getattr(default, name) and not has_effect:
            raise no_effect("--" + name.replace("_", "-"), why)
