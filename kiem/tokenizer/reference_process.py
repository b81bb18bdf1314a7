"""The tokenizers library in a process of its own, which encodes what the fast path is checked by.

Loading Gemma's tokenizer holds Python's lock for a second, and so does loading gigatoken. Here one
is loaded beside the other, once for all workers.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.connection import Connection

from kiem.core.errors import ExitCode, UserError
from kiem.tokenizer.tokenizer import Tokenizer

# A text to its ids, without control tokens.
Reference = Callable[[str], list[int]]


@contextlib.contextmanager
def reference_process(tokenizer: Tokenizer, num_workers: int) -> Iterator[list[Reference]]:
    """Runs a forked process that loads a tokenizer, and yields a reference for each worker.

    The workers may be forked from this process and use their references at the same time.
    """
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe() for _ in range(num_workers)]
    ours, theirs = [our for our, _ in pipes], [their for _, their in pipes]
    process = context.Process(target=_serve_all, args=(tokenizer, theirs, ours))
    process.start()
    for connection in theirs:
        connection.close()
    try:
        yield [partial(_ask, connection) for connection in ours]
    finally:
        for connection in ours:
            connection.close()
        process.terminate()
        process.join()


def ended_from_outside(process: str) -> UserError:
    """Returns the error for a child process that was killed."""
    what = f"{process} was ended from outside"
    fix = "If memory ran out, use a lower number. Run the same command again: it goes on."
    return UserError(what, where="--num-proc", fix=fix, exit_code=ExitCode.OUT_OF_MEMORY)


def _ask(connection: Connection, text: str) -> list[int]:
    try:
        connection.send(text)
        answer = connection.recv()
    except (EOFError, OSError) as error:
        raise ended_from_outside("the process that checks the encoding") from error
    if isinstance(answer, UserError):
        raise answer
    return list(answer)


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
    """Answers each text with its ids or a UserError, until the other end is closed."""
    with contextlib.suppress(EOFError, OSError):
        while True:
            text = connection.recv()
            try:
                answer: list[int] | UserError = tokenizer.encode(text)
            except UserError as error:  # the tokenizer cannot be loaded
                answer = error
            connection.send(answer)
