"""The key-value cache: what cached decoding remembers of the tokens before.

Full layers keep every token. Sliding layers keep the last `sliding_window` ones in a ring: token
number p lives in slot p modulo the window. Shapes:

    B sequences    K key/value heads    T new tokens    S slots    C head_dim
"""

from __future__ import annotations

import torch
from torch import Tensor

from kiem.model.presets import Gemma3Config


class KeyValueCache:
    """Keys and values of all layers for sequences of equal length.

    Args:
        config: the model's shape.
        batch_size: sequences.
        max_tokens: tokens that full layers have room for.
        dtype, device: of the keys and values.

    Attributes:
        num_tokens: tokens held; the model counts it up after each forward pass.
        layers: one LayerCache a layer.
    """

    def __init__(
        self,
        config: Gemma3Config,
        batch_size: int,
        max_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.num_tokens = 0
        self._slots = {True: min(config.sliding_window, max_tokens), False: max_tokens}
        self.layers = [
            LayerCache(
                self,
                (batch_size, config.num_key_value_heads, self._slots[sliding], config.head_dim),
                dtype,
                device,
            )
            for sliding in map(config.is_sliding, range(config.num_hidden_layers))
        ]

    def key_positions(self, sliding: bool, new_positions: Tensor) -> Tensor:
        """Returns the position of every key that `LayerCache.extend` will return, int64 [S].

        Negative for slots that hold nothing yet.
        """
        slots = self._slots[sliding]
        is_stored = len(new_positions) == 1  # a single new token is in its slot already
        last = self.num_tokens - 1 + is_stored
        numbers = torch.arange(slots, device=new_positions.device)
        held = last - (last - numbers) % slots  # the latest position that belongs in each slot
        return held if is_stored else torch.cat([held, new_positions])


class LayerCache:
    """Keys and values of one layer, each [B, K, S, C]."""

    def __init__(
        self,
        whole: KeyValueCache,
        shape: tuple[int, int, int, int],
        dtype: torch.dtype,
        device: torch.device,
    ):
        self._whole = whole
        self._keys = torch.zeros(shape, dtype=dtype, device=device)
        self._values = torch.zeros(shape, dtype=dtype, device=device)

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Adds the keys and values of new tokens, each [B, K, T, C].

        Returns:
            All keys and values that the new tokens may look at, each [B, K, S, C]: those held, in
            the order of their slots, and for several new tokens these after them, since the first
            of them must still see what the last of them pushes out of the ring.
        """
        slots = self._keys.shape[2]
        num_new = keys.shape[2]
        start = self._whole.num_tokens
        if num_new == 1:
            self._keys[:, :, start % slots] = keys[:, :, 0]
            self._values[:, :, start % slots] = values[:, :, 0]
            return self._keys, self._values
        seen = torch.cat([self._keys, keys], 2), torch.cat([self._values, values], 2)
        kept = min(num_new, slots)
        places = torch.arange(start + num_new - kept, start + num_new, device=keys.device) % slots
        self._keys[:, :, places] = keys[:, :, -kept:]
        self._values[:, :, places] = values[:, :, -kept:]
        return seen
