"""The key-value cache: what cached decoding remembers of the tokens before.

It has slots, one for each sequence that is being written; the sequences may differ in length.
Full layers keep every token. Sliding layers keep the last `sliding_window` ones in a ring: token
number p is entry p modulo the window. Nothing is ever cleared: an entry counts only if a token of
the present sequence must have written it. Shapes:

    N slots    B of them in a pass    K key/value heads    T new tokens    S entries    C head_dim
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kiem.model.config import Gemma3Config


class KeyValueCache:
    """Keys and values of all layers.

    Args:
        config: the model's shape.
        num_slots: most sequences at a time.
        max_tokens: most tokens of a sequence.
        dtype, device: of the keys and values.

    Attributes:
        layers: one LayerCache a layer.
    """

    def __init__(
        self,
        config: Gemma3Config,
        num_slots: int,
        max_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.num_entries = {True: min(config.sliding_window, max_tokens), False: max_tokens}
        self.layers = []
        for is_sliding in map(config.is_sliding, range(config.num_hidden_layers)):
            entries = self.num_entries[is_sliding]
            shape = (num_slots, config.num_key_value_heads, entries, config.head_dim)
            keys = torch.zeros(shape, dtype=dtype, device=device)
            self.layers.append(LayerCache(keys, torch.zeros_like(keys), is_sliding))

    def copy_slot(self, source: int, target: int) -> None:
        """Makes the slot `target` equal to `source`."""
        for layer in self.layers:
            layer.keys[target] = layer.keys[source]
            layer.values[target] = layer.values[source]


@dataclass(frozen=True)
class CachePass:
    """Where the tokens of one forward pass go: one token in each slot, or the same places in all.

    Attributes:
        cache: the cache.
        first_slot: slot of the pass's first sequence; the others follow it.
        positions: int64 [B, T]. If T > 1, all rows are the same consecutive positions.
        end: no position reaches it; if T > 1 it follows the last one.
    """

    cache: KeyValueCache
    first_slot: int
    positions: Tensor
    end: int

    def key_positions(self, sliding: bool) -> Tensor:
        """Returns the positions of the keys that `LayerCache.extend` will return.

        Returns:
            int64 [B or 1, S]; negative for entries that hold nothing of this sequence.
        """
        num_new = self.positions.shape[1]
        if not sliding:
            return torch.arange(self.end, device=self.positions.device)[None]
        entries = torch.arange(self.cache.num_entries[True], device=self.positions.device)
        if num_new == 1:
            return _held(self.positions, entries)
        new_positions = self.positions[:1]  # 1 T
        return torch.cat([_held(new_positions[:, :1] - 1, entries), new_positions], 1)


@dataclass(frozen=True)
class LayerCache:
    """Keys and values of one layer, each [N, K, S, C]."""

    keys: Tensor
    values: Tensor
    is_sliding: bool

    def extend(self, keys: Tensor, values: Tensor, where: CachePass) -> tuple[Tensor, Tensor]:
        """Adds the keys and values of new tokens, each [B, K, T, C].

        Returns:
            All keys and values that the new tokens may look at, each [B, K, S, C]: those held, and
            for several new tokens in a sliding layer these after them, since the first of them must
            still see what the last of them pushes out of the ring.
        """
        num_rows, _, num_new, _ = keys.shape
        slots = slice(where.first_slot, where.first_slot + num_rows)
        old_keys, old_values = self.keys[slots], self.values[slots]
        if not self.is_sliding:
            if num_new == 1:
                _put(old_keys, keys, where.positions[:, 0])
                _put(old_values, values, where.positions[:, 0])
            else:
                old_keys[:, :, where.end - num_new : where.end] = keys
                old_values[:, :, where.end - num_new : where.end] = values
            return old_keys[:, :, : where.end], old_values[:, :, : where.end]
        entries = where.positions % old_keys.shape[2]  # B T
        if num_new == 1:
            _put(old_keys, keys, entries[:, 0])
            _put(old_values, values, entries[:, 0])
            return old_keys, old_values
        seen = torch.cat([old_keys, keys], 2), torch.cat([old_values, values], 2)
        last = entries[0, -old_keys.shape[2] :]
        old_keys[:, :, last] = keys[:, :, -len(last) :]
        old_values[:, :, last] = values[:, :, -len(last) :]
        return seen


def _held(last: Tensor, entries: Tensor) -> Tensor:
    """Returns the latest position up to `last` [B, 1] that is at home in each entry, [B, S]."""
    return last - (last - entries) % len(entries)


def _put(held: Tensor, new: Tensor, entries: Tensor) -> None:
    """Writes a token's keys or values [B, K, 1, C] into entry `entries[b]` of each row."""
    held[torch.arange(len(new), device=new.device), :, entries] = new[:, :, 0]
