"""Many prompts into a file: several at a time, over all processes, and on after an interruption.

What is finished goes into a journal beside the output file, a line each, in whatever order it
comes; every process has its own. When everything is there the first process writes the output
file, in the order of the prompts, and removes the journals. Which process does what, and beside
which others, changes nothing: every continuation has its own random numbers.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from torch.distributed.rendezvous import rendezvous

from kiem.config import InferenceOptions
from kiem.core.errors import ExitCode, UserError
from kiem.core.files import append_json_lines, remove_file, write_text
from kiem.core.json_input import parse_json
from kiem.core.leftovers import hidden
from kiem.core.yaml_options import to_dict
from kiem.inference.loading import LoadedModel
from kiem.inference.sampling import Sampling
from kiem.inference.streaming import Writer, request_for
from kiem.parallel.launch import lost_processes, read_place

# Options that change no continuation.
_FREE_OPTIONS = ("model_path", "prompts_file", "output_file", "max_requests", "max_context")


@dataclass(frozen=True)
class Processes:
    """This process's place among those that `accelerate launch` or `torchrun` started."""

    rank: int
    world_size: int

    def barrier(self) -> None:
        """Returns when every process has come here."""
        if self.world_size > 1:
            dist.barrier()


@contextlib.contextmanager
def open_processes(output_file: Path | None) -> Iterator[Processes]:
    """Takes this process's place, and its GPU if there is one.

    Args:
        output_file: where everything comes together; without it several processes are refused.

    Raises:
        UserError: there are several processes for what one can do, the launcher's variables make no
            sense, or another process was waited for in vain.
    """
    place = read_place()
    processes = Processes(place.rank, place.world_size)
    if processes.world_size == 1:
        yield processes
        return
    if output_file is None:
        raise UserError(
            f"{processes.world_size} processes were started, of which only one could speak",
            fix="Start it with plain python, or give --prompts-file and --output-file.",
            exit_code=ExitCode.BAD_OPTION,
        )
    if torch.cuda.is_available():
        torch.cuda.set_device(place.local_rank)
    with lost_processes(place.rank):
        store = next(rendezvous("env://"))[0]  # ends if one does not come within half an hour
        # The others may have a longer share; torch would lose patience after half an hour.
        patience = datetime.timedelta(days=30)
        dist.init_process_group(
            "gloo", store=store, rank=place.rank, world_size=place.world_size, timeout=patience
        )
        try:
            yield processes
        finally:
            dist.destroy_process_group()


def write_file(
    loaded: LoadedModel,
    prompts: Sequence[str],
    sampling: Sampling,
    options: InferenceOptions,
    processes: Processes,
    console: Console,
) -> None:
    """Continues prompts into `--output-file`.

    Args:
        loaded: the model.
        prompts: what to continue.
        sampling: how tokens are chosen.
        options: all options of inference.py.
        processes: among which the prompts are spread.
        console: where progress and text are shown.

    Raises:
        UserError: a file cannot be written, or the processes share no folder.
    """
    assert options.output_file is not None
    output, num_sequences = options.output_file, options.num_return_sequences
    journals = _Journals(output, _fingerprint(loaded, prompts, options), processes.rank)
    finished = journals.read()
    share = range(processes.rank, len(prompts) * num_sequences, processes.world_size)
    if num_there := sum(place in finished for place in share):
        console.print(f"{num_there} of {len(share)} continuations are there already.")
    shown = _Display(console, len(share), num_there)
    todo = [place for place in share if place not in finished]
    with shown:
        for place, result in _continue(loaded, prompts, todo, sampling, options):
            journals.add(place, result)
            shown.add(place % num_sequences, result)
    processes.barrier()
    if processes.rank == 0:
        finished = journals.read()
        places = range(len(prompts) * num_sequences)
        if any(place not in finished for place in places):
            raise UserError(
                "what the other processes wrote is not here",
                where=str(output.parent),
                fix="Choose an --output-file in a folder that all processes share.",
                exit_code=ExitCode.NOT_FOUND,
            )
        lines = [json.dumps(finished[place], ensure_ascii=False) + "\n" for place in places]
        write_text(output, "".join(lines))
        journals.remove()
        console.print(f"{len(lines)} continuations in {output}")


