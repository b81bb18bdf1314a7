"""Key-value cache for decoding.

It has slots, one for each sequence that is being written; the sequences may differ in length. Full
layers keep every token. Sliding layers keep the last `sliding_window` ones in a ring: token number
p is entry p modulo the window. Nothing is cleared for a new sequence: an entry counts only if a
token of the present one must have written it. Shapes:

    N slots    B of them in a pass    K key/value heads    T new tokens    S entries    C head_dim
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

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
        window: entries of a sliding layer.
    """

    def __init__(
        self,
        config: Gemma3Config,
        num_slots: int,
        max_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.window = min(config.sliding_window, max_tokens)
        self.layers = []
        for is_sliding in map(config.is_sliding, range(config.num_hidden_layers)):
            entries = self.window if is_sliding else max_tokens
            shape = (num_slots, config.num_key_value_heads, entries, config.head_dim)
            keys = torch.zeros(shape, dtype=dtype, device=device)
            self.layers.append(LayerCache(keys, torch.zeros_like(keys), is_sliding))

    def copy_slot(self, source: int, target: int) -> None:
        """Makes the slot `target` equal to `source`."""
        for layer in self.layers:
            layer.keys[target] = layer.keys[source]
            layer.values[target] = layer.values[source]

    def clear_slot(self, slot: int) -> None:
        """Removes what is not a number from a slot: masks give it weight 0, and 0 * NaN is NaN."""
        for layer in self.layers:
            layer.keys[slot] = 0
            layer.values[slot] = 0


@dataclass(frozen=True)
class CachePass:
    """Where the tokens of one forward pass go: one token in each slot, or the same places in all.

    Attributes:
        cache: the cache.
        first_slot: slot of the pass's first sequence; the others follow it.
        positions: int64 [B, T]. If T > 1, all rows are the same consecutive positions.
        end: larger than all positions; if T > 1 it follows the last one.
    """

    cache: KeyValueCache
    first_slot: int
    positions: Tensor
    end: int

    @cached_property
    def rows(self) -> Tensor:
        """The numbers of the pass's sequences, int64 [B]."""
        return torch.arange(len(self.positions), device=self.positions.device)

    @cached_property
    def places_in_ring(self) -> Tensor:
        """The tokens' entries in sliding layers, int64 [B, T]; in full ones it is their positions.

        Both are here since the layers share them: on a GPU each would be a kernel in every layer.
        """
        return self.positions % self.cache.window

    def key_positions(self, sliding: bool) -> Tensor:
        """Returns the positions of the keys that `LayerCache.extend` will return.

        Returns:
            int64 [B or 1, S]; negative for entries without a token of this sequence.
        """
        device = self.positions.device
        if not sliding:
            return torch.arange(self.end, device=device)[None]
        entries = torch.arange(self.cache.window, device=device)
        if self.positions.shape[1] == 1:
            return _latest(self.positions, entries)
        new = self.positions[:1]  # 1 T
        return torch.cat([_latest(new[:, :1] - 1, entries), new], 1)


@dataclass(frozen=True)
class LayerCache:
    """Keys and values of one layer, each [N, K, S, C]."""

    keys: Tensor
    values: Tensor
    is_sliding: bool

    def extend(self, keys: Tensor, values: Tensor, where: CachePass) -> tuple[Tensor, Tensor]:
        """Adds the keys and values of new tokens, each [B, K, T, C].

        Returns:
            All keys and values that the new tokens may look at, each [B, K, S, C]. For several new
            tokens in a sliding layer these come after the ones in the cache: the first of them
            still sees what the last of them replaces in the ring.
        """
        entries = where.places_in_ring if self.is_sliding else where.positions  # B T
        keys = self._extend(self.keys, keys, where, entries)
        return keys, self._extend(self.values, values, where, entries)

    def _extend(self, all_slots: Tensor, new: Tensor, where: CachePass, entries: Tensor) -> Tensor:
        num_rows, _, num_new, _ = new.shape
        old = all_slots[where.first_slot : where.first_slot + num_rows]
        if not self.is_sliding:
            seen = old[:, :, : where.end]
        else:
            seen = torch.cat([old, new], 2) if num_new > 1 else old
        if num_new == 1:
            old[where.rows, :, entries[:, 0]] = new[:, :, 0]
        else:
            last = entries[0, -old.shape[2] :]
            old[:, :, last] = new[:, :, -len(last) :]
        return seen


def _latest(last: Tensor, entries: Tensor) -> Tensor:
    """Returns the latest position up to `last` [B, 1] that belongs in each entry, [B, S]."""
    return last - (last - entries) % len(entries)
