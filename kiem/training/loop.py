"""The training loop: batch, step, check, log, evaluate, save, report."""

from __future__ import annotations

import math
import time
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn

import numpy as np
from rich.console import Console

from kiem.compute.memory import is_out_of_memory, peak_memory_bytes
from kiem.config import TrainingOptions
from kiem.core.errors import ExitCode, UserError
from kiem.core.files import format_bytes
from kiem.data.order import chunk_numbers
from kiem.model.gemma3 import Gemma3
from kiem.optim.batch import Batch, micro_batches, own_numbers
from kiem.optim.optimizer import learning_rate_share
from kiem.optim.step import StepResult, train_step
from kiem.parallel.distributed import init_distributed
from kiem.parallel.launch import use_processors
from kiem.planning.print_plan import print_plan
from kiem.planning.probe import out_of_memory
from kiem.planning.recipe import SECONDS_BETWEEN_SAVES
from kiem.planning.time_estimate import flops_per_token
from kiem.training.anomalies import Anomalies, warnings_after_update, warnings_before
from kiem.training.checkpoint import (
    CHECKPOINTS,
    prune_checkpoints,
    save_checkpoint,
)
from kiem.training.outputs import (
    Display,
    point_latest_link,
    show_results,
    show_start,
    write_final_model,
    write_run_report,
)
from kiem.training.resume import restore
from kiem.training.run import Run, RunSpec, TrainState
from kiem.training.setup import setup
from kiem.training.signals import HangWatch
from kiem.training.validation import evaluate, measure_minimal_pairs, sample_texts

_EVALUATIONS_PER_RUN = 5
_REPORTS_PER_RUN = 20  # a report of a long run takes seconds
_CHECKS = "the sanity checks"
_DISPLAY = "the display"


def train(options: TrainingOptions, console: Console) -> None:
    """Trains a model, from a chunk directory to a model directory.

    Args:
        options: all options of training.py.
        console: where progress and results go.

    Raises:
        UserError: anything about options, data, model, disk or memory that users can correct.
    """
    use_processors(console)
    with init_distributed(options.precision) as distributed:
        if options.plan:
            return print_plan(options, distributed, console)
        with setup(options, distributed, console) as (run, state):
            _train(run, state)
        distributed.barrier()


def _train(run: Run, state: TrainState) -> None:
    """Trains, evaluates, and writes the final model and the report."""
    log, is_main = run.log, run.spec.distributed.is_main
    summary: dict[str, Any] | None = None
    figures: dict[str, Any] = {}
    log.attempt("the display of the start", partial(show_start, run, state))
    if run.resumed_from is None:
        log.warn_of(_CHECKS, lambda: warnings_before(run))
    try:
        with run.signals:
            state = train_updates(run, state)
            model = run.model.full_model()
            figures = _evaluate_at_end(run, state, model)
        with run.spec.distributed.raise_on_all_ranks():
            if is_main:
                log.write(figures)
                summary = write_final_model(run, state, model, figures)
                log.raise_refusal()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise out_of_memory(run.spec.recipe, f"step {log.step + 1}") from error
    except UserError as error:
        log.write({"warning": f"stopped: {error.what}"})
        raise
    finally:  # a run that was stopped has a report as well
        if is_main:
            if summary is not None:
                log.attempt("the link to the newest run", partial(point_latest_link, run.spec))
            log.attempt("the report at the end", partial(write_run_report, run.spec))
            log.close(summary)
    if is_main:
        log.attempt("the display of the results", partial(show_results, run, state, figures))


