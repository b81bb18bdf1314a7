"""Type a text, see how the model goes on."""

from __future__ import annotations

import contextlib
import time

from rich.console import Console

from kiem.inference.loading import LoadedModel
from kiem.inference.sampling import Sampling
from kiem.inference.streaming import stream_text
from kiem.inference.text import show

_HELP = """This is a base model: it does not answer, it continues the text you type.
  /help   this text
  /quit   leave (or Ctrl-D)
Ctrl-C stops the text, not the program."""


def talk(
    loaded: LoadedModel, sampling: Sampling, max_new_tokens: int, seed: int, console: Console
) -> None:
    """Reads prompts from the keyboard and streams continuations until end of input or /quit.

    Args:
        loaded: the model.
        sampling: how tokens are chosen.
        max_new_tokens: most tokens to add to a prompt.
        seed: with the number of the prompt determines the choices.
        console: where text goes.
    """
    with contextlib.suppress(ImportError):  # line editing and history, where the system has it
        import readline  # noqa: F401
    console.print(_HELP)
    number = 0
    while True:
        try:
            prompt = input("> ")
        except EOFError:
            console.print()
            return
        except KeyboardInterrupt:
            console.print()
            continue
        if prompt.strip() == "/quit":
            return
        if prompt.strip() == "/help":
            console.print(_HELP)
        elif prompt.startswith("/"):
            console.print(f"unknown command {prompt.split()[0]}; /help lists them", markup=False)
        elif prompt.strip():
            _answer(loaded, sampling, max_new_tokens, seed, number, prompt, console)
            number += 1


def _answer(
    loaded: LoadedModel,
    sampling: Sampling,
    max_new_tokens: int,
    seed: int,
    number: int,
    prompt: str,
    console: Console,
) -> None:
    started = time.perf_counter()
    num_tokens = 0
    try:
        for piece in stream_text(
            loaded.model,
            loaded.tokenizer,
            prompt,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            seed=seed,
            prompt_number=number,
        ):
            show(console, piece.text)
            num_tokens += piece.token is not None
    except KeyboardInterrupt:
        console.print(" [dim](stopped)[/]", end="")
    rate = num_tokens / (time.perf_counter() - started)
    console.print(f"\n[dim]{num_tokens} tokens, {rate:.1f} tokens/s[/]")
