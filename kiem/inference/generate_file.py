"""Batch generation into a file, over all processes, that resumes after an interruption.

Each process appends finished continuations to a journal of its own beside the output file, in any
order. The one that ends last writes the output file in the order of the prompts and removes the
journals. Every continuation has its own random numbers, so neither the number of
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
from rich.progress import Progress

from kiem.config import InferenceOptions
from kiem.core.disk import hidden
from kiem.core.errors import damaged
from kiem.core.files import append_json_lines, remove_file, write_text
from kiem.core.json_input import parse_json
from kiem.core.yaml_options import to_dict
from kiem.inference.engine import Engine, Request
from kiem.inference.loading import LoadedModel
from kiem.inference.sampling import SamplingParams
from kiem.parallel.launch import Place

# Options that do not change the continuations.
_FREE_OPTIONS = ("model_path", "prompts_file", "output_file", "max_requests", "max_context")


def generate_file(
    loaded: LoadedModel,
    prompts: Sequence[str],
    params: SamplingParams,
    options: InferenceOptions,
    place: Place,
    console: Console,
) -> None:
    """Writes continuations of this process's share of prompts, the last process all of them.

    Raises:
        UserError: a file cannot be written, or a journal is damaged.
    """
    assert options.output_file is not None
    output, num_sequences = options.output_file, options.num_return_sequences
    num_all = len(prompts) * num_sequences
    # Another command (other options, prompts or weights) has journals of its own.
    prefix = hidden(output, f"unfinished-{_fingerprint(loaded, prompts, options)}-")
    own = prefix.with_name(f"{prefix.name}{place.rank}")
    finished = _read_journals(prefix)
    share = range(place.rank, num_all, place.world_size)
    todo = [number for number in share if number not in finished]
    num_there = len(share) - len(todo)
    if num_there:
        console.print(f"{num_there} of {len(share)} continuations are there already.")

    # Write this process's share, with a progress bar below the finished continuations.
    bar = Progress(console=console, transient=True, disable=not console.is_terminal)
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

    # Put all shares together.
    try:
        finished = _read_journals(prefix)
    except FileNotFoundError:  # another process has ended at the same time, and did it
        return
    if len(finished) < num_all:
        what = f"{len(finished)} of {num_all} continuations are there"
        console.print(f"{what}; the process that ends last writes {output}.")
        return
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
    encoded = tokenizer.encode_batch([prompts[number // num_sequences] for number in todo])
    max_requests = min(options.max_requests, len(todo))
    max_tokens = 1 + max(map(len, encoded)) + params.max_new_tokens
    engine = Engine(loaded.model, tokenizer, max_requests=max_requests, max_tokens=max_tokens)
    results: dict[int, dict[str, Any]] = {}
    started: dict[int, float] = {}

    def requests() -> Iterator[Request]:
        for index, (number, ids) in enumerate(zip(todo, encoded, strict=True)):
            prompt_number, sequence = divmod(number, num_sequences)
            results[index] = {"prompt": prompts[prompt_number], "text": "", "tokens": 0}
            started[index] = time.perf_counter()
            prompt_ids = [tokenizer.bos_id, *ids]
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
