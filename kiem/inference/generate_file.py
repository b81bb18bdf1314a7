"""Batch generation into a file, over all processes, that resumes after an interruption.

Each process appends finished continuations to a journal of its own beside the output file, in any
order. When all are there, the first process writes the output file in the order of the prompts and
removes the journals. Every continuation has its own random numbers, so neither the number of
processes nor an interruption changes the result.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from kiem.config import InferenceOptions
from kiem.core.disk import hidden
from kiem.core.errors import damaged, not_found
from kiem.core.files import append_json_lines, remove_file, write_text
from kiem.core.json_input import parse_json
from kiem.core.yaml_options import to_dict
from kiem.inference.engine import Engine, Request
from kiem.inference.loading import LoadedModel
from kiem.inference.sampling import SamplingParams
from kiem.parallel.launch import Place

# Options that do not change the continuations.
_FREE_OPTIONS = ("model_path", "prompts_file", "output_file", "max_requests", "max_context")
_POLL_SECONDS = 0.5
_START_SECONDS = 1800  # all processes have a journal by then


def generate_file(
    loaded: LoadedModel,
    prompts: Sequence[str],
    params: SamplingParams,
    options: InferenceOptions,
    place: Place,
    console: Console,
) -> None:
    """Writes continuations of this process's share of prompts, the first process all of them.

    Raises:
        UserError: a file cannot be written, or the processes share no folder.
    """
    assert options.output_file is not None
    output, num_sequences = options.output_file, options.num_return_sequences
    num_all = len(prompts) * num_sequences
    # Another command (other options, prompts or weights) has journals of its own.
    prefix = hidden(output, f"unfinished-{_fingerprint(loaded, prompts, options)}-")
    own = prefix.with_name(f"{prefix.name}{place.rank}")
    append_json_lines(own, [])  # shows the others that this process is there
    finished = _read_journals(prefix)
    share = range(place.rank, num_all, place.world_size)
    todo = [number for number in share if number not in finished]
    num_there = len(share) - len(todo)
    if num_there:
        console.print(f"{num_there} of {len(share)} continuations are there already.")

    # Write this process's share, with a progress bar below the finished continuations.
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}", markup=False),
        TimeRemainingColumn(),
    )
    is_hidden = not console.is_terminal
    bar = Progress(*columns, console=console, transient=True, disable=is_hidden)
    started, num_tokens, rate = time.perf_counter(), 0, ""
    with bar:
        task = bar.add_task("", total=len(share), completed=num_there)
        for number, result in _continue(loaded, prompts, todo, params, options):
            append_json_lines(own, [{"place": number, **result}])
            num_tokens += result["tokens"]
            rate = f"{num_tokens / (time.perf_counter() - started):.1f} tokens/s"
            bar.update(task, advance=1, description=rate)
            sequence = number % num_sequences
            name = f"({sequence + 1})" if sequence else ">"
            console.print(f"{name} {result['prompt']}{result['text']}")
    if rate:
        console.print(f"{num_tokens} tokens, {rate}", style="dim")
    if place.rank > 0:
        return

    # Put all shares together.
    finished = _wait_for_all(prefix, num_all, place.world_size)
    lines = [json.dumps(finished[n], ensure_ascii=False) + "\n" for n in range(num_all)]
    write_text(output, "".join(lines))
    for journal in _journals(prefix):
        remove_file(journal)
    console.print(f"{num_all} continuations in {output}")


def _continue(
    loaded: LoadedModel,
    prompts: Sequence[str],
    todo: Sequence[int],
    params: SamplingParams,
    options: InferenceOptions,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields number and result of each continuation as it ends."""
    if not todo:
        return
    tokenizer, num_sequences = loaded.tokenizer, options.num_return_sequences
    longest = max(map(len, tokenizer.encode_batch([prompts[n // num_sequences] for n in todo])))
    max_requests = min(options.max_requests, len(todo))
    max_tokens = 1 + longest + params.max_new_tokens
    engine = Engine(loaded.model, tokenizer, max_requests=max_requests, max_tokens=max_tokens)
    results: dict[int, dict[str, Any]] = {}
    started: dict[int, float] = {}

    def requests() -> Iterator[Request]:
        for index, number in enumerate(todo):
            prompt_number, sequence = divmod(number, num_sequences)
            prompt = prompts[prompt_number]
            results[index] = {"prompt": prompt, "text": "", "tokens": 0}
            started[index] = time.perf_counter()
            prompt_ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
            yield Request(prompt_ids, params, options.seed, prompt_number, sequence)

    for index, output in engine.stream(requests()):
        result = results[index]
        result["text"] += output.text
        result["tokens"] += output.num_tokens
        if output.finish_reason is not None:
            result["seconds"] = round(time.perf_counter() - started[index], 3)
            result |= {"seed": options.seed, "finish_reason": output.finish_reason}
            yield todo[index], results.pop(index)


def _fingerprint(loaded: LoadedModel, prompts: Sequence[str], options: InferenceOptions) -> str:
    """Returns a hash of all that the continuations depend on."""
    given = {name: value for name, value in to_dict(options).items() if name not in _FREE_OPTIONS}
    digest = hashlib.sha256(json.dumps([given, *prompts]).encode())
    for name, parameter in loaded.model.named_parameters():
        if parameter.dim() == 1:  # the norms: a few kB that differ in any two trained models
            digest.update(f"{name} {parameter.tolist()}".encode())
    return digest.hexdigest()[:16]


def _wait_for_all(prefix: Path, num_all: int, world_size: int) -> dict[int, dict[str, Any]]:
    """Returns all continuations when every process has written its share.

    Raises:
        UserError: long after this process began, another has no journal here.
    """
    deadline = time.monotonic() + _START_SECONDS
    while True:
        # Lines are counted first: to parse all journals at every look would take long.
        num_lines = sum(journal.read_bytes().count(b"\n") for journal in _journals(prefix))
        if num_lines >= num_all and len(finished := _read_journals(prefix)) >= num_all:
            return finished
        if len(_journals(prefix)) < world_size and time.monotonic() > deadline:
            raise not_found(
                str(prefix.parent),
                "the other processes write nothing here",
                "Choose an --output-file in a folder that all processes share.",
            )
        time.sleep(_POLL_SECONDS)


def _read_journals(prefix: Path) -> dict[int, dict[str, Any]]:
    """Returns the finished continuations of all processes by their number."""
    finished = {}
    for path in _journals(prefix):
        # The last line may not be whole yet, or was cut by a kill.
        for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
            try:
                entry = msgspec.convert(parse_json(line), dict[str, Any])
                finished[entry.pop("place")] = entry
            except (ValueError, KeyError, TypeError) as error:
                fix = "Remove the file; its continuations are written again."
                raise damaged(f"{path}:{number}", f"damaged ({error})", fix) from error
    return finished


def _journals(prefix: Path) -> list[Path]:
    return sorted(path for path in prefix.parent.iterdir() if path.name.startswith(prefix.name))
