"""Language models as evaluation needs them: texts in, negative log-likelihoods out.

Shapes: B sequences in a batch, T tokens, N scored tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kiem.model.gemma3 import Gemma3
from kiem.model.loss import token_cross_entropy
from kiem.tokenizer.tokenizer import Tokenizer

_TOKENS_PER_BATCH = 8192


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model with its tokenizer.

    Attributes:
        encode: texts to token ids, without control tokens.
        nats: (ids int64 [B, T], scored bool [B, T]) to -log p of the scored tokens given those
            before them in their row, fp32 [N] in row order; column 0 is never scored.
        bos_id: the token that every text begins with.
        unknown_id: the token for text that the tokenizer cannot express, if it has one.
        context: most tokens in a row.
        tokens_per_batch: how many tokens to hand to `nats` at once.
        device: where ids must be.
    """

    encode: Callable[[Sequence[str]], list[list[int]]]
    nats: Callable[[Tensor, Tensor], Tensor]
    bos_id: int
    unknown_id: int | None
    context: int
    tokens_per_batch: int
    device: torch.device


class Window(NamedTuple):
    """Tokens to read, and the index of the first one to score; all after it are scored too."""

    ids: list[int]
    first_scored: int


def own_language_model(model: Gemma3, tokenizer: Tokenizer, context: int) -> LanguageModel:
    """Returns a model of kiem's own as a LanguageModel."""

    def nats(ids: Tensor, scored: Tensor) -> Tensor:
        with torch.no_grad():
            hidden = model.hidden_states(ids)[:, :-1][scored[:, 1:]]  # N D
            return token_cross_entropy(hidden, model.model.embed_tokens.weight, ids[scored])

    return LanguageModel(
        encode=tokenizer.encode_batch,
        nats=nats,
        bos_id=tokenizer.bos_id,
        unknown_id=tokenizer.token_id("<unk>"),
        context=context,
        tokens_per_batch=_TOKENS_PER_BATCH,
        device=model.model.embed_tokens.weight.device,
    )


def windows(ids: list[int], bos_id: int, context: int) -> Iterator[Window]:
    """Yields the rows in which a document's tokens are scored, each token in exactly one.

    Args:
        ids: the document's tokens, without control tokens.
        bos_id: the first token of each row.
        context: most tokens in a row, <bos> included; at least 3.
    """
    room = context - 1
    end = min(len(ids), room)
    yield Window([bos_id, *ids[:end]], 1)
    while end < len(ids):
        new = min(len(ids) - end, room - room // 2)
        end += new
        start = max(0, end - room)
        yield Window([bos_id, *ids[start:end]], 1 + end - new - start)


def text_nats(model: LanguageModel, encoded: Sequence[list[int]]) -> np.ndarray:
    """Returns -log p of whole texts after <bos>, fp64 [texts]; texts as `windows` takes them."""
    rows = [
        (text, row)
        for text, ids in enumerate(encoded)
        for row in windows(ids, model.bos_id, model.context)
    ]
    # Rows of similar length share a batch. Padding comes last, where no scored token attends to it.
    rows.sort(key=lambda row: -len(row[1].ids))
    sums = np.zeros(len(encoded))
    while rows:
        longest = len(rows[0][1].ids)
        batch_size = max(1, model.tokens_per_batch // longest)
        batch, rows = rows[:batch_size], rows[batch_size:]
        ids = torch.zeros(len(batch), longest, dtype=torch.int64)
        scored = torch.zeros(len(batch), longest, dtype=torch.bool)
        for place, (_, row) in enumerate(batch):
            ids[place, : len(row.ids)] = torch.tensor(row.ids)
            scored[place, row.first_scored : len(row.ids)] = True
        nats = model.nats(ids.to(model.device), scored.to(model.device)).double().cpu()
        texts = np.array([text for text, _ in batch])
        np.add.at(sums, texts[scored.nonzero()[:, 0].numpy()], nats.numpy())
    return sums
