"""Interactive mode: type a text, and the model continues it."""

from __future__ import annotations

import contextlib
import io
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console

from kiem.config import InferenceOptions
from kiem.core.console import show
from kiem.core.errors import UserError
from kiem.core.files import write_text
from kiem.core.values import option_types
from kiem.inference.engine import Engine, Request
from kiem.inference.loading import LoadedModel
from kiem.inference.sampling import SamplingParams

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
_FRAME_STOP = ("\nVraag:",)


def run_repl(
    loaded: LoadedModel, params: SamplingParams, options: InferenceOptions, console: Console
) -> None:
    """Reads prompts from the keyboard and streams continuations until end of input or /quit."""
    with contextlib.suppress(ImportError):  # line editing and history, where the system has it
        import readline  # noqa: F401
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    repl = _Repl(loaded, params, options, console)
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
        if command in ("/quit", "/exit"):
            return
        if command.startswith("/"):
            repl.obey(command, argument.strip())
        elif command:
            repl.answer(line)


class _Repl:
    """The text so far, and the parameters that commands change."""

    def __init__(
        self,
        loaded: LoadedModel,
        params: SamplingParams,
        options: InferenceOptions,
        console: Console,
    ):
        self._tokenizer = loaded.tokenizer
        max_tokens = options.max_context
        self._engine = Engine(loaded.model, loaded.tokenizer, max_requests=1, max_tokens=max_tokens)
        self._params = params
        self._seed, self._number = options.seed, 0  # determine the choices of the next answer
        self._text = ""  # all that was typed and written since /new
        self._has_ended = False  # whether the model has ended the text
        self._console = console

    def obey(self, command: str, argument: str) -> None:
        """Runs a command other than /quit."""
        say = self._console.print
        if command == "/help":
            say(_HELP)
        elif command == "/new":
            self._text = ""
            say("A new text.")
        elif command == "/vraag" and argument:
            self._text = ""
            self.answer(_FRAME.format(argument), replace(self._params, stop=_FRAME_STOP))
        elif command == "/vraag":
            say("Give a question: /vraag Wat is de hoofdstad van Nederland?")
        elif command == "/seed":
            try:
                self._seed, self._number = int(argument), 0
                say(f"The seed is {self._seed}.")
            except ValueError:
                say("Give a whole number: /seed 7")
        elif command == "/set":
            self._set(argument)
        elif command == "/save":
            self._save(argument)
        else:
            say(f"unknown command {command}; /help lists them")

    def _set(self, argument: str) -> None:
        """Changes one value, or shows all of them."""
        values = {name: value for name, value in asdict(self._params).items() if name != "stop"}
        if not argument:
            for name, value in values.items():
                self._console.print(f"  {name} {value}")
            return
        given, _, text = argument.partition(" ")
        name = given.lstrip("-").replace("-", "_")
        if name not in values:
            self._console.print(f"There is {', '.join(values)}, but no {given}.")
            return
        try:
            value = option_types(InferenceOptions)[name].read(text.strip(), f"/set {name}")
        except UserError as error:
            self._console.print(str(error))
            return
        self._params = replace(self._params, **{name: value})
        self._console.print(f"  {name} {value}")

    def _save(self, argument: str) -> None:
        if not argument:
            self._console.print("Give a file: /save verhaal.txt")
            return
        try:
            path = Path(argument).expanduser()
            if path.exists():
                self._console.print(f"{path} exists; choose another name.")
                return
            write_text(path, self._text + "\n")
        except (UserError, OSError, ValueError, RuntimeError) as error:
            # No home of that user, a name that is too long or has a NUL: the text is still here.
            self._console.print(f"error: {error}")
        else:
            self._console.print(f"The text is in {path}.")

    def answer(self, line: str, params: SamplingParams | None = None) -> None:
        """Adds a line to the text and lets the model continue it until it ends or Ctrl-C."""
        params = params or self._params
        before = "" if self._has_ended or not self._text else f"{self._text}\n"
        prompt_ids = [self._tokenizer.bos_id, *self._tokenizer.encode(before + line)]
        if len(prompt_ids) + params.max_new_tokens > self._engine.max_tokens:
            self._console.print(
                f"{len(prompt_ids)} tokens and {params.max_new_tokens} new ones are more than "
                f"the {self._engine.max_tokens} of --max-context; /new begins a new text."
            )
            return
        request = Request(prompt_ids, params, self._seed, self._number)
        self._text, self._has_ended = before + line, False
        self._number += 1
        started, num_tokens, note = time.perf_counter(), 0, ""
        with _interrupts() as presses, contextlib.closing(self._engine.stream([request])) as stream:
            for _, output in stream:
                show(self._console, output.text)
                self._text += output.text
                num_tokens += output.num_tokens
                self._has_ended = output.finish_reason == "eos"
                if presses:
                    note = ", stopped"
                    break
        rate = num_tokens / (time.perf_counter() - started)
        if self._has_ended:
            note = "; the model ended its text, the next one is new"
        self._console.print(f"\n{num_tokens} tokens, {rate:.1f} tokens/s{note}", style="dim")


@contextlib.contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Collects Ctrl-C instead of raising it, which would stop the engine in the middle of a step.

    Yields:
        A list that grows by one with each press.
    """
    presses: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: presses.append(number))
    try:
        yield presses
    finally:
        signal.signal(signal.SIGINT, before)
