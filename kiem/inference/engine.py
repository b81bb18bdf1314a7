"""Prefill and decode: a prompt's tokens in, new tokens out, one step at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from kiem.data.tokenizer import Tokenizer
from kiem.inference.sampling import Sampling, choose, generators
from kiem.inference.text import TextStream
from kiem.model.cache import KeyValueCache
from kiem.model.gemma3 import Gemma3


@dataclass(frozen=True)
class Piece:
    """What one decoding step adds to one sequence.

    Attributes:
        sequence: which of the prompt's sequences.
        text: new text; may be empty, since a character can take several tokens.
        token: the new token id; None in the last piece of a sequence.
        finish_reason: None, or why this sequence ends here: "eos" or "length".
    """

    sequence: int
    text: str
    token: int | None
    finish_reason: str | None = None


def generate_tokens(
    model: Gemma3,
    prompt_ids: list[int],
    max_new_tokens: int,
    sampling: Sampling,
    chances: list[torch.Generator],
) -> Iterator[list[int]]:
    """Yields the next token of every sequence, step after step, whether or not one has ended.

    Args:
        model: the model.
        prompt_ids: the prompt with its <bos>.
        max_new_tokens: steps.
        sampling: how tokens are chosen.
        chances: one generator a sequence; as many sequences are made.
    """
    weight = model.model.embed_tokens.weight
    num_sequences = len(chances)
    ids = torch.tensor([prompt_ids] * num_sequences, device=weight.device)
    cache = KeyValueCache(
        model.config, num_sequences, len(prompt_ids) + max_new_tokens, weight.dtype, weight.device
    )
    step_ids = ids
    for _ in range(max_new_tokens):
        # Not around the whole loop: a generator suspended inside would leave the mode switched on.
        with torch.inference_mode():
            hidden = model.hidden_states(step_ids, cache=cache)
            logits = model.logits(hidden[:, -1])
            step_ids = choose(logits, ids, sampling, chances)[:, None].to(ids.device)
            ids = torch.cat([ids, step_ids], 1)
        yield step_ids[:, 0].tolist()


def stream_text(
    model: Gemma3,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
    prompt_number: int = 0,
    num_sequences: int = 1,
) -> Iterator[Piece]:
    """Continues a prompt and yields the text as it comes, never half a character.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        prompt: the text to continue; may be empty.
        max_new_tokens: most tokens to add.
        sampling: how tokens are chosen.
        seed: with `prompt_number` and the sequence's number determines the choices.
        prompt_number: place of the prompt among several.
        num_sequences: continuations.
    """
    prompt_ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    chances = generators(seed, prompt_number, num_sequences)
    streams = [TextStream(tokenizer) for _ in range(num_sequences)]
    running = set(range(num_sequences))
    for tokens in generate_tokens(model, prompt_ids, max_new_tokens, sampling, chances):
        for sequence in sorted(running):
            token = tokens[sequence]
            if token == tokenizer.eos_id:
                running.discard(sequence)
                yield Piece(sequence, streams[sequence].end(), None, "eos")
                continue
            yield Piece(sequence, streams[sequence].add(token), token)
        if not running:
            return
    for sequence in sorted(running):
        yield Piece(sequence, streams[sequence].end(), None, "length")


def complete(
    model: Gemma3,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
) -> str:
    """Returns one continuation of a prompt as a whole; arguments as in `stream_text`."""
    pieces = stream_text(
        model, tokenizer, prompt, max_new_tokens=max_new_tokens, sampling=sampling, seed=seed
    )
    return "".join(piece.text for piece in pieces)
