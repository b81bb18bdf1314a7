"""The training loop: batch, forward, backward, clip, update, log, evaluate, save."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
from rich.console import Console

from kiem.compute.memory import is_out_of_memory, peak_memory_bytes
from kiem.config import TrainingOptions
from kiem.core.errors import UserError
from kiem.optim.batch import Collator, Order, micro_batches
from kiem.optim.optimizer import learning_rate_share
from kiem.optim.step import train_step
from kiem.parallel.distributed import Distributed, init_distributed
from kiem.planning.probe import out_of_memory
from kiem.planning.time_estimate import flops_per_token
from kiem.training.accessories import attempt
from kiem.training.display import Display, show_plan, show_results
from kiem.training.energy import EnergyMeter
from kiem.training.finish import close_trackers, final_model, point_latest_link, write_final_model
from kiem.training.guard import Guard, Verdict, save
from kiem.training.print_plan import print_plan
from kiem.training.reporter import Reporter
from kiem.training.run import Run, prepare_run
from kiem.training.sanity_checks import warnings_after_update, warnings_before
from kiem.training.validation import evaluate, measure_minimal_pairs, sample_texts

_DISPLAY = "the display"
_ENERGY = "the energy counter"


def train(options: TrainingOptions, console: Console) -> None:
    """Trains a model, from a chunk directory to a model directory.

    Args:
        options: all options of training.py.
        console: where progress and results go.

    Raises:
        UserError: anything about options, data, model, disk or memory that a person can mend.
    """
    with init_distributed(options.precision) as distributed, ExitStack() as held:
        if options.plan:
            return print_plan(options, distributed, console)
        run = prepare_run(options, distributed, console, held)
        reporter = Reporter(run.directory)
        attempt(
            run, console, "the display of the plan", partial(show_plan, run, distributed, console)
        )
        if run.resumed_from is None:
            _warn(run, console, partial(warnings_before, run))
        summary: dict[str, Any] | None = None
        try:
            train_to_the_end(run, distributed, console, reporter)
            with run.whole_model(distributed):
                figures = evaluate(run, distributed, console, max_chunks=None)
                figures |= measure_minimal_pairs(run, distributed, console)
                figures |= sample_texts(run, distributed, console, "the sample of text at the end")
                figures["memory_bytes"] = peak_memory_bytes(distributed.device)
                with distributed.raise_on_all_ranks():
                    if run.metrics is not None:
                        _write(run, console, figures)
                        summary = write_final_model(run, console, figures)
                        run.metrics.check()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise out_of_memory(run.recipe, f"step {run.step + 1}") from error
        except UserError as error:
            _write(run, console, {"warning": f"stopped: {error.what}"})
            raise
        finally:  # a run that was stopped has something to tell as well
            if distributed.is_main:
                if summary is not None:
                    attempt(
                        run, console, "the link to the newest run", partial(point_latest_link, run)
                    )
                attempt(run, console, "the report at the end", reporter.write)
                close_trackers(run, console, summary)
        if distributed.is_main:
            results = partial(show_results, run, figures, final_model(run), console)
            attempt(run, console, "the display of the results", results)
        distributed.barrier()


def train_to_the_end(
    run: Run, distributed: Distributed, console: Console, reporter: Reporter
) -> None:
    """Does the updates that are left; the trained weights are then in `run.model`."""
    options, recipe, special_ids = run.options, run.recipe, run.tokenizer.special_ids
    model = run.parallel_model
    collate = Collator(
        special_ids["bos"], special_ids["pad"], options.document_mask, distributed.device
    )
    order = Order(run.train.num_chunks, options.seed)
    energy = None
    if distributed.is_main:
        energy = attempt(run, console, _ENERGY, partial(EnergyMeter, distributed.device))
    flop = flops_per_token(run.model.config, run.train.chunk_size)
    guard = Guard(run, distributed, console)
    display = Display(run, console)
    with ExitStack() as shown, guard:
        attempt(run, console, _DISPLAY, display.start)
        shown.callback(attempt, run, console, "the end of the display", display.stop)
        while run.progress < 1:
            guard.step_begins()
            started = time.perf_counter()
            progress_before, seconds_before = run.progress, run.seconds

            # Batch: this process's share of the update's chunks; the token count is everybody's.
            numbers = order.chunks(run.step, recipe.chunks_per_step)
            batches = micro_batches(run.train, numbers, recipe.batch_size, collate, distributed)

            # Forward, backward, clip, update, unless the numbers say that something is wrong.
            learning_rate = recipe.learning_rate * learning_rate_share(
                run.progress_within_step, options.warmup_ratio, options.schedule
            )
            verdicts: list[Verdict] = []

            def accept(
                loss: float,
                grad_norm: float,
                numbers: np.ndarray = numbers,
                verdicts: list[Verdict] = verdicts,
            ) -> bool:
                verdicts.append(guard.judge(loss, grad_norm, numbers))
                return verdicts == ["update"]

            result = train_step(
                model,
                run.optimizers,
                batches,
                distributed,
                learning_rate=learning_rate,
                max_grad_norm=options.max_grad_norm,
                z_loss=options.z_loss,
                accept=accept,
            )
            if verdicts == ["roll back"]:
                continue
            train_loss, grad_norm = result.loss, result.grad_norm

            # Log.
            num_tokens = recipe.chunks_per_step * run.train.chunk_size
            run.step += 1
            run.tokens += num_tokens
            step_seconds = distributed.broadcast_from_main(time.perf_counter() - started)
            run.seconds += step_seconds
            figures: dict[str, Any] = {
                "tokens": run.tokens,
                "loss": train_loss,
                "learning_rate": learning_rate,
                "grad_norm": grad_norm,
                "tokens_per_second": num_tokens / step_seconds,
                "mfu": num_tokens * flop / step_seconds / distributed.matrix_flops,
                "memory_bytes": peak_memory_bytes(distributed.device),
                "seconds": run.seconds,
            }
            joules = attempt(run, console, _ENERGY, energy.read_joules) if energy else None
            # A sum without a part of the run would pass for the whole of it.
            run.joules = run.joules + joules if joules is not None else 0.0
            if run.joules:
                figures["joules"] = run.joules
            with distributed.raise_on_all_ranks():
                if run.step % options.log_steps == 0:
                    _write(run, console, figures)
                attempt(run, console, _DISPLAY, partial(display.show_step, figures))
                _warn(run, console, partial(warnings_after_update, run, train_loss))
                if run.metrics is not None:
                    run.metrics.check()

            # Evaluate, save, and stop after a signal.
            if run.evaluation_is_due(progress_before):
                guard.step_ends()
                with run.whole_model(distributed):
                    figures = evaluate(run, distributed, console, max_chunks=options.eval_chunks)
                    figures |= sample_texts(run, distributed, console, "the sample of text")
                run.test_loss = figures.get("test_loss")
                _write(run, console, figures)
                attempt(run, console, _DISPLAY, partial(display.show_evaluation, figures))
                if distributed.is_main:
                    attempt(run, console, "the report", reporter.write_if_cheap)
            stop = guard.stop_is_asked()
            guard.step_ends()
            if stop or run.save_is_due(seconds_before):
                save(run, distributed, console, is_last=stop or run.progress >= 1)
            if stop:
                raise guard.stopped()


def _write(run: Run, console: Console, figures: dict[str, Any]) -> None:
    """Writes figures into the log, and sends them to the trackers."""
    if run.metrics is not None:
        run.metrics.write(run.step, figures)
    for name, tracker in run.trackers.items():
        attempt(run, console, name, partial(tracker.send, run.step, figures))


def _warn(run: Run, console: Console, look: Callable[[], Iterable[str]]) -> None:
    """Says what the doctor finds."""
    for message in attempt(run, console, "the doctor", lambda: [*look()]) or []:
        run.warn(console, message)
