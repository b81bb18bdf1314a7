"""Plain kernels for a CPU, where torch has none, behind its own `varlen_attn`.

So its checks, its autograd and how it is compiled are torch's; only the arithmetic is ours, after
the description of flash attention: a query sees its sequence's keys from `left` before it to
`right` after it, -1 for all. Shapes:

    N tokens of all sequences    T, S of one    H query heads    K key/value heads    C head_dim
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.attention import varlen

calls: Counter[str] = Counter()


def register() -> None:
    """Makes them torch's kernels for tensors on a CPU."""
    varlen._varlen_attn.register_kernel("cpu")(_forward)
    varlen._varlen_attn_backward.register_kernel("cpu")(_backward)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    key_starts: Tensor,
    longest: int,
    longest_keys: int,
    is_causal: bool = False,
    scale: float = 1.0,
    window: tuple[int, int] = (-1, -1),
    *_: object,
) -> tuple[Tensor, Tensor, Tensor]:
    calls["forward"] += 1
    assert starts.dtype == torch.int32 and torch.equal(starts, key_starts)
    assert starts[0] == 0 and starts[-1] == len(q) == len(k)
    assert longest == longest_keys >= starts.diff().max()
    assert is_causal == (list(window) == [-1, 0])
    out = torch.empty_like(q)
    for tokens in _sequences(starts):
        weights = _weights(q[tokens], k[tokens], scale, window)
        out[tokens] = torch.einsum("hts,shc->thc", weights, _for_all_heads(v[tokens], q))
    return out, torch.zeros(q.shape[1], len(q)), torch.zeros(2, dtype=torch.uint64)


def _backward(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    _out: Tensor,
    _log_sums: Tensor,
    *rest: object,
) -> tuple[Tensor, Tensor, Tensor]:
    calls["backward"] += 1
    starts, _, _, _, _, _, scale, window = rest
    dq, dk, dv = (torch.empty_like(tensor) for tensor in (q, k, v))
    for tokens in _sequences(starts):
        keys, values = (_for_all_heads(tensor[tokens], q) for tensor in (k, v))
        weights = _weights(q[tokens], k[tokens], scale, window)  # H T S
        of_weights = torch.einsum("thc,shc->hts", gradient[tokens], values)
        mean = (of_weights * weights).sum(-1, keepdim=True)
        of_scores = weights * (of_weights - mean) * scale
        dq[tokens] = torch.einsum("hts,shc->thc", of_scores, keys)
        of_keys = torch.einsum("hts,thc->shc", of_scores, q[tokens])
        of_values = torch.einsum("hts,thc->shc", weights, gradient[tokens])
        dk[tokens] = of_keys.unflatten(1, (k.shape[1], -1)).sum(2)
        dv[tokens] = of_values.unflatten(1, (k.shape[1], -1)).sum(2)
    return dq, dk, dv


def _sequences(starts: Tensor) -> Iterator[slice]:
    for start, end in starts.unfold(0, 2, 1).tolist():
        yield slice(start, end)


def _for_all_heads(x: Tensor, q: Tensor) -> Tensor:
    return x.repeat_interleave(q.shape[1] // x.shape[1], 1)


def _weights(q: Tensor, k: Tensor, scale: float, window: tuple[int, int]) -> Tensor:
    """Returns what each query [T, H, C] takes of the keys [S, K, C], [H, T, S]."""
    left, right = (side if side >= 0 else len(q) for side in window)
    place = torch.arange(len(q))
    distance = place[:, None] - place
    seen = (distance <= left) & (distance >= -right)
    scores = torch.einsum("thc,shc->hts", q, _for_all_heads(k, q)) * scale
    return scores.masked_fill(~seen, -torch.inf).softmax(-1)
