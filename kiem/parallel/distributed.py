"""The device that this process computes on, and its communication with the other processes.

`accelerate launch` and `torchrun` start one process per device and describe its place in the
environment (RANK, WORLD_SIZE, LOCAL_RANK); under plain `python` there is one process.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from kiem.compute.speed import measure_matrix_flops, prefers_bf16
from kiem.core.errors import ExitCode, UserError, bad_option
from kiem.parallel.launch import lost_processes, read_place

T = TypeVar("T")
Precision = Literal["fp32", "bf16"]

_DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
_POLL_SECONDS = 0.02
# Plugins of `accelerate config` that kiem does not use: variable, name, and the option to use.
_ACCELERATE_PLUGINS = (
    ("ACCELERATE_USE_FSDP", "FSDP", "--shard parameters"),
    ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed", "--shard optimizer"),
    ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM", "--shard optimizer"),
    ("ACCELERATE_USE_PARALLELISM_CONFIG", "a parallelism config", "--shard optimizer"),
)


@dataclass(frozen=True)
class Distributed:
    """The place of this process among all.

    Attributes:
        rank: number of this process, from 0.
        world_size: number of processes.
        device: where this process computes.
        precision: "bf16" for autocast over fp32 weights, else "fp32".
        matrix_flops: measured FLOP/s of matrix products in that precision, of all devices.
        local_rank: number of this process on its machine, from 0.
    """

    rank: int
    world_size: int
    device: torch.device
    precision: Precision
    matrix_flops: float
    local_rank: int = 0

    @property
    def name(self) -> str:
        """The name of the device, shown to users."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"CPU with {torch.get_num_threads()} threads"

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    @property
    def is_local_main(self) -> bool:
        """Whether this is the first process of its machine, which checks files on its disk."""
        return self.local_rank == 0

    @property
    def matrix_dtype(self) -> torch.dtype:
        """The precision of matrix products."""
        return _DTYPES[self.precision]

    def autocast(self) -> torch.autocast:
        """Returns the context for forward passes."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Adds a tensor over all processes, in place, and returns it."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def all_reduce_min(self, tensor: Tensor) -> Tensor:
        """Takes the lowest values over all processes, in place, and returns them."""
        if self.world_size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MIN)
        return tensor

    def any(self, value: bool) -> bool:
        """Returns whether `value` is true in any process."""
        return bool(self.all_reduce_sum(self._number(int(value))))

    def broadcast_from_main(self, value: T) -> T:
        """Returns the main process's value in every process; JSON must be able to hold it."""
        if self.world_size == 1:
            return value
        return cast(T, json.loads(self._broadcast_text(json.dumps(value), 0)))

    def all_gather(self, value: T) -> list[T]:
        """Returns the values of all processes, by rank, in every process; as JSON, as above."""
        if self.world_size == 1:
            return [value]
        text = json.dumps(value)
        return [json.loads(self._broadcast_text(text, rank)) for rank in range(self.world_size)]

    def barrier(self) -> None:
        """Waits until every process has called this."""
        if self.world_size > 1:
            dist.barrier()

    @contextlib.contextmanager
    def raise_on_all_ranks(self) -> Iterator[None]:
        """Makes a block fail in all processes when it fails in one, so that none waits in vain.

        For everything that only some processes do, or that may fail in only some. The block must
        not communicate with other processes.

        Raises:
            UserError: that of the block, or of the first process that failed, with its name.
        """
        if self.world_size == 1:
            yield
            return
        failure: Exception | None = None
        try:
            yield
        except Exception as error:  # noqa: BLE001 - raised below, when the others know of it
            failure = error
        none_failed = self.world_size
        rank = int(self.all_reduce_min(self._number(none_failed if failure is None else self.rank)))
        if rank == none_failed:
            return
        text = self._broadcast_text(json.dumps(vars(_with_place(failure, self.rank))), rank)
        values = json.loads(text)
        raise failure or UserError(**{**values, "exit_code": ExitCode(values["exit_code"])})

    def _broadcast_text(self, text: str, source: int) -> str:
        """Returns the ASCII text of process `source` in every process."""
        length = self._number(len(text))
        dist.broadcast(length, src=source)
        content = torch.zeros(int(length), dtype=torch.uint8, device=self.device)
        if self.rank == source:
            content = torch.tensor(list(text.encode()), dtype=torch.uint8, device=self.device)
        dist.broadcast(content, src=source)
        return bytes(content.tolist()).decode()

    def _number(self, value: int) -> Tensor:
        return torch.tensor(value, dtype=torch.int64, device=self.device)


