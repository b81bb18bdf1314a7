"""A process that loads a tokenizer and answers others, which meanwhile do something else.

Loading Gemma's tokenizer takes one to two seconds, during which it holds Python's lock. So do
importing torch and loading gigatoken, beside which it can be loaded in a process of its own.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, Literal

from kiem.core.errors import UserError

if TYPE_CHECKING:
    from kiem.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class TokenizerClient:
    """What asks a tokenizer in another process; for one thread.

    Its methods are those of `Tokenizer`, and raise also what `ended` returns when the process has
    ended.
    """

    connection: Connection
    ended: Callable[[], UserError]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        ids: list[list[int]] = self._ask("encode_batch", list(texts))
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._ask("decode", list(ids))
        return text

    def _ask(self, method: Literal["encode_batch", "decode"], argument: list[Any]) -> Any:
        try:
            self.connection.send((method, argument))
            answer = self.connection.recv()
        except (EOFError, OSError) as error:
            raise self.ended() from error
        if isinstance(answer, UserError):
            raise answer
        return answer


@contextlib.contextmanager
def tokenizer_process(
    tokenizer: Tokenizer, num_clients: int, ended: Callable[[], UserError]
) -> Iterator[list[TokenizerClient]]:
    """Runs a forked process that loads a tokenizer, and yields what asks it.

    The clients may be used at the same time, also by processes that are forked from this one.

    Args:
        tokenizer: the tokenizer.
        num_clients: how many to yield.
        ended: makes the error for when the process has ended.
    """
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe() for _ in range(num_clients)]
    ours, theirs = [our for our, _ in pipes], [their for _, their in pipes]
    process = context.Process(target=_serve_all, args=(tokenizer, theirs, ours))
    process.start()
    for connection in theirs:
        connection.close()
    try:
        yield [TokenizerClient(connection, ended) for connection in ours]
    finally:
        for connection in ours:
            connection.close()
        process.terminate()
        process.join()


def _serve_all(tokenizer: Tokenizer, theirs: list[Connection], ours: list[Connection]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers keep all processors busy
    for connection in ours:
        connection.close()  # so that this process sees when the parent and its workers have ended
    with contextlib.suppress(UserError):  # which the first answer will be
        tokenizer.encode("")  # loads it
    with ThreadPoolExecutor(len(theirs)) as pool:
        pool.map(partial(serve, tokenizer), theirs)


def serve(tokenizer: Tokenizer, connection: Connection) -> None:
    """Answers a client until the other end is closed, with a UserError if there is one."""
    with contextlib.suppress(EOFError, OSError):
        while True:
            method, argument = connection.recv()
            try:
                answer = getattr(tokenizer, method)(argument)
            except UserError as error:  # the tokenizer cannot be loaded
                answer = error
            connection.send(answer)
