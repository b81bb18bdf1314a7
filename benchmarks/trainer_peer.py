"""transformers' Trainer on a chunk directory: what kiem is measured against.

Runs in an environment of its own, with one JSON argument, and prints one line of JSON. It is the
usual recipe: Gemma3ForCausalLM, AdamW with a cosine schedule, at 1e-3 unless another learning rate
is given, and the whole chunk as labels. With a limit in seconds the schedule follows the clock.
"""

from __future__ import annotations

import json
import math
import resource
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import load_from_disk
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainingArguments,
    set_seed,
)

_WARMUP = 0.05  # share of the training
_NO_LIMIT = 1_000_000  # steps


class Clock(TrainerCallback):
    """Notes how long each step takes; with a limit, sets the learning rate by the time and ends."""

    def __init__(self, limit: float | None) -> None:
        self.seconds: list[float] = []
        self._limit = limit

    def on_step_begin(
        self, arguments: TrainingArguments, *_: Any, optimizer: torch.optim.Optimizer, **__: Any
    ) -> None:
        self._started = time.perf_counter()
        if self._limit is not None:
            progress = min(1.0, sum(self.seconds) / self._limit)
            rest = (progress - _WARMUP) / (1 - _WARMUP)
            share = progress / _WARMUP if rest < 0 else 0.5 + 0.5 * math.cos(math.pi * rest)
            for group in optimizer.param_groups:
                group["lr"] = arguments.learning_rate * share

    def on_step_end(self, _: Any, __: Any, control: TrainerControl, **___: Any) -> None:
        self.seconds.append(time.perf_counter() - self._started)
        if self._limit is not None and sum(self.seconds) >= self._limit:
            control.should_training_stop = True


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    ids = torch.tensor([row["input_ids"] for row in rows])
    return {"input_ids": ids, "labels": ids}


def train(options: dict[str, Any]) -> tuple[Gemma3ForCausalLM, Clock, float]:
    """Trains for so many steps or seconds; returns the model, the steps' times, the last loss."""
    max_steps = options.get("steps", _NO_LIMIT)
    set_seed(options.get("seed", 42))
    model = Gemma3ForCausalLM(Gemma3TextConfig(**options["config"]))
    clock = Clock(options.get("seconds"))
    arguments = TrainingArguments(
        output_dir=options["output"],
        max_steps=max_steps,
        per_device_train_batch_size=options["batch_size"],
        gradient_accumulation_steps=options["accumulation"],
        learning_rate=options.get("learning_rate", 1e-3),
        seed=options.get("seed", 42),
        lr_scheduler_type="cosine",
        warmup_steps=round(_WARMUP * max_steps),
        weight_decay=0.1,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        bf16=options["bf16"],
        gradient_checkpointing=options["checkpointing"],
        use_cpu=True,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    data = load_from_disk(options["data"])["train"]
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=data,
        data_collator=collate,
        callbacks=[clock],
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return model, clock, losses[-1] if losses else float("nan")


def main() -> None:
    options = json.loads(sys.argv[1])
    model, clock, loss = train(options)
    if options.get("save"):
        model.save_pretrained(options["output"])
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(Path(options["data"], name), options["output"])
    tokens_per_step = options["batch_size"] * options["accumulation"] * options["chunk_size"]
    result = {
        "steps": len(clock.seconds),
        "tokens": len(clock.seconds) * tokens_per_step,
        "seconds": sum(clock.seconds),
        # The first steps fill caches and make the optimizer's state.
        "tokens_per_second": tokens_per_step
        / statistics.median(clock.seconds[options.get("uncounted", 2) :] or clock.seconds),
        "loss": loss,
        "memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    print(json.dumps(result))


main()
