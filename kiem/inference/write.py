"""What inference.py does: continue prompts on the screen or into a file, or hand over to others."""

from __future__ import annotations

import json
import time
from typing import Any

from rich.console import Console

from kiem.cli import warn
from kiem.config import InferenceOptions
from kiem.errors import ExitCode, UserError, no_effect
from kiem.files import write_text
from kiem.inference.benchmark import run_benchmark
from kiem.inference.loading import LoadedModel, load_for_inference
from kiem.inference.repl import talk
from kiem.inference.sampling import Sampling
from kiem.inference.streaming import stream_text
from kiem.inference.text import show

DEFAULT_PROMPTS = (
    "Nederland is een land waar",
    "De geschiedenis van Amsterdam begint",
    "Vandaag heeft de regering besloten dat",
    "Het belangrijkste verschil tussen een fiets en een auto is",
    "Er was eens een klein meisje dat",
)


def write(options: InferenceOptions, console: Console) -> None:
    """Runs inference.py.

    Args:
        options: all options of inference.py.
        console: where messages go; text goes to standard output as it comes.

    Raises:
        UserError: anything about options, prompts or the model that a person can mend.
    """
    sampling = _check_options(options)
    if options.temperature == 0 and (options.top_p != 0.9 or options.top_k != 0):
        warn(console, "--top-k and --top-p have no effect with --temperature 0")
    prompts = [] if options.interactive or options.benchmark else read_prompts(options)
    loaded = load_for_inference(options.model_path, options.precision, options.quantize)
    if loaded.warning is not None:
        warn(console, loaded.warning)
    if options.benchmark:
        run_benchmark(loaded, options.json, options.model_path, console)
    elif options.interactive:
        talk(loaded, sampling, options.max_new_tokens, options.seed, console)
    else:
        results = [
            result
            for number, prompt in enumerate(prompts)
            for result in _continue_prompt(loaded, options, sampling, prompt, number, console)
        ]
        if options.output_file is not None:
            lines = (json.dumps(result, ensure_ascii=False) + "\n" for result in results)
            write_text(options.output_file, "".join(lines))
            console.print(f"{len(results)} continuations in {options.output_file}")


def read_prompts(options: InferenceOptions) -> list[str]:
    """Returns the prompts that the options name, or the five default ones.

    Raises:
        UserError: the file is missing, empty or malformed; names the line.
    """
    if options.prompt is not None:
        return [options.prompt]
    path = options.prompts_file
    if path is None:
        return list(DEFAULT_PROMPTS)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise _bad_prompts(str(path), "not UTF-8") from error
    except OSError as error:
        raise UserError(
            f"cannot be read ({error.strerror})",
            where=str(path),
            fix="Correct --prompts-file.",
            exit_code=ExitCode.NOT_FOUND,
        ) from error
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise _bad_prompts(str(path), "the file has no prompts")
    if path.suffix == ".jsonl":
        return [_json_prompt(line, f"{path}:{number}") for number, line in numbered]
    return [line for _, line in numbered]


def _continue_prompt(
    loaded: LoadedModel,
    options: InferenceOptions,
    sampling: Sampling,
    prompt: str,
    number: int,
    console: Console,
) -> list[dict[str, Any]]:
    """Continues one prompt, showing the first sequence as it comes; returns one result each."""
    started = time.perf_counter()
    texts = [""] * options.num_return_sequences
    tokens = [0] * options.num_return_sequences
    reasons = ["length"] * options.num_return_sequences
    console.print(f"[bold]{'' if number == 0 else chr(10)}>[/] ", end="")
    show(console, prompt)
    for piece in stream_text(
        loaded.model,
        loaded.tokenizer,
        prompt,
        max_new_tokens=options.max_new_tokens,
        sampling=sampling,
        seed=options.seed,
        prompt_number=number,
        num_sequences=options.num_return_sequences,
    ):
        texts[piece.sequence] += piece.text
        tokens[piece.sequence] += piece.token is not None
        reasons[piece.sequence] = piece.finish_reason or reasons[piece.sequence]
        if piece.sequence == 0:
            show(console, piece.text)
    show(console, "\n")
    for sequence, text in enumerate(texts[1:], start=2):
        console.print(f"[dim]({sequence})[/] ", end="")
        show(console, f"{prompt}{text}\n")
    seconds = time.perf_counter() - started
    rate = sum(tokens) / seconds
    console.print(f"[dim]{sum(tokens)} tokens, {rate:.1f} tokens/s[/]")
    return [
        {
            "prompt": prompt,
            "text": text,
            "tokens": num_tokens,
            "seconds": round(seconds, 3),
            "seed": options.seed,
            "finish_reason": reason,
        }
        for text, num_tokens, reason in zip(texts, tokens, reasons, strict=True)
    ]


def _check_options(options: InferenceOptions) -> Sampling:
    ranges = {
        "max_new_tokens": options.max_new_tokens >= 1,
        "temperature": options.temperature >= 0,
        "top_k": options.top_k >= 0,
        "top_p": 0 < options.top_p <= 1,
        "repetition_penalty": options.repetition_penalty > 0,
        "num_return_sequences": options.num_return_sequences >= 1,
    }
    for name, fine in ranges.items():
        if not fine:
            raise UserError(
                f"{getattr(options, name)} is out of range",
                where="--" + name.replace("_", "-"),
                fix="See inference.py --help for what it means.",
                exit_code=ExitCode.BAD_OPTION,
            )
    modes = {
        "--prompt": options.prompt is not None,
        "--prompts-file": options.prompts_file is not None,
        "--interactive": options.interactive,
        "--benchmark": options.benchmark,
    }
    chosen = [name for name, is_chosen in modes.items() if is_chosen]
    if len(chosen) > 1:
        raise no_effect(chosen[1], f"together with {chosen[0]}")
    if options.json is not None and not options.benchmark:
        raise no_effect("--json", "without --benchmark")
    if options.output_file is not None and (options.interactive or options.benchmark):
        raise no_effect("--output-file", f"together with {chosen[0]}")
    return Sampling(options.temperature, options.top_k, options.top_p, options.repetition_penalty)


def _json_prompt(line: str, place: str) -> str:
    try:
        prompt = json.loads(line)["prompt"]
    except (ValueError, KeyError, TypeError) as error:
        raise _bad_prompts(place, 'not like {"prompt": "..."}') from error
    if not isinstance(prompt, str):
        raise _bad_prompts(place, "the prompt is not a string")
    return prompt


def _bad_prompts(where: str, what: str) -> UserError:
    return UserError(
        what,
        where=where,
        fix="Give one prompt a line (.txt), or JSON Lines with a key prompt (.jsonl).",
        exit_code=ExitCode.BAD_INPUT,
    )
