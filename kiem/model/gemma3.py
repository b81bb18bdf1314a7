"""The Gemma 3 text model (arXiv:2503.19786), for training and for cached decoding alike.

Parameter names are those of transformers' Gemma3ForCausalLM, so a state dict is a Hugging Face
checkpoint. Shapes in comments:

    B sequences in a batch    T tokens    S keys a query may see    D hidden_size
    H query heads             K key/value heads                     C head_dim
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy as Policy
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from kiem.compute.attention import attend, attend_masked, repeat_kv
from kiem.compute.cross_entropy import LogitsGradient, logits_gradient
from kiem.core.processors import num_processors
from kiem.core.randomness import derive_seed
from kiem.model.cache import CachePass, LayerCache
from kiem.model.config import Gemma3Config
from kiem.model.context import Context, make_contexts
from kiem.model.embedding import TiedEmbedding
from kiem.model.loss import summed_cross_entropy
from kiem.model.rotary import apply_rotary

Recompute = Literal["none", "selective", "full"]

_INIT_STD = 0.02
# Operations whose results "selective" recomputation keeps; the first may not be loaded.
_KEPT = {
    "torch_attn._varlen_attn.default",
    "aten.mm.default",
    "aten._scaled_dot_product_flash_attention_for_cpu.default",
    "aten._scaled_dot_product_flash_attention.default",
    "aten._scaled_dot_product_efficient_attention.default",
}


class RMSNorm(nn.Module):
    """Root mean square norm (arXiv:1910.07467) in fp32; `gain`: 1 + weight, if that is final."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.eps = eps
        self.gain: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        return self.normalize(x).to(x.dtype)

    def normalize(self, x: Tensor) -> Tensor:
        """Returns the result before it is rounded, in fp32."""
        gain = 1.0 + self.weight.float() if self.gain is None else self.gain
        return F.rms_norm(x.float(), gain.shape, gain, self.eps)


class Attention(nn.Module):
    """Grouped-query attention with normalized queries and keys."""

    def __init__(self, config: Gemma3Config):
        super().__init__()
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.head_dim = config.head_dim
        self.scale = config.query_pre_attn_scalar**-0.5
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(self, x: Tensor, context: Context, cache: LayerCache | None) -> Tensor:
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))  # B T H C
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim))  # B T K C
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))  # B T K C
        q = apply_rotary(self.q_norm.normalize(q), context.rotary).to(q.dtype)
        k = apply_rotary(self.k_norm.normalize(k), context.rotary).to(k.dtype)
        return self.o_proj(self._attend(q, k, v, context, cache).flatten(2))  # B T D

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, context: Context, cache: LayerCache | None
    ) -> Tensor:
        """Returns the output of the attention, [B, T, H, C]."""
        if context.document_starts is not None:
            from kiem.compute.varlen import attend_documents

            longest = q.shape[1]
            q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)  # N H C, N K C
            starts, window = context.document_starts, context.window
            y = attend_documents(q, k, v, starts, longest, window, self.scale)  # N H C
            return y.unflatten(0, (-1, longest))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # B H T C, B K T C
        if cache is not None and context.cached is not None:
            k, v = cache.extend(k, v, context.cached)  # B K S C
        k, v = repeat_kv(k, q.shape[1]), repeat_kv(v, q.shape[1])  # B H S C
        if cache is not None:
            y = attend_masked(q, k, v, context.mask, self.scale)
        else:
            y = attend(q, k, v, context.mask, context.window, self.scale)
        return y.transpose(1, 2)


