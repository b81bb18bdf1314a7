"""litgpt's Gemma 3 in a plain training step: what kiem's own model is measured against.

Runs in an environment of its own, with one JSON argument, and prints one line of JSON. Forward,
cross entropy over all logits, backward, clipping and fused AdamW; random tokens.
"""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from litgpt import GPT, Config


def main() -> None:
    options = json.loads(sys.argv[1])
    shape, size = options["config"], options["chunk_size"]
    kinds = [int(kind == "sliding_attention") for kind in shape["layer_types"]]
    config = Config.from_name(
        "Gemma-3-1b-it",
        block_size=size,
        vocab_size=shape["vocab_size"],
        padded_vocab_size=shape["vocab_size"],
        n_layer=shape["num_hidden_layers"],
        n_embd=shape["hidden_size"],
        n_head=shape["num_attention_heads"],
        n_query_groups=shape["num_key_value_heads"],
        head_size=shape["head_dim"],
        intermediate_size=shape["intermediate_size"],
        sliding_window_size=shape["sliding_window"],
        attention_scores_scalar=shape["query_pre_attn_scalar"],
        sliding_window_indices=kinds,
        rope_indices=kinds,
    )
    torch.manual_seed(42)
    model = GPT(config)
    model.lm_head.weight = model.transformer.wte.weight  # tied, as in Gemma
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), fused=True)
    ids = torch.randint(10, shape["vocab_size"], (options["batch_size"], size + 1))
    seconds = []
    for _ in range(options["steps"]):
        started = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=options["bf16"]):
            logits = model(ids[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
    result = {
        "tokens_per_second": options["batch_size"]
        * size
        / statistics.median(seconds[options["uncounted"] :]),
        "memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    print(json.dumps(result))


main()
