"""The requests that an engine runs, as tensors on the model's device.

`Slots` chooses tokens one request after the other, which is fastest on a CPU and the reference
elsewhere. `DeviceSlots` adds a token to all of them without waiting for the device, and on a GPU
replays that as one CUDA graph. Shapes:

    N slots    B of them in a pass    T most tokens of a slot    V vocabulary entries
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kiem.core.errors import UserError
from kiem.inference.cuda_graphs import CudaGraphs
from kiem.inference.gpu_decoder import use_gpu_decoder
from kiem.inference.sampling import (
    SamplingParams,
    choice_numbers,
    choose_token,
    choose_tokens,
    not_a_number,
)
from kiem.model.cache import CachePass, KeyValueCache
from kiem.model.gemma3 import Gemma3

# Full layers look at a number of cache entries that is a multiple of this.
_ENTRIES_STEP = 256
# Of this many entries a mask's rows are aligned as GPU kernels want them, and copied otherwise.
_ENTRIES_MULTIPLE = 16


@dataclass
class _Row:
    """What the host knows of a slot: its tokens' number, the last one included."""

    params: SamplingParams
    generator: torch.Generator
    num_tokens: int


class Slots:
    """Tokens, keys and values of the running requests, which occupy the first slots.

    All methods are called in inference mode.

    Args:
        model: the model, in evaluation mode.
        num_slots: N.
        max_tokens: T.

    Attributes:
        cache: keys and values of all tokens but the last of each slot.
    """

    def __init__(self, model: Gemma3, num_slots: int, max_tokens: int):
        device = model.model.norm.weight.device
        self.cache = KeyValueCache(model.config, num_slots, max_tokens, model.dtype, device)
        self._model = model
        self._max_tokens = max_tokens
        self._rows: dict[int, _Row] = {}  # by slot
        self._ids = torch.zeros(num_slots, max_tokens, dtype=torch.int64, device=device)  # N T
        # Where the last token of each stands, which is not in the cache yet.
        self._last = torch.zeros(num_slots, dtype=torch.int64, device=device)  # N
        self._logits = torch.empty(0)  # B V, of the present step

    def begin(
        self, slot: int, ids: list[int], params: SamplingParams, generator: torch.Generator
    ) -> Tensor:
        """Gives a slot to a request.

        Args:
            slot: the slot.
            ids: the prompt's tokens.
            params: how its tokens are chosen.
            generator: of its random numbers, on the CPU.

        Returns:
            The prompt's tokens, int64 [1, tokens]; the caller reads them into the cache.
        """
        self._rows[slot] = _Row(params, generator, len(ids))
        self._ids[slot, : len(ids)] = torch.tensor(ids)
        self._last[slot] = len(ids) - 1
        return self._ids[slot : slot + 1, : len(ids)]

    def first_token(self, slot: int, logits: Tensor) -> int:
        """Adds the first token to a request, from the logits [1, V] after its prompt.

        Raises:
            UserError: the logits are not numbers.
        """
        return self._choose(slot, logits[0])

    def step(self, num_rows: int) -> Tensor:
        """Passes the last tokens of the first slots through the model.

        Returns:
            Their logits [num_rows, V], until the next step. `token` has to be called for each.
        """
        longest = max(self._rows[slot].num_tokens for slot in range(num_rows))
        end = min(-(-longest // _ENTRIES_STEP) * _ENTRIES_STEP, self._max_tokens)
        self._logits = self._next_logits(num_rows, end)
        return self._logits

    def token(self, slot: int) -> int:
        """Adds a token to a slot of the present step.

        Raises:
            UserError: its logits are not numbers.
        """
        return self._choose(slot, self._logits[slot])

    def move(self, source: int, target: int) -> None:
        """Moves a request to another slot."""
        self.cache.copy_slot(source, target)
        self._rows[target] = self._rows[source]
        for tensor in self._of_slots():
            tensor[target] = tensor[source]

    def _of_slots(self) -> list[Tensor]:
        """Returns the tensors with a row for each slot."""
        return [self._ids, self._last]

    def _next_logits(self, num_rows: int, end: int) -> Tensor:
        """Returns the logits after the last tokens of the first slots, [num_rows, V].

        Args:
            num_rows: how many slots.
            end: how many cache entries full layers look at.
        """
        last = self._last[:num_rows, None]  # B 1
        where = CachePass(self.cache, 0, last, end)
        hidden = self._model.hidden_states(self._ids[:num_rows].gather(1, last), cached=where)
        return self._model.logits(hidden[:, 0])

    def _choose(self, slot: int, logits: Tensor) -> int:
        """Adds a token to a slot, from its logits [V]."""
        row = self._rows[slot]
        ids = self._ids[slot]
        try:
            token = choose_token(logits, ids[: row.num_tokens], row.params, row.generator)
        except UserError:
            self.cache.clear_slot(slot)
            raise
        ids[row.num_tokens] = token
        self._last[slot] = row.num_tokens
        row.num_tokens += 1
        return token


class DeviceSlots(Slots):
    """Slots whose step runs on the device from the last tokens to the next ones.

    The host reads the new tokens and nothing else. Arguments and results are those of `Slots`, and
    so are the tokens, up to rounding. The model gets the decoder for GPUs, so its weights must not
    change after this.
    """

    def __init__(self, model: Gemma3, num_slots: int, max_tokens: int):
        super().__init__(model, num_slots, -(-max_tokens // _ENTRIES_MULTIPLE) * _ENTRIES_MULTIPLE)
        use_gpu_decoder(model)
        device, vocab_size = self._ids.device, model.config.vocab_size
        self._logits = torch.zeros(num_slots, vocab_size, device=device)  # N V
        self._new = torch.zeros_like(self._last)  # N, -1 where the output is not a number
        numbers = choice_numbers(SamplingParams(), vocab_size)
        numbers_of_one = torch.tensor(numbers, dtype=torch.float64, device=device)
        self._numbers = numbers_of_one.repeat(num_slots, 1)
        # The random number for the token at each position.
        self._chances = torch.zeros_like(self._ids, dtype=torch.float64)  # N T
        self._tokens: list[int] = []  # of the present step
        self._graphs = CudaGraphs(device) if device.type == "cuda" else None

    @property
    def num_graphs(self) -> int:
        """How many CUDA graphs there are."""
        return self._graphs.num_graphs if self._graphs is not None else 0

    def begin(
        self, slot: int, ids: list[int], params: SamplingParams, generator: torch.Generator
    ) -> Tensor:
        self.cache.clear_slot(slot)  # slots that do not run are written to as well
        # What has no token yet repeats one, as `choose_tokens` wants it.
        self._ids[slot] = ids[0]
        numbers = choice_numbers(params, self._model.config.vocab_size)
        self._numbers[slot] = torch.tensor(numbers, dtype=torch.float64)
        if not params.is_greedy:
            new = slice(len(ids), len(ids) + params.max_new_tokens)
            chances = torch.rand(params.max_new_tokens, generator=generator, dtype=torch.float64)
            self._chances[slot, new] = chances.to(self._ids.device)
        return super().begin(slot, ids, params, generator)

    def first_token(self, slot: int, logits: Tensor) -> int:
        rows, row = slice(slot, slot + 1), self._rows[slot]
        self._add_tokens(rows, logits, self._max_tokens, not row.params.is_greedy)
        row.num_tokens += 1
        return _checked(int(self._new[slot]))

    def step(self, num_rows: int) -> Tensor:
        rows = [self._rows[slot] for slot in range(num_rows)]
        longest = max(row.num_tokens for row in rows)
        # Few different sizes, since there is a graph for each: the slots behind the running ones
        # take part, and what they hold then does not matter.
        size = min(1 << (num_rows - 1).bit_length(), len(self._ids))
        end = _ENTRIES_STEP << ((longest - 1) // _ENTRIES_STEP).bit_length()
        samples = not all(row.params.is_greedy for row in rows)
        arguments = size, min(end, self._max_tokens), samples
        if self._graphs is not None:
            self._graphs.run(self.advance, *arguments)
        else:
            self.advance(*arguments)
        self._tokens = self._new[:num_rows].tolist()  # the one time that the host waits
        for row in rows:
            row.num_tokens += 1
        return self._logits[:num_rows]

    def token(self, slot: int) -> int:
        return _checked(self._tokens[slot])

    def advance(self, num_rows: int, end: int, samples: bool) -> None:
        """Adds a token to each of the first slots, on the device alone.

        Args:
            num_rows: how many slots.
            end: how many cache entries full layers look at; none of the running requests is longer.
            samples: whether any of them has a temperature.
        """
        logits = self._next_logits(num_rows, end)
        self._logits[:num_rows] = logits
        self._add_tokens(slice(num_rows), logits, end, samples)

    def _add_tokens(self, rows: slice, logits: Tensor, end: int, samples: bool) -> None:
        """Adds tokens to some slots, from their logits [B, V]; others as in `advance`."""
        ids, last = self._ids[rows], self._last[rows, None]  # B T, B 1
        following = (last + 1).clamp(max=self._max_tokens - 1)  # slots that do not run may be full
        chances = self._chances[rows].gather(1, following)[:, 0]
        new = choose_tokens(logits, ids[:, :end], self._numbers[rows], chances, samples)  # B
        self._new[rows] = new
        ids.scatter_(1, following, new.clamp(min=0)[:, None])
        last.copy_(following)

    def _of_slots(self) -> list[Tensor]:
        return [*super()._of_slots(), self._numbers, self._chances]


def _checked(token: int) -> int:
    if token < 0:
        raise not_a_number()
    return token
