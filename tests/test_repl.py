"""inference.py --interactive in a real terminal: editing, history, Ctrl-C, commands."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

UP, LEFT, CTRL_A, CTRL_C, CTRL_D = "\x1b[A", "\x1b[D", "\x01", "\x03", "\x04"


def _take_terminal() -> None:
    """Lets Ctrl-C mean this process, even when who runs the tests ignores it (nohup, `&`)."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Terminal:
    """A program at a pseudo-terminal, and what it has written there since last asked."""

    def __init__(self, words: list[str]):
        self._end, program_end = pty.openpty()
        self.process = subprocess.Popen(
            words,
            cwd=ROOT,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "200"},
            stdin=program_end,
            stdout=program_end,
            stderr=program_end,
            start_new_session=True,
            preexec_fn=_take_terminal,
        )
        os.close(program_end)
        self._unread = ""

    def type(self, text: str) -> None:
        os.write(self._end, text.encode())

    def until(self, pattern: str) -> str:
        """Returns what was written up to the end of the first match."""
        deadline = time.monotonic() + 60
        while not (match := re.search(pattern, self._unread)):
            assert time.monotonic() < deadline, f"no {pattern!r} in {self._unread!r}"
            if select.select([self._end], [], [], 0.1)[0]:
                with contextlib.suppress(OSError):  # the program has ended
                    self._unread += os.read(self._end, 65536).decode(errors="replace")
        shown, self._unread = self._unread[: match.end()], self._unread[match.end() :]
        return shown.replace("\r\n", "\n")

    def ask(self, line: str) -> str:
        """Types a line and returns all that comes before the next prompt."""
        self.type(line + "\n")
        self.until(re.escape(line.split("\x1b")[0].split("\x01")[0]) + r".*\r\n")
        return self.until(r"(^|\n)(\x1b\[\?2004h)?> ")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._end)


@pytest.fixture
def terminal(trained_run: Path) -> Iterator[Terminal]:
    model = str(trained_run / "final_model")
    words = [sys.executable, "inference.py", "--model-path", model, "--interactive"]
    made = Terminal([*words, "--max-new-tokens", "12"])
    try:
        assert "base model" in made.until(r"\n(\x1b\[\?2004h)?> ")
        yield made
    finally:
        made.close()


def text_of(shown: str) -> str:
    """Returns the answer without the line of figures."""
    match = re.match(r"(.*)\n.*tokens/s", shown, re.DOTALL)
    assert match, shown
    return match[1]


def test_lines_are_edited_and_remembered(terminal: Terminal) -> None:
    terminal.ask("/set temperature 0")
    answer = text_of(terminal.ask("De stad"))
    terminal.ask("/new")
    # "e stad" with the D put before it, and the same again from the history, two lines up.
    terminal.type(f"e stad{CTRL_A}D\n")
    assert answer in terminal.until(r"tokens/s")
    terminal.until("> ")
    terminal.ask("/new")
    terminal.type(f"{UP}{UP}\n")
    assert answer in terminal.until(r"tokens/s")


def test_commands(terminal: Terminal) -> None:
    assert "temperature 0.8" in terminal.ask("/set")
    assert "temperature 0.0" in terminal.ask("/set temperature 0")
    assert "top_k 3" in terminal.ask("/set --top-k 3")
    assert "Give a number above 0, at most 1." in terminal.ask("/set top_p 2")
    assert "Give a whole number from 0" in terminal.ask("/set top_k veel")
    assert "min_p 0.0" in terminal.ask("/set warmte 1")
    assert "max_new_tokens 5" in terminal.ask("/set max_new_tokens 5")
    assert "temperature 0.0" in terminal.ask("/set")
    assert "/new" in terminal.ask("/wat")
    assert re.search(r"\d tokens, [\d.]+ tokens/s", terminal.ask("Het water"))
    terminal.ask("/set max_new_tokens 4096")
    too_long = re.compile(r"(\d+) tokens and 4096 new ones")
    whole = too_long.search(terminal.ask("En toen"))
    terminal.ask("/new")
    alone = too_long.search(terminal.ask("En toen"))
    assert whole and alone
    assert int(whole[1]) > int(alone[1])
    terminal.type(CTRL_D)
    assert terminal.process.wait(timeout=30) == 0


def test_ctrl_c_stops_the_text_and_not_the_program(terminal: Terminal) -> None:
    for line in ("temperature 0", "repetition_penalty 0.5", "max_new_tokens 3000"):
        terminal.ask(f"/set {line}")
    terminal.type("De\n")
    terminal.until("De\r?\n")
    terminal.until(r"\S")
    terminal.type(CTRL_C)
    shown = terminal.until(r"tokens/s, stopped")
    number = re.search(r"(\d+) tokens,", shown)
    assert number
    assert int(number[1]) < 3000
    terminal.until("> ")
    assert "are more than the 4096 of --max-context" in terminal.ask("/set max_new_tokens 4096") + (
        terminal.ask("Nog eens")
    )
    # Not at once, which no person does: Python notices a signal only while readline waits for a
    # key, so one that comes together with keys is at times not seen before the next key.
    terminal.type("half een zin")
    terminal.until("half een zin")
    time.sleep(0.5)
    terminal.type(CTRL_C)
    terminal.until(r"\n(\x1b\[\?2004h)?> ")
    assert terminal.process.poll() is None
    terminal.type("/quit\n")
    assert terminal.process.wait(timeout=30) == 0
