"""FLOPs per token in training, for MFU; kiem/compute/speed.py measures the peak."""

from __future__ import annotations

from kiem.model.presets import Gemma3Config


def flops_per_token(config: Gemma3Config, chunk_size: int) -> float:
    """Returns the FLOP that training takes for a token, forward and backward; no recomputation.

    6 for every parameter, the tied embedding once, since only its use as output layer multiplies;
    and 12 x query width for every key that a token looks at (PaLM, arXiv:2204.02311, appendix B,
    which counts chunk_size keys everywhere). Here keys are what causal attention and the sliding
    window leave, on average over a chunk; documents that end within it are not taken into account.

    Args:
        config: the model's shape.
        chunk_size: tokens that attend to each other.
    """
    query_width = config.num_attention_heads * config.head_dim
    window = min(config.sliding_window, chunk_size)
    keys_sliding = window - window * (window - 1) / 2 / chunk_size
    keys_full = (chunk_size + 1) / 2
    keys = sum(
        keys_sliding if config.is_sliding(layer) else keys_full
        for layer in range(config.num_hidden_layers)
    )
    return 6 * config.num_parameters() + 12 * query_width * keys
