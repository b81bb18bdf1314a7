"""The tokenizers library in a process of its own, which says what ids texts should have.

Loading Gemma's tokenizer keeps Python's lock for most of a second, and so does loading the fast
encoder. Here the one is loaded beside the other, once for all workers.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from threading import Thread

from kiem.core.errors import ExitCode, UserError
from kiem.tokenizer.tokenizer import Tokenizer

# Texts to their ids, without control tokens.
Reference = Callable[[Sequence[str]], list[list[int]]]


@contextlib.contextmanager
def reference_process(tokenizer: Tokenizer, num_workers: int) -> Iterator[list[Reference]]:
    """Runs a forked process that loads a tokenizer and answers each worker by a thread.

    Args:
        tokenizer: whose ids are right.
        num_workers: how many ask at the same time.

    Yields:
        A reference for each worker, which may be forked from this process.
    """
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe() for _ in range(num_workers)]
    ours, theirs = [ours for ours, _ in pipes], [their for _, their in pipes]
    process = context.Process(target=_serve, args=(tokenizer, theirs, ours))
    process.start()
    for connection in theirs:
        connection.close()
    try:
        yield [_asking(connection) for connection in ours]
    finally:
        for connection in ours:
            connection.close()
        process.terminate()
        process.join()


def ended_from_outside(process: str) -> UserError:
    """Returns the error for a process of ours that ended in the middle of its work."""
    return UserError(
        f"{process} was ended from outside",
        where="--num-proc",
        fix="If memory ran out, use a lower number. Run the same command again: finished parts are "
        "kept.",
        exit_code=ExitCode.OUT_OF_MEMORY,
    )


def _asking(connection: Connection) -> Reference:
    def encode_batch(texts: Sequence[str]) -> list[list[int]]:
        try:
            connection.send(list(texts))
            answer = connection.recv()
        except (EOFError, OSError) as error:
            raise ended_from_outside("the process that checks the encoding") from error
        if isinstance(answer, UserError):
            raise answer
        return list(answer)

    return encode_batch


def _serve(tokenizer: Tokenizer, theirs: list[Connection], ours: list[Connection]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers keep all processors busy
    for connection in ours:
        connection.close()  # so that the end of the program and its workers is seen here
    _answer(tokenizer, [])  # loads it
    threads = [Thread(target=_serve_one, args=(tokenizer, connection)) for connection in theirs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _serve_one(tokenizer: Tokenizer, connection: Connection) -> None:
    while True:
        # OSError: the worker was stopped before it read its answer.
        try:
            connection.send(_answer(tokenizer, connection.recv()))
        except (EOFError, OSError):
            return


def _answer(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]] | UserError:
    try:
        return tokenizer.encode_batch(texts)
    except UserError as error:  # the tokenizer cannot be loaded
        return error