@contextlib.contextmanager
def init_distributed(precision: Literal["auto", "fp32", "bf16"]) -> Iterator[Distributed]:
    """Joins the process group that the launcher prepared, and leaves it at the end.

    Args:
        precision: "auto" follows `accelerate launch --mixed_precision`, else uses bf16 where it is
            faster.

    Raises:
        UserError: the device or kiem does not have the precision, `accelerate config` names a
            plugin that kiem does not use, the launcher's variables are wrong, or another process
            is lost.
    """
    place = read_place()
    rank, local_rank, world_size = place.rank, place.local_rank, place.world_size
    use_gpu = torch.cuda.is_available() and not _is_true("ACCELERATE_USE_CPU")
    device = torch.device("cuda", local_rank) if use_gpu else torch.device("cpu")
    if use_gpu:
        torch.cuda.set_device(device)
    distributed = Distributed(rank, world_size, device, "fp32", 0.0, local_rank)
    try:
        with lost_processes(rank):
            if world_size > 1:
                store, rank, _ = next(rendezvous("env://"))
                store = _store_of_this_start(store, rank, world_size)
                _check_same_kind(store, device.type, rank, world_size)
                dist.init_process_group(
                    "nccl" if use_gpu else "gloo", store=store, rank=rank, world_size=world_size
                )
            with distributed.raise_on_all_ranks():
                chosen = _choose_precision(precision, use_gpu)
            # The main process decides for all, and its speed counts for every device.
            if chosen == "auto":
                chosen = "bf16" if prefers_bf16(device) else "fp32"
            chosen = cast(Precision, distributed.broadcast_from_main(chosen))
            with distributed.raise_on_all_ranks():
                if chosen == "bf16" and not _has_bf16(use_gpu):
                    raise bad_option("--precision", "this GPU has no bf16", "Use --precision fp32.")
            flops = distributed.broadcast_from_main(measure_matrix_flops(device, _DTYPES[chosen]))
            yield replace(distributed, precision=chosen, matrix_flops=flops * world_size)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _check_same_kind(store: Store, kind: str, rank: int, world_size: int) -> None:
    """Checks that all processes compute on the same kind of device: others cannot be joined.

    Raises:
        UserError: they do not, as when one machine's driver does not work; in all processes.
    """
    store.set(f"kind/{rank}", kind)
    kinds = [store.get(f"kind/{other}").decode() for other in range(world_size)]
    store.set(f"kind-known/{rank}", "")
    if rank == 0:  # the store may end with this process
        store.wait([f"kind-known/{other}" for other in range(world_size)])
    for other, found in enumerate(kinds):
        if found != kinds[0]:
            raise bad_option(
                f"process {other}",
                f"computes on a {found}, process 0 on a {kinds[0]}",
                "Check that torch.cuda.is_available() is the same on all machines, or set "
                "ACCELERATE_USE_CPU=true on all.",
            )


def _with_place(failure: Exception | None, rank: int) -> UserError:
    """Returns what the other processes raise for a failure: it names the process."""
    place = f"process {rank} on {socket.gethostname()}"
    if isinstance(failure, UserError):
        where = f"{place}: {failure.where}" if failure.where else place
        return UserError(failure.what, where=where, fix=failure.fix, exit_code=failure.exit_code)
    return UserError(
        f"it has failed ({type(failure).__name__}: {failure})",
        where=place,
        fix="Look at its message.",
        exit_code=ExitCode.PROCESS_LOST,
    )


def _store_of_this_start(store: Store, rank: int, world_size: int) -> Store:
    """Returns a part of the launcher's store without the entries of an earlier start.

    A launcher that restarts processes gives them the store of those that died, with their
    addresses. A process that reads one before its new owner has written it connects to a closed
    port or waits for ever. torch's own count of restarts does not help: after a failure on one
    node, only that node counts. So the main process invents a name, and gives it to those that
    have shown that they are alive by a name of their own.
    """
    if rank > 0:
        caller = uuid.uuid4().hex
        store.set(f"kiem/caller/{rank}", caller)
        start = store.get(f"kiem/start/{caller}").decode()
        store.set(f"kiem/heard/{start}/{rank}", "")
        return PrefixStore(f"kiem/{start}", store)
    start = uuid.uuid4().hex
    for other in range(1, world_size):
        # The first caller may be a dead process; its successor will replace the name.
        while not store.check([f"kiem/heard/{start}/{other}"]):
            caller = store.get(f"kiem/caller/{other}").decode()
            store.set(f"kiem/start/{caller}", start)
            time.sleep(_POLL_SECONDS)
    return PrefixStore(f"kiem/{start}", store)


def _choose_precision(precision: str, use_gpu: bool) -> str:
    """Returns the precision of the options or the launcher; "auto" if a CPU is to be measured."""
    where = "accelerate config"
    for variable, plugin, option in _ACCELERATE_PLUGINS:
        if _is_true(variable):
            fix = f"Take it out of the accelerate file, and use {option}."
            raise bad_option(where, f"{plugin} is not used by kiem, which shards by itself", fix)
    if precision != "auto":
        return precision
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "")
    if launcher in ("fp16", "fp8"):
        raise bad_option(where, f"mixed precision {launcher} is not supported", "Use bf16 or no.")
    if launcher == "bf16":  # "no" is also the launcher's own default
        return "bf16"
    if use_gpu:
        return "bf16" if _has_bf16(use_gpu) else "fp32"
    return "auto"


def _has_bf16(use_gpu: bool) -> bool:
    return not use_gpu or torch.cuda.is_bf16_supported(including_emulation=False)


def _is_true(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes")
