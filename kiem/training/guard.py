"""What keeps a run from going on when it should not: signals, bad numbers, a process that hangs."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Sequence
from functools import partial
from types import FrameType, TracebackType
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from kiem.core.errors import ExitCode, UserError
from kiem.core.files import format_bytes, write_json
from kiem.model.loss import next_token_targets
from kiem.parallel.distributed import Distributed
from kiem.parallel.parallel_model import full_tensor
from kiem.training.accessories import attempt, attempt_together
from kiem.training.checkpoint import (
    CHECKPOINTS,
    checkpoint_bytes,
    newest_valid,
    prune_checkpoints,
    save_checkpoint,
)
from kiem.training.run import Run

Verdict = Literal["update", "skip", "roll back"]

SPIKE_WINDOW = 128
# Losses that hardly differ, as those of text learnt by heart, would make every hiccup a spike.
_LEAST_DEVIATION = 0.01
# A launcher passes Ctrl-C on to processes that got it from the terminal already.
_SAME_REQUEST_SECONDS = 1.0
# Between two checkpoints; more are not the fault of single chunks.
_MOST_BAD_STEPS = 10
# An update that takes so long, and so many times the longest before it, will not end.
HANG_SECONDS = 45.0
_HANG_FACTOR = 10
_STEPS_BEFORE_WATCH = 3


class Guard:
    """Watches over the updates of a run; use it as a context manager around them.

    SIGTERM, SIGINT and SIGHUP (the terminal is gone) ask for a checkpoint and the end of the run
    after the update that is under way; a second one ends the process at once.

    Args:
        run: the run.
        distributed: all processes; they come to the same decisions.
        console: where warnings go.
    """

    def __init__(self, run: Run, distributed: Distributed, console: Console):
        self._run = run
        self._devices = distributed
        self._console = console
        self._signal: signal.Signals | None = None
        self._signal_time = 0.0
        self._handlers: dict[signal.Signals, Any] = {}
        self._bad_steps: set[int] = set()
        self._watch = HangWatch() if distributed.world_size > 1 else None

    def __enter__(self) -> Guard:
        is_main = threading.current_thread() is threading.main_thread()
        if is_main and self._run.options.save_steps != 0:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                    self._handlers[number] = signal.signal(number, self._note_signal)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.step_ends()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def step_begins(self) -> None:
        """From here on until `step_ends`, waiting for another process takes an end."""
        if self._watch is not None:
            self._watch.begin()

    def step_ends(self) -> None:
        """What follows may take any time."""
        if self._watch is not None:
            self._watch.end()

    def stop_is_asked(self) -> bool:
        """Says whether any process got a signal."""
        return self._devices.any(self._signal is not None)

    def stopped(self) -> UserError:
        """Returns what to raise after a signal, when the checkpoint is saved."""
        name = self._signal.name if self._signal is not None else "a signal to another process"
        is_saved = self._run.saved_step == self._run.step
        outcome = "a checkpoint is saved" if is_saved else "no checkpoint could be saved"
        return UserError(
            f"stopped by {name} after step {self._run.step}; {outcome}",
            where=str(self._run.directory),
            fix="The same command with this --run-name goes on from the newest checkpoint.",
            exit_code=ExitCode.STOPPED if is_saved else ExitCode.DISK_SPACE,
        )

    def judge(self, loss: float, grad_norm: float, numbers: np.ndarray) -> Verdict:
        """Says what to do with the gradients of an update, before anything is changed.

        Args:
            loss, grad_norm: of the update, the same in all processes.
            numbers: the chunks that it read.

        Returns:
            "update"; "skip": count the update, but leave the weights as they are; "roll back": the
            run is back at its newest checkpoint, begin again from there.

        Raises:
            UserError: a number is not finite and --on-nan is stop, or skipping does not help.
        """
        run = self._run
        if run.step in self._bad_steps:
            return self._skip(f"step {run.step + 1} is skipped: its numbers were not finite")
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return self._handle_not_finite(loss, grad_norm, numbers)
        limit = spike_limit(run.recent_losses, run.options.spike_sigmas)
        run.recent_losses.append(min(loss, limit))
        del run.recent_losses[:-SPIKE_WINDOW]
        if loss > limit:
            return self._skip(
                f"step {run.step + 1} is skipped: its loss {loss:.3f} is above {limit:.3f}, "
                f"{run.options.spike_sigmas:g} standard deviations over the {SPIKE_WINDOW} before"
            )
        return "update"

    def _skip(self, message: str) -> Verdict:
        self._run.num_skipped += 1
        self._run.warn(self._console, f"{message} ({self._run.num_skipped} so far)")
        return "skip"

    def _handle_not_finite(self, loss: float, grad_norm: float, numbers: np.ndarray) -> Verdict:
        self.step_ends()
        run, step = self._run, self._run.step
        what = f"loss {loss} and gradient norm {grad_norm} are not both finite"
        path = run.directory / f"not-finite-step-{step + 1}.json"
        evidence = self._evidence(loss, grad_norm, numbers)
        if self._devices.is_main:
            attempt(run, self._console, str(path), lambda: write_json(path, evidence))
        self._bad_steps.add(step)
        num_bad = sum(bad >= (run.saved_step or 0) for bad in self._bad_steps)
        if run.options.on_nan == "stop" or num_bad > _MOST_BAD_STEPS:
            raise UserError(
                f"{what}, {num_bad} times since the checkpoint; chunks and tokens are in {path}",
                where=f"step {step + 1}",
                fix="The weights are not changed by this update. Lower --learning-rate, use "
                "--precision fp32, or leave such updates out with --on-nan skip.",
                exit_code=ExitCode.NOT_FINITE,
            )
        checkpoint = self._newest_checkpoint()
        if checkpoint is None:
            return self._skip(f"step {step + 1} is skipped: {what}")
        run.go_on_from(checkpoint, self._devices)
        run.parallel_model.zero_grad()
        if run.metrics is not None:
            # Readers of the log know a step that comes again, so this only makes it shorter.
            attempt(run, self._console, "shortening the log", partial(run.metrics.rewind, run.step))
        run.warn(
            self._console,
            f"step {step + 1}: {what}; back to step {run.step}, and then without step {step + 1} "
            f"(chunks and tokens are in {path})",
        )
        return "roll back"

    def _newest_checkpoint(self) -> Any:
        """Returns the newest whole checkpoint, None if there is none; the first process decides."""
        folder, step = self._run.directory / CHECKPOINTS, -1
        with self._devices.raise_on_all_ranks():
            if self._devices.is_main and (found := newest_valid(folder, self._console)):
                step = int(found.name.removeprefix("step-"))
        step = int(self._devices.broadcast_from_main(step))
        return folder / f"step-{step}" if step >= 0 else None

    def _evidence(self, loss: float, grad_norm: float, numbers: np.ndarray) -> dict[str, Any]:
        """Returns what one needs to look at an update: its chunks, and which is to blame."""
        run, distributed = self._run, self._devices
        chunks = run.train.read(numbers)
        name = "looking at its chunks one by one"
        with run.whole_model(distributed):
            measure = partial(self._nats_of_own, chunks)
            nats = attempt_together(run, distributed, self._console, name, measure)
        if nats is None:
            nats = torch.full((len(numbers),), math.nan, device=distributed.device)
        parameters = run.model.named_parameters()
        gradients = ((name, full_tensor(p.grad)) for name, p in parameters if p.grad is not None)
        bad = [name for name, gradient in gradients if not bool(gradient.isfinite().all())]
        return {
            "step": run.step + 1,
            "loss": str(loss),
            "grad_norm": str(grad_norm),
            "parameters_with_bad_gradients": bad,
            "chunks": [
                {"chunk": int(number), "nats": str(value), "tokens": tokens.tolist()}
                for number, value, tokens in zip(
                    numbers, distributed.all_reduce_sum(nats).tolist(), chunks, strict=True
                )
            ],
        }

    def _nats_of_own(self, chunks: np.ndarray) -> Tensor:
        """Returns the loss of each chunk that this process looks at, and 0 of others; [chunks]."""
        run, distributed = self._run, self._devices
        nats = torch.zeros(len(chunks), dtype=torch.float64, device=distributed.device)
        special_ids = run.tokenizer.special_ids
        bos_id = special_ids["bos"] if run.options.document_mask else None
        for index in range(distributed.rank, len(chunks), distributed.world_size):
            ids = torch.from_numpy(chunks[index : index + 1]).long().to(distributed.device)
            targets = next_token_targets(ids, special_ids["bos"], special_ids["pad"])
            with torch.no_grad(), distributed.autocast():
                nats[index] = run.model(ids, targets, bos_id)[1].double()
        return nats

    def _note_signal(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if self._signal is None:
            self._signal, self._signal_time = signal.Signals(number), now
            if self._devices.is_main:  # not by the console, which may be in the middle of a line
                message = f"\n{self._signal.name}: stopping after this update with a checkpoint; "
                _say(f"{message}a second signal stops at once\n")
        elif now - self._signal_time > _SAME_REQUEST_SECONDS:
            os._exit(128 + number)


def save(run: Run, distributed: Distributed, console: Console, *, is_last: bool) -> None:
    """Commits a checkpoint and removes old ones, if this update has none yet.

    All processes call it. With `--on-save-failure continue` a refusal is a warning if a run has a
    checkpoint that it can go on from; a run of days that never had one would be lost with anything
    that ends it.

    Args:
        run, devices, console: of the training.
        is_last: whether the training ends here anyway, with its model or after a signal.

    Raises:
        UserError: the disk refuses and --on-save-failure is stop, or it is the first checkpoint;
            names what and how much.
    """
    if run.saved_step == run.step:
        return
    folder = run.directory / CHECKPOINTS
    special_ids = run.tokenizer.special_ids
    try:
        with distributed.raise_on_all_ranks():
            if run.metrics is not None:
                run.metrics.sync()
        save_checkpoint(folder, run.model, run.optimizers, special_ids, run.state(), distributed)
        run.saved_step = run.step
        with distributed.raise_on_all_ranks():
            if distributed.is_main:
                prune_checkpoints(folder, run.options.save_total_limit)
    except UserError as error:
        if run.saved_step != run.step:
            size = format_bytes(checkpoint_bytes(run.model, run.optimizers))
            error.what = f"checkpoint of step {run.step}, some {size}: {error.what}"
        if run.options.on_save_failure == "stop" or (run.saved_step is None and not is_last):
            raise
        run.warn(console, f"{error.where}: {error.what}; training goes on")


def spike_limit(recent_losses: Sequence[float], sigmas: float) -> float:
    """Returns the loss above which an update is not done.

    A loss above it enters the history as the limit itself, so that one spike does not hide the
    next, but losses that stay high are believed after some twenty updates.

    Args:
        recent_losses: of the updates before.
        sigmas: standard deviations above their mean; 0: no limit.
    """
    if sigmas == 0 or len(recent_losses) < SPIKE_WINDOW:
        return math.inf
    mean = float(np.mean(recent_losses))
    return mean + sigmas * max(float(np.std(recent_losses)), _LEAST_DEVIATION * mean)


def _say(message: str) -> None:
    with contextlib.suppress(OSError):  # the terminal can be gone
        os.write(2, message.encode())


class HangWatch:
    """Ends this process when an update does not end, as when another process hangs.

    The launcher then ends the others, and starts all again if it may (torchrun --max-restarts).
    """

    def __init__(self) -> None:
        self._began: float | None = None
        self._longest = 0.0
        self._num_steps = 0
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        """An update begins."""
        self._began = time.monotonic()
        if self._thread is None and self._num_steps >= _STEPS_BEFORE_WATCH:
            self._thread = threading.Thread(target=self._look, daemon=True)
            self._thread.start()

    def end(self) -> None:
        """The update has ended, or something else takes over."""
        if self._began is not None:
            self._longest = max(self._longest, time.monotonic() - self._began)
            self._began = None
            self._num_steps += 1

    def _look(self) -> None:
        while True:
            time.sleep(1)
            began = self._began
            limit = max(HANG_SECONDS, _HANG_FACTOR * self._longest)
            if began is not None and time.monotonic() - began > limit:
                message = f"\nerror: an update has stood still for {limit:.0f} seconds\n"
                _say(f"{message}  Another process may hang; start again.\n")
                os._exit(ExitCode.HUNG)
