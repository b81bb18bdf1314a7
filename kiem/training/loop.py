"""The training loop: batch, forward, backward, clip, update, log, evaluate, save."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from rich.console import Console

from kiem.config import TrainingOptions
from kiem.errors import UserError
from kiem.memory import peak_memory_bytes
from kiem.model.loss import IGNORE, next_token_targets
from kiem.training.batches import Order, micro_batches
from kiem.training.devices import Devices, open_devices
from kiem.training.display import Display, show_plan, show_results
from kiem.training.doctor import warnings_after_update, warnings_before
from kiem.training.energy import EnergyMeter
from kiem.training.evaluate import evaluate, measure_minimal_pairs, sample_texts
from kiem.training.fit import is_out_of_memory, out_of_memory
from kiem.training.guard import Guard, save
from kiem.training.optimizer import learning_rate_share
from kiem.training.planning import print_plan
from kiem.training.probe import flops_per_token
from kiem.training.reporter import Reporter
from kiem.training.run import Run, finish_run, prepare_run


def train(options: TrainingOptions, console: Console) -> None:
    """Trains a model, from a chunk directory to a model directory.

    Args:
        options: all options of training.py.
        console: where progress and results go.

    Raises:
        UserError: anything about options, data, model, disk or memory that a person can mend.
    """
    with open_devices(options.precision) as devices, ExitStack() as held:
        if options.plan:
            return print_plan(options, devices, console)
        run = prepare_run(options, devices, console, held)
        reporter = Reporter(run.directory, console)
        show_plan(run, devices, console)
        if run.resumed_from is None:
            _warn(run, console, warnings_before(run))
        try:
            train_to_the_end(run, devices, console, reporter)
            with run.whole_model(devices):
                figures = evaluate(run, devices, max_chunks=None)
                figures |= measure_minimal_pairs(run, devices, console)
                figures["samples"] = sample_texts(run, devices)
                figures["memory_bytes"] = peak_memory_bytes(devices.device)
                if devices.is_first:
                    _write(run, figures)
                    final_model = finish_run(run, figures)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise out_of_memory(run.recipe, f"step {run.step + 1}") from error
        except UserError as error:
            _write(run, {"warning": f"stopped: {error.what}"})
            raise
        finally:  # a run that was stopped has something to tell as well
            if devices.is_first:
                reporter.write()
        if devices.is_first:
            show_results(run, figures, final_model, console)
        devices.wait_for_all()


def train_to_the_end(run: Run, devices: Devices, console: Console, reporter: Reporter) -> None:
    """Does the updates that are left; the trained weights are then in `run.model`."""
    options, recipe, special_ids = run.options, run.recipe, run.tokenizer.special_ids
    sharing = run.sharing
    order = Order(run.train.num_chunks, options.seed)
    attention_bos_id = special_ids["bos"] if options.document_mask else None
    energy = EnergyMeter(devices.device)
    flop = flops_per_token(run.model.config, run.train.chunk_size)
    guard = Guard(run, devices, console)
    with Display(run, console) as display, guard:
        while run.progress < 1:
            guard.step_begins()
            started = time.perf_counter()
            progress_before, seconds_before = run.progress, run.seconds

            # Batch: this process's share of the update's chunks; the token count is everybody's.
            numbers = order.chunks(run.step, recipe.chunks_per_step)
            batches = micro_batches(run.train, numbers, recipe.batch_size, devices)
            targets = [
                next_token_targets(ids, special_ids["bos"], special_ids["pad"]) for ids in batches
            ]
            num_targets = devices.sum((torch.cat(targets) != IGNORE).sum())

            # Forward, backward. Each summed loss is divided by the token count of the whole update,
            # so the result does not depend on how the update is cut into passes and processes
            # (transformers#34191); world_size undoes the averaging over processes.
            scale = devices.world_size / num_targets
            nats = torch.zeros((), device=devices.device)
            for index, (ids, target) in enumerate(zip(batches, targets, strict=True)):
                with sharing.accumulating(is_last=index == len(batches) - 1):
                    with devices.autocast():
                        loss, pass_nats = sharing.wrapped(
                            ids, target, attention_bos_id, options.z_loss, scale
                        )
                    loss.backward()
                    del loss  # what is left of its graph lies between memory for the next pass
                nats += pass_nats

            # Clip, update, unless the numbers say that something is wrong.
            grad_norm = sharing.clip(options.max_grad_norm)
            train_loss = float(devices.sum(nats) / num_targets)
            verdict = guard.judge(train_loss, grad_norm, numbers)
            if verdict == "roll back":
                continue
            learning_rate = recipe.learning_rate * learning_rate_share(
                run.progress_within_step, options.warmup_ratio, options.schedule
            )
            for optimizer in run.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate
                if verdict == "update":
                    optimizer.step()
            sharing.finish_update()

            # Log.
            num_tokens = recipe.chunks_per_step * run.train.chunk_size
            run.step += 1
            run.tokens += num_tokens
            step_seconds = devices.first_says(time.perf_counter() - started)
            run.seconds += step_seconds
            figures: dict[str, Any] = {
                "tokens": run.tokens,
                "loss": train_loss,
                "learning_rate": learning_rate,
                "grad_norm": grad_norm,
                "tokens_per_second": num_tokens / step_seconds,
                "mfu": num_tokens * flop / step_seconds / devices.matrix_flops,
                "memory_bytes": peak_memory_bytes(devices.device),
                "seconds": run.seconds,
            }
            if (joules := energy.read_joules()) is not None:
                run.joules += joules
                figures["joules"] = run.joules
            if run.step % options.log_steps == 0:
                _write(run, figures)
            display.show_step(figures)
            _warn(run, console, warnings_after_update(run, train_loss))

            # Evaluate, save, and stop after a signal.
            if run.evaluation_is_due(progress_before):
                guard.step_ends()
                with run.whole_model(devices):
                    figures = evaluate(run, devices, max_chunks=options.eval_chunks)
                    figures["samples"] = sample_texts(run, devices)
                run.test_loss = figures["test_loss"]
                _write(run, figures)
                display.show_evaluation(figures)
                if devices.is_first:
                    reporter.write_if_cheap()
            stop = guard.stop_is_asked()
            guard.step_ends()
            if stop or run.save_is_due(seconds_before):
                save(run, devices, console)
            if stop:
                raise guard.stopped()


def _write(run: Run, figures: dict[str, Any]) -> None:
    if run.metrics is not None:
        run.metrics.write(run.step, figures)


def _warn(run: Run, console: Console, messages: Iterable[str]) -> None:
    for message in messages:
        run.warn(console, message)
