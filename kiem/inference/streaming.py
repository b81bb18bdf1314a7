"""A prompt in, text out: the engine's tokens as text while they come."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kiem.data.tokenizer import Tokenizer
from kiem.inference.engine import Engine, FinishReason, Request
from kiem.inference.sampling import Sampling, generator_seed
from kiem.inference.text import TextStream
from kiem.model.gemma3 import Gemma3


@dataclass(frozen=True)
class Piece:
    """What one decoding step adds to one sequence.

    Attributes:
        sequence: which of the prompt's sequences.
        text: new text; may be empty, since a character can take several tokens.
        token: the new token id; None in the last piece of a sequence.
        finish_reason: None, or why this sequence ends here.
    """

    sequence: int
    text: str
    token: int | None
    finish_reason: FinishReason | None = None


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
    engine = Engine(
        model,
        tokenizer.eos_id,
        max_requests=num_sequences,
        max_tokens=len(prompt_ids) + max_new_tokens,
    )
    for sequence in range(num_sequences):
        chance = generator_seed(seed, prompt_number, sequence)
        engine.add(Request(prompt_ids, max_new_tokens, sampling, chance))
    streams = [TextStream(tokenizer) for _ in range(num_sequences)]
    while engine.num_running or engine.num_waiting:
        for new in engine.step():
            stream = streams[new.request]
            if new.finish_reason != "eos":
                yield Piece(new.request, stream.add(new.token), new.token)
            if new.finish_reason is not None:
                yield Piece(new.request, stream.end(), None, new.finish_reason)


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