def train_updates(run: Run, state: TrainState) -> TrainState:
    """Does the updates that are left, and returns the state after the last one."""
    spec, options, recipe = run.spec, run.spec.options, run.spec.recipe
    distributed, log, display = run.spec.distributed, run.log, Display(run)
    with ExitStack() as stack:
        watch = HangWatch(is_enabled=distributed.world_size > 1)
        stack.callback(watch.end)
        anomalies = Anomalies(run, watch)
        log.attempt(_DISPLAY, display.start)
        stack.callback(log.attempt, "the end of the display", display.stop)
        if state.awaits_evaluation:  # a signal ended it
            _end_update(run, state, state, watch, display)
        while state.progress(recipe) < 1:
            watch.begin()
            started, before = time.perf_counter(), replace(state)

            # Batch: this process's part of the chunks that the update reads.
            numbers, batches = _read_batches(run, state.step)

            # Step: forward, backward, clip, update.
            learning_rate = _learning_rate(spec, state)
            judge = partial(anomalies.judge, state, numbers)
            result = train_step(
                run.model, run.optimizers, batches, distributed, options, learning_rate, judge
            )

            # Check: go back to a checkpoint, or count the update even if it was skipped.
            if result.verdict.checkpoint is not None:
                state = restore(run, result.verdict.checkpoint)
                log.rewind(state.step)
                log.warn(result.verdict.reason)
                continue
            if result.verdict.recent_losses is not None:
                state.recent_losses = result.verdict.recent_losses
            if result.verdict.action == "skip":
                state.num_skipped += 1
                log.warn(f"{result.verdict.reason} ({state.num_skipped} so far)")
            seconds = distributed.broadcast_from_main(time.perf_counter() - started)
            state.step += 1
            num_tokens = len(numbers) * run.spec.data.train.chunk_size
            state.tokens += num_tokens
            state.seconds += seconds
            log.step = state.step

            # Log, evaluate, save, report; stop after a signal.
            _log_step(run, state, display, result, learning_rate, num_tokens / seconds)
            state.awaits_evaluation = _evaluation_is_due(spec, state, before)
            _end_update(run, state, before, watch, display)
    return state


def _read_batches(run: Run, step: int) -> tuple[np.ndarray, list[Batch]]:
    """Returns the chunks that an update reads, by number, and this process's batches of them."""
    spec, chunks = run.spec, run.spec.data.train
    batch_size, distributed = spec.recipe.batch_size, spec.distributed
    numbers, following = (chunk_numbers(spec.order, at) for at in (step, step + 1))
    batches = micro_batches(chunks, numbers, batch_size, spec.collate, distributed)
    chunks.read_ahead(own_numbers(following, batch_size, distributed).ravel())
    return numbers, batches


def _learning_rate(spec: RunSpec, state: TrainState) -> float:
    """Returns the learning rate of the next update."""
    progress = state.progress_within_step(spec.recipe)
    share = learning_rate_share(progress, spec.options.warmup_ratio, spec.options.schedule)
    return spec.recipe.learning_rate * share


def _log_step(
    run: Run,
    state: TrainState,
    display: Display,
    result: StepResult,
    lr: float,
    tokens_per_second: float,
) -> None:
    """Writes and shows the figures of an update, and warns of what is wrong with its loss."""
    spec, log = run.spec, run.log
    flops = tokens_per_second * flops_per_token(spec.config, spec.data.train.chunk_size)
    figures: dict[str, Any] = {
        "tokens": state.tokens,
        "loss": result.loss,
        "learning_rate": lr,
        "grad_norm": result.grad_norm,
        "tokens_per_second": tokens_per_second,
        "mfu": flops / spec.distributed.matrix_flops,
        "memory_bytes": peak_memory_bytes(spec.distributed.device),
        "seconds": state.seconds,
    }
    with spec.distributed.raise_on_all_ranks():
        if state.step % spec.options.log_steps == 0:
            log.write(figures)
        log.attempt(_DISPLAY, partial(display.show_step, state, figures))
        log.warn_of(_CHECKS, lambda: warnings_after_update(run, state, result.loss))
        log.raise_refusal()


def _end_update(
    run: Run, state: TrainState, before: TrainState, watch: HangWatch, display: Display
) -> None:
    """Evaluates, saves and reports what is due after an update; ends the run after a signal."""
    spec = run.spec
    if state.awaits_evaluation:
        watch.end()
        _evaluate(run, state, display)
    is_stopping = run.signals.is_asked()
    watch.end()
    if is_stopping:
        _stop(run, state)
    if _save_is_due(spec, state, before):
        save(run, state, is_last=state.progress(spec.recipe) >= 1)
    if _passes_part(spec, state, before, _REPORTS_PER_RUN):
        _report(run)


def _evaluation_is_due(spec: RunSpec, state: TrainState, before: TrainState) -> bool:
    """Returns whether to evaluate after this update; never after the last one."""
    every = spec.options.eval_steps
    if every is None:
        return _passes_part(spec, state, before, _EVALUATIONS_PER_RUN)
    return every > 0 and state.step % every == 0 and state.progress(spec.recipe) < 1


