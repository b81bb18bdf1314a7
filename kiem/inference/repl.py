"""Type a text, see how the model goes on."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from kiem.config import InferenceOptions
from kiem.core.console import show
from kiem.core.errors import UserError
from kiem.core.files import write_text
from kiem.inference.loading import LoadedModel
from kiem.inference.sampling import Sampling, out_of_range
from kiem.inference.streaming import Writer, request_for

_HELP = """This is a base model: it does not answer, it continues the text you type.
What you type next goes on where that text ended.
  /new                   begin a new text
  /vraag QUESTION        put a question into a frame that invites an answer
  /set                   show how tokens are chosen; /set temperature 0.9 changes it
  /seed 7                choose as with this seed from here on
  /save FILE             write the text into a file
  /help                  this text
  /quit                  leave (or Ctrl-D)
Ctrl-C stops the text, not the program."""
# A base model takes this for a list of questions and answers; it must not go on to the next one.
_FRAME = "Vraag: {}\nAntwoord:"
_FRAME_ENDS = ("\nVraag:",)


@dataclass
class _State:
    """What commands change.

    Attributes:
        sampling, max_new_tokens: how the next answer is written.
        seed, number: with both the choices of the next answer are determined.
        text: all that has been typed and written since /new.
        is_ended: whether the model has ended the text.
    """

    sampling: Sampling
    max_new_tokens: int
    seed: int
    number: int = 0
    text: str = ""
    is_ended: bool = False


def talk(
    loaded: LoadedModel, sampling: Sampling, options: InferenceOptions, console: Console
) -> None:
    """Reads prompts from the keyboard and streams continuations until end of input or /quit.

    Args:
        loaded: the model.
        sampling: how tokens are chosen.
        options: all options of inference.py.
        console: where text goes.
    """
    with contextlib.suppress(ImportError):  # line editing and history, where the system has it
        import readline  # noqa: F401
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    state = _State(sampling, options.max_new_tokens, options.seed)
    writer = Writer(loaded.model, loaded.tokenizer, max_requests=1, max_tokens=options.max_context)
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
        argument = argument.strip()
        if command in ("/quit", "/exit"):
            return
        if command == "/vraag" and argument:
            state.text = ""
            _answer(loaded, writer, state, _FRAME.format(argument), _FRAME_ENDS, console)
        elif command.startswith("/"):
            _obey(command, argument, state, console)
        elif command:
            _answer(loaded, writer, state, line, options.stop, console)


def _obey(command: str, argument: str, state: _State, console: Console) -> None:
    """Does what a command other than /quit and /vraag says."""
    if command == "/help":
        console.print(_HELP)
    elif command == "/new":
        state.text = ""
        console.print("A new text.")
    elif command == "/seed":
        try:
            state.seed, state.number = int(argument), 0
        except ValueError:
            console.print("Give a whole number: /seed 7")
        else:
            console.print(f"The seed is {state.seed}.")
    elif command == "/set":
        _set(argument, state, console)
    elif command == "/save":
        _save(argument, state, console)
    elif command == "/vraag":
        console.print("Give a question: /vraag Wat is de hoofdstad van Nederland?")
    else:
        console.print(f"unknown command {command}; /help lists them")


def _set(argument: str, state: _State, console: Console) -> None:
    """Changes one value, or shows all of them."""
    values: dict[str, Any] = {
        **dataclasses.asdict(state.sampling),
        "max_new_tokens": state.max_new_tokens,
    }
    if not argument:
        for name, value in values.items():
            console.print(f"  {name} {value}")
        return
    given, _, text = argument.partition(" ")
    name = given.lstrip("-").replace("-", "_")
    if name not in values:
        console.print(f"There is {', '.join(values)}, but no {given}.")
        return
    kind = type(values[name])
    try:
        value = kind(text)
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        console.print(f"{name} is {what}: /set {name} {values[name]}")
        return
    if name == "max_new_tokens":
        if value < 1:
            console.print("max_new_tokens must be 1 or more.")
            return
        state.max_new_tokens = value
    else:
        sampling = replace(state.sampling, **{name: value})
        if wrong := out_of_range(sampling):
            console.print(f"{name} must be {wrong[1]}.")
            return
        state.sampling = sampling
    console.print(f"  {name} {value}")


def _save(argument: str, state: _State, console: Console) -> None:
    if not argument:
        console.print("Give a file: /save verhaal.txt")
        return
    try:
        path = Path(argument).expanduser()
        if path.exists():
            console.print(f"{path} exists; choose another name.")
            return
        write_text(path, state.text + "\n")
    except (UserError, OSError, ValueError, RuntimeError) as error:
        # No home of that user, a name that is too long or has a NUL: the text is still here.
        console.print(f"error: {error}")
    else:
        console.print(f"The text is in {path}.")


def _answer(
    loaded: LoadedModel,
    writer: Writer,
    state: _State,
    line: str,
    stop: Sequence[str],
    console: Console,
) -> None:
    """Adds a line to the text and lets the model go on, until it ends or Ctrl-C is pressed."""
    before = "" if state.is_ended or not state.text else f"{state.text}\n"
    request = request_for(
        before + line,
        loaded.tokenizer,
        max_new_tokens=state.max_new_tokens,
        sampling=state.sampling,
        seed=state.seed,
        prompt_number=state.number,
    )
    if len(request.prompt_ids) + state.max_new_tokens > writer.max_tokens:
        console.print(
            f"{len(request.prompt_ids)} tokens and {state.max_new_tokens} new ones are more than "
            f"the {writer.max_tokens} of --max-context; /new begins a new text."
        )
        return
    state.text, state.is_ended = before + line, False
    state.number += 1
    started = time.perf_counter()
    num_tokens = 0
    note = ""
    with _interrupts() as presses, contextlib.closing(writer.stream([request], stop)) as pieces:
        for piece in pieces:
            show(console, piece.text)
            state.text += piece.text
            num_tokens += piece.token is not None
            state.is_ended = piece.finish_reason == "eos"
            if presses:
                note = ", stopped"
                break
    rate = num_tokens / (time.perf_counter() - started)
    if state.is_ended:
        note = "; the model ended its text, the next one is new"
    console.print(f"\n{num_tokens} tokens, {rate:.1f} tokens/s{note}", style="dim")


@contextlib.contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Collects Ctrl-C instead of raising it, which would stop the engine in the middle of a step.

    Yields:
        A list that is longer by one after each press.
    """
    presses: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: presses.append(number))
    try:
        yield presses
    finally:
        signal.signal(signal.SIGINT, before)