class MLP(nn.Module):
    """Gated feed-forward block, GELU in its tanh form."""

    def __init__(self, config: Gemma3Config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


class DecoderLayer(nn.Module):
    """Attention and MLP, each with a norm before and after it."""

    def __init__(self, config: Gemma3Config):
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(size, eps)
        self.post_attention_layernorm = RMSNorm(size, eps)
        self.pre_feedforward_layernorm = RMSNorm(size, eps)
        self.post_feedforward_layernorm = RMSNorm(size, eps)

    def forward(
        self,
        x: Tensor,
        context: Context,
        cache: LayerCache | None = None,
        run: Callable[[DecoderLayer, Tensor, Context], Tensor] | None = None,
    ) -> Tensor:
        """Returns the layer's output [B, T, D]; training passes `run`, such as `run_layer`.

        So hooks on this call, which gather a sharded model's weights, are not compiled.
        """
        return self.compute(x, context, cache) if run is None else run(self, x, context)

    def compute(self, x: Tensor, context: Context, cache: LayerCache | None = None) -> Tensor:
        attended = self.self_attn(self.input_layernorm(x), context, cache)
        x = x + self.post_attention_layernorm(attended)
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class TextModel(nn.Module):
    """Everything below the output layer; a module of its own to give parameters their names."""

    def __init__(self, config: Gemma3Config):
        super().__init__()
        self.embed_tokens = TiedEmbedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Gemma3(nn.Module):
    """A Gemma 3 language model.

    Attributes:
        config: its shape.
        recompute: what the backward pass computes again instead of keeping it; see `run_layer`.
        run_layer: how training runs a layer: `run_layer`, or what torch.compile made of it.
        logits_gradient: how training differentiates a block of logits on a GPU, likewise.
        decoder: a faster `hidden_states` for one token a sequence, if there is one.
    """

    def __init__(self, config: Gemma3Config):
        super().__init__()
        self.config = config
        self.recompute: Recompute = "none"
        self.model = TextModel(config)
        self.run_layer = run_layer
        self.logits_gradient: LogitsGradient = logits_gradient
        self.decoder: Callable[[Tensor, CachePass], Tensor] | None = None

    def compile_layers(self) -> None:
        """Lets torch.compile make kernels for layers and loss on the first pass with gradients."""
        self.run_layer = torch.compile(run_layer, dynamic=False, fullgraph=True)
        self.logits_gradient = torch.compile(logits_gradient, dynamic=False, fullgraph=True)

    @property
    def dtype(self) -> torch.dtype:
        """The precision of activations, keys and values."""
        return self.model.norm.weight.dtype

    def forward(
        self,
        input_ids: Tensor,
        targets: Tensor,
        document_starts: Tensor | None,
        z_loss: float = 0.0,
        scale: Tensor | float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """Returns the summed loss of a batch, times `scale`, for training.

        Args:
            input_ids: int64 [B, T].
            targets: int64 [B, T], the next token at each position, or IGNORE.
            document_starts: int32 [documents + 1], where documents begin in the B * T tokens, of
                which each attends only to those of its own: 0, the others in order, each row's
                first token among them, and B * T. None: each row is a document.
            z_loss: weight of the squared log-normalizer in the loss.
            scale: factor of the loss.

        Returns:
            (loss, nats): fp32 scalars; `nats` is the summed cross entropy alone, neither scaled nor
            with a gradient.
        """
        rows, weight, gradient = self.model.embed_tokens.tie(input_ids)  # B T D, V D
        hidden = self._run_layers(rows, document_starts, None).flatten(0, 1)  # N D
        return summed_cross_entropy(
            hidden, weight, targets.flatten(), z_loss, scale, gradient, self.logits_gradient
        )

    def hidden_states(
        self,
        input_ids: Tensor,
        *,
        document_starts: Tensor | None = None,
        cached: CachePass | None = None,
    ) -> Tensor:
        """Returns the normalized output of the last layer, [B, T, D].

        Args:
            input_ids: int64 [B, T]; with a cache, the tokens that follow those it holds.
            document_starts: as in `forward`; not together with a cache.
            cached: the cache of the tokens before, and where in it these go.
        """
        assert document_starts is None or cached is None
        if cached is not None and self.decoder is not None and input_ids.shape[1] == 1:
            return self.decoder(input_ids, cached)
        return self._run_layers(self.model.embed_tokens(input_ids), document_starts, cached)

    def logits(self, hidden: Tensor) -> Tensor:
        """Returns fp32 logits [..., vocab_size] of hidden states [..., D]."""
        return self.model.embed_tokens.logits(hidden)

    def embedding_scale(self, device: torch.device) -> Tensor:
        """Returns the factor of the embedding's rows; Gemma rounds it to their precision."""
        return torch.full((), self.config.hidden_size**0.5, dtype=self.dtype, device=device)

    def _run_layers(
        self, rows: Tensor, document_starts: Tensor | None, cached: CachePass | None
    ) -> Tensor:
        x = rows * self.embedding_scale(rows.device)  # B T D
        full, sliding = make_contexts(self.config, x, document_starts, cached)
        for number, layer in enumerate(self.model.layers):
            context = sliding if self.config.is_sliding(number) else full
            if cached is not None:
                x = layer(x, context, cached.cache.layers[number])
            elif torch.is_grad_enabled():
                x = layer(x, context, run=partial(self.run_layer, recompute=self.recompute))
            else:
                x = layer(x, context)
        return self.model.norm(x)


def run_layer(layer: DecoderLayer, x: Tensor, context: Context, recompute: Recompute) -> Tensor:
    """Runs a layer for training.

    Args:
        layer, x, context: the layer and its arguments.
        recompute: "full" keeps only x for the backward pass; "selective" also the results of matrix
            products and attention, so that only cheap parts are computed again.
    """
    if recompute == "none":
        return layer.compute(x, context)
    run = partial(
        checkpoint, layer.compute, x, context, use_reentrant=False, preserve_rng_state=False
    )
    if recompute == "full":
        return run()
    return run(context_fn=partial(create_selective_checkpoint_contexts, _what_to_keep))


def _what_to_keep(_context: Any, operation: Any, *_: Any, **__: Any) -> Policy:
    return Policy.MUST_SAVE if str(operation) in _KEPT else Policy.PREFER_RECOMPUTE


def initialize(model: nn.Module, seed: int) -> None:
    """Fills matrices with N(0, 0.02) and norm weights with 0 (a gain of 1), in place.

    Each parameter has its own generator, so its values depend only on the seed and its name, and
    all processors can draw.
    """

    @torch.no_grad()
    def draw(named: tuple[str, nn.Parameter]) -> None:
        name, parameter = named
        values = torch.zeros(parameter.shape)
        if parameter.ndim > 1:
            generator = torch.Generator().manual_seed(derive_seed(seed, f"init {name}"))
            values.normal_(0.0, _INIT_STD, generator=generator)
        parameter.copy_(values)

    with ThreadPoolExecutor(num_processors()) as pool:
        list(pool.map(draw, model.named_parameters()))
