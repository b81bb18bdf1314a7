"""Interactive mode: type a text, and the model continues it."""

from __future__ import annotations

import contextlib
import io
import sys
import time
from dataclasses import replace

from rich.console import Console

from kiem.config import InferenceOptions
from kiem.core.console import show
from kiem.core.errors import UserError
from kiem.core.values import option_types
from kiem.inference.engine import Engine, Request
from kiem.inference.loading import LoadedModel
from kiem.inference.sampling import SamplingParams

_HELP = """This is a base model: it does not answer, it continues the text you type.
What you type next goes on where that text ended.
  /new                    begin a new text
  /set temperature 0.9    choose tokens in another way; /set shows how
  /quit                   leave (or Ctrl-D)
Ctrl-C stops the text, not the program."""


def run_repl(
    loaded: LoadedModel, params: SamplingParams, options: InferenceOptions, console: Console
) -> None:
    """Reads prompts from the keyboard and streams continuations until end of input or /quit."""
    with contextlib.suppress(ImportError):  # line editing and history, where the system has it
        import readline  # noqa: F401
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    max_tokens = options.max_context
    engine = Engine(loaded.model, loaded.tokenizer, max_requests=1, max_tokens=max_tokens)
    text = ""  # all that was typed and written since it began
    number = 0  # of the continuation: with the seed, it determines the choices
    console.print(_HELP)
    while True:
        try:
            line = input("> ")
        except EOFError:
            console.print()
            return
        except KeyboardInterrupt:
            console.print()
            continue
        command, _, argument = line.strip().partition(" ")
        if command == "/quit":
            return
        if command == "/new":
            text = ""
        elif command == "/set":
            params = _set(params, argument.strip(), console)
        elif command.startswith("/"):
            console.print(_HELP)
        elif command:
            whole = f"{text}\n{line}" if text else line
            prompt_ids = [loaded.tokenizer.bos_id, *loaded.tokenizer.encode(whole)]
            if len(prompt_ids) + params.max_new_tokens > max_tokens:
                console.print(
                    f"{len(prompt_ids)} tokens and {params.max_new_tokens} new ones are more than "
                    f"the {max_tokens} of --max-context; /new begins a new text."
                )
                continue
            request = Request(prompt_ids, params, options.seed, number)
            text = _continue(whole, engine, request, console)
            number += 1


def _set(params: SamplingParams, argument: str, console: Console) -> SamplingParams:
    """Returns parameters with one value changed; prints it, or all of them without an argument."""
    values = {name: value for name, value in vars(params).items() if name != "stop"}
    given, _, text = argument.partition(" ")
    name = given.lstrip("-").replace("-", "_")
    if name in values:
        try:
            value = option_types(InferenceOptions)[name].read(text.strip(), f"/set {name}")
        except UserError as error:
            console.print(str(error))
            return params
        values = {name: value}
        params = replace(params, **values)
    for each, value in values.items():
        console.print(f"  {each} {value}")
    return params


def _continue(text: str, engine: Engine, request: Request, console: Console) -> str:
    """Streams the continuation of a text until it ends or Ctrl-C.

    Returns:
        The whole text; empty if the model has ended it.
    """
    started, num_tokens, note = time.perf_counter(), 0, ""
    try:
        with contextlib.closing(engine.stream([request])) as stream:
            for _, output in stream:
                text += output.text
                show(console, output.text)
                num_tokens += output.num_tokens
                if output.finish_reason == "eos":
                    text, note = "", "; the model ended its text, the next one is new"
    except KeyboardInterrupt:
        note = ", stopped"
    rate = num_tokens / (time.perf_counter() - started)
    console.print(f"\n{num_tokens} tokens, {rate:.1f} tokens/s{note}", style="dim")
    return text
