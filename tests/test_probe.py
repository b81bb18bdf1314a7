"""What a token costs, against torch's own count."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kiem.compute.attention import causal_mask
from kiem.model.config import preset
from kiem.model.gemma3 import Gemma3
from kiem.planning.time_estimate import flops_per_token


def test_flops_are_those_that_torch_counts() -> None:
    config = preset("gemma3-micro", 1000)
    model = Gemma3(config)
    ids = torch.randint(0, 1000, (2, 200), generator=torch.Generator().manual_seed(0))
    # The loss multiplies into a buffer, which torch does not count; so the logits do instead.
    with FlopCounterMode(display=False) as counter:
        model.logits(model.hidden_states(ids)).sum().backward()
    counts = counter.get_flop_counts()["Global"]
    products = sum(counts[op] for op in counts if "mm" in str(op))
    positions = torch.arange(200)
    query_width = config.num_attention_heads * config.head_dim
    seen = 0
    for layer in range(config.num_hidden_layers):
        window = config.sliding_window if config.is_sliding(layer) else None
        seen += int(causal_mask(positions, positions, window).sum())
    # Scores and their sum of values, two operations each, and twice as many for the gradients.
    attention = 2 * 2 * 3 * query_width * seen / 200
    # The norms' gains are counted as if they were matrices.
    expected = products / ids.numel() + attention
    assert flops_per_token(config, 200) == pytest.approx(expected, rel=0.01)
    without_window = replace(config, sliding_window=10**6)
    assert flops_per_token(without_window, 200) > flops_per_token(config, 200)
