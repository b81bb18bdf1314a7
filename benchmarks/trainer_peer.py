"""transformers' Trainer on a chunk directory: what kiem is measured against.

Runs in an environment of its own, with one JSON argument, and prints one line of JSON. It is the
usual recipe: Gemma3ForCausalLM, AdamW with a cosine schedule, at 1e-3 unless another learning rate
is given, and the whole chunk as labels.
"""

from __future__ import annotations

import json
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
    TrainingArguments,
    set_seed,
)

_CALIBRATION_STEPS = 12


class Clock(TrainerCallback):
    """Notes when each step began and ended."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._started = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self._started)


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    ids = torch.tensor([row["input_ids"] for row in rows])
    return {"input_ids": ids, "labels": ids}


def train(options: dict[str, Any], max_steps: int) -> tuple[Gemma3ForCausalLM, Clock, float]:
    """Trains for `max_steps` updates; returns the model, the steps' times and the last loss."""
    set_seed(options.get("seed", 42))
    model = Gemma3ForCausalLM(Gemma3TextConfig(**options["config"]))
    clock = Clock()
    arguments = TrainingArguments(
        output_dir=options["output"],
        max_steps=max_steps,
        per_device_train_batch_size=options["batch_size"],
        gradient_accumulation_steps=options["accumulation"],
        learning_rate=options.get("learning_rate", 1e-3),
        seed=options.get("seed", 42),
        lr_scheduler_type="cosine",
        warmup_steps=round(0.05 * max_steps),
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
    max_steps = options.get("steps")
    if max_steps is None:  # as many as fit the time, which a schedule must know beforehand
        _, clock, _ = train(options, _CALIBRATION_STEPS)
        max_steps = int(options["seconds"] / statistics.median(clock.seconds[2:]))
    model, clock, loss = train(options, max_steps)
    if options.get("save"):
        model.save_pretrained(options["output"])
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(Path(options["data"], name), options["output"])
    tokens_per_step = options["batch_size"] * options["accumulation"] * options["chunk_size"]
    result = {
        "steps": max_steps,
        "tokens": max_steps * tokens_per_step,
        "seconds": sum(clock.seconds),
        # The first steps fill caches and make the optimizer's state.
        "tokens_per_second": tokens_per_step
        / statistics.median(clock.seconds[options.get("uncounted", 2) :] or clock.seconds),
        "loss": loss,
        "memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    print(json.dumps(result))


main()