def _passes_part(spec: RunSpec, state: TrainState, before: TrainState, num_parts: int) -> bool:
    """Returns whether this update ends one of the equal parts of a run, but not the last one."""
    now, then = (math.floor(s.progress(spec.recipe) * num_parts) for s in (state, before))
    return then < now < num_parts


def _evaluate(run: Run, state: TrainState, display: Display) -> None:
    """Evaluates on some of the test split; after a signal the state still awaits it."""
    state.test_loss = None  # that of an earlier update would count for this one's checkpoint
    model = run.model.full_model()
    figures = evaluate(run, model, max_chunks=run.spec.options.eval_chunks)
    figures |= sample_texts(run, model, "the sample of text")
    if run.signals.is_asked():
        return
    state.test_loss, state.awaits_evaluation = figures.get("test_loss"), False
    run.log.write(figures)
    run.log.attempt(_DISPLAY, partial(display.show_evaluation, state, figures))


def _evaluate_at_end(run: Run, state: TrainState, model: Gemma3) -> dict[str, Any]:
    """Returns the figures of the final model; after a signal it ends the run."""
    figures = evaluate(run, model, max_chunks=None)
    figures |= measure_minimal_pairs(run, state, model)
    figures |= sample_texts(run, model, "the sample of text at the end")
    if run.signals.is_asked():
        _stop(run, state)
    return {**figures, "memory_bytes": peak_memory_bytes(run.spec.distributed.device)}


def _report(run: Run) -> None:
    """Writes the report, for which the other processes wait here: their next update is timed."""
    if run.spec.distributed.is_main:
        run.log.attempt("the report", partial(write_run_report, run.spec))
    run.spec.distributed.barrier()


def _save_is_due(spec: RunSpec, state: TrainState, before: TrainState) -> bool:
    """Returns whether to save a checkpoint after this update."""
    # The evaluation at the end can take long, so the last update has a checkpoint too.
    is_last, every = state.progress(spec.recipe) >= 1, spec.options.save_steps
    if every is not None:
        return every > 0 and (is_last or state.step % every == 0)
    now, then = (s.seconds // SECONDS_BETWEEN_SAVES for s in (state, before))
    test = spec.data.test
    is_long_test = test.num_chunks * test.chunk_size > state.tokens
    return now > then or (is_last and (now > 0 or is_long_test))


def save(run: Run, state: TrainState, *, is_last: bool) -> None:
    """Commits a checkpoint and removes old ones.

    All processes call it. With `--on-save-failure continue` a refusal is a warning if the run has
    a checkpoint to resume from (without one, days of work could be lost), or if it ends here anyway
    (`is_last`).

    Raises:
        UserError: the disk refuses and --on-save-failure is stop, or it is the first checkpoint;
            names what and how much.
    """
    spec, distributed = run.spec, run.spec.distributed
    folder, model = spec.directory / CHECKPOINTS, run.model.module
    content = {
        "step": state.step,
        "run": state.to_save(),
        "fingerprint": spec.fingerprint(),
        "changeable": spec.changeable(),
        "first_weights": spec.first_weights,
        "branched_from": spec.branched_from,
    }
    special_ids = spec.data.tokenizer.special_ids
    try:
        with distributed.raise_on_all_ranks():
            run.log.sync()
        save_checkpoint(folder, model, run.optimizers, special_ids, content, distributed)
        state.saved_step = state.step
        with distributed.raise_on_all_ranks():
            if distributed.is_main:
                prune_checkpoints(folder, spec.options.save_total_limit)
    except UserError as error:
        if state.saved_step != state.step:
            size = format_bytes(12 * spec.config.num_parameters())
            error.what = f"checkpoint of step {state.step}, up to {size}: {error.what}"
        has_none = state.saved_step is None
        if spec.options.on_save_failure == "stop" or (has_none and not is_last):
            raise
        run.log.warn(f"{error.where}: {error.what}; training goes on")


def _stop(run: Run, state: TrainState) -> NoReturn:
    """Ends a run after a signal, with a checkpoint."""
    if state.saved_step != state.step:
        save(run, state, is_last=True)
    is_saved = state.saved_step == state.step
    outcome = "a checkpoint is saved" if is_saved else "no checkpoint could be saved"
    raise UserError(
        f"stopped by {run.signals.name} after step {state.step}; {outcome}",
        where=str(run.spec.directory),
        fix="The same command with this --run-name resumes from the newest checkpoint.",
        exit_code=ExitCode.STOPPED if is_saved else ExitCode.DISK_SPACE,
    )