def _continue(
    loaded: LoadedModel,
    prompts: Sequence[str],
    todo: Sequence[int],
    sampling: Sampling,
    options: InferenceOptions,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields place and result of each continuation as it ends."""
    if not todo:
        return
    tokenizer, num_sequences = loaded.tokenizer, options.num_return_sequences
    longest = max(map(len, tokenizer.encode_batch([prompts[p // num_sequences] for p in todo])))
    writer = Writer(
        loaded.model,
        tokenizer,
        max_requests=min(options.max_requests, len(todo)),
        max_tokens=1 + longest + options.max_new_tokens,
    )
    left = iter(todo)
    open_texts: dict[int, _Text] = {}
    while True:
        while len(open_texts) < options.max_requests:
            place = next(left, None)
            if place is None:
                break
            number, sequence = divmod(place, num_sequences)
            request = request_for(
                prompts[number],
                tokenizer,
                max_new_tokens=options.max_new_tokens,
                sampling=sampling,
                seed=options.seed,
                prompt_number=number,
                sequence=sequence,
            )
            text = _Text(place, prompts[number], time.perf_counter())
            open_texts[writer.add(request, options.stop)] = text
        if not open_texts:
            return
        for piece in writer.step():
            text = open_texts[piece.number]
            text.text += piece.text
            text.tokens += piece.token is not None
            if piece.finish_reason is not None:
                del open_texts[piece.number]
                yield (
                    text.place,
                    {
                        "prompt": text.prompt,
                        "text": text.text,
                        "tokens": text.tokens,
                        "seconds": round(time.perf_counter() - text.started, 3),
                        "seed": options.seed,
                        "finish_reason": piece.finish_reason,
                    },
                )


@dataclass
class _Text:
    """A continuation that is being written."""

    place: int
    prompt: str
    started: float
    text: str = ""
    tokens: int = 0


class _Display:
    """A bar with what is done, and above it the continuations as they end."""

    def __init__(self, console: Console, total: int, num_there: int):
        columns = (
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.description}", markup=False),
            TimeRemainingColumn(),
        )
        self._console = console
        is_shown = console.is_terminal
        self._bar = Progress(*columns, console=console, transient=True, disable=not is_shown)
        self._task = self._bar.add_task("", total=total, completed=num_there)
        self._num_tokens = 0
        self._started = time.perf_counter()

    def __enter__(self) -> _Display:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
        if self._num_tokens:
            self._console.print(f"{self._num_tokens} tokens, {self._rate()}", style="dim")

    def add(self, sequence: int, result: dict[str, Any]) -> None:
        """Shows a finished continuation."""
        self._num_tokens += result["tokens"]
        self._bar.update(self._task, advance=1, description=self._rate())
        name = f"({sequence + 1})" if sequence else ">"
        self._console.print(f"{name} {result['prompt']}{result['text']}")

    def _rate(self) -> str:
        seconds = time.perf_counter() - self._started
        return f"{self._num_tokens / seconds:.1f} tokens/s"


def _fingerprint(loaded: LoadedModel, prompts: Sequence[str], options: InferenceOptions) -> str:
    """Returns what names a run: all that its continuations depend on, as a hash."""
    given = {name: value for name, value in to_dict(options).items() if name not in _FREE_OPTIONS}
    digest = hashlib.sha256(json.dumps([given, *prompts]).encode())
    for name, parameter in loaded.model.named_parameters():
        if parameter.dim() == 1:  # the norms: a few kB that differ in any two trained models
            digest.update(f"{name} {parameter.tolist()}".encode())
    return digest.hexdigest()[:16]


class _Journals:
    """What is finished of a run, in a file for each process.

    Args:
        output: the file that it shall become.
        run: the name of the run; another command has journals of its own.
        rank: of this process.
    """

    def __init__(self, output: Path, run: str, rank: int):
        self._folder = output.parent
        self._prefix = hidden(output, f"unfinished-{run}-").name
        self._own = output.with_name(f"{self._prefix}{rank}")

    def add(self, place: int, result: dict[str, Any]) -> None:
        """Writes down a finished continuation."""
        append_json_lines(self._own, [{"place": place, **result}])

    def read(self) -> dict[int, dict[str, Any]]:
        """Returns the results of all processes by their place."""
        finished = {}
        for path in self._paths():
            # A line that is not whole is being written by another process, about its own share.
            lines = path.read_bytes().split(b"\n")[:-1]
            for number, line in enumerate(lines, start=1):
                try:
                    entry = msgspec.convert(parse_json(line), dict[str, Any])
                    finished[entry.pop("place")] = entry
                except (ValueError, KeyError, TypeError) as error:
                    raise UserError(
                        f"damaged ({error})",
                        where=f"{path}:{number}",
                        fix="Remove the file; its continuations are written again.",
                        exit_code=ExitCode.DAMAGED,
                    ) from error
        return finished

    def remove(self) -> None:
        """Removes all journals of the run."""
        for path in self._paths():
            remove_file(path)

    def _paths(self) -> list[Path]:
        if not self._folder.is_dir():
            return []
        return sorted(p for p in self._folder.iterdir() if p.name.startswith(self._prefix))
