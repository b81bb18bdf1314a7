"""Which device this process computes on, and who the other processes are.

`accelerate launch` and `torchrun` start one process a device and tell each its place through the
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
from typing import Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from kiem.compute.speed import measure_matrix_flops, prefers_bf16
from kiem.core.errors import ExitCode, UserError
from kiem.parallel.launch import lost_processes, read_place

_DTYPES: dict[Literal["fp32", "bf16"], torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
}
_LISTEN_EVERY_SECONDS = 0.02

# What `accelerate config` can ask for and kiem does otherwise: how it is called, and what to use.
_ACCELERATE_PLUGINS = {
    "ACCELERATE_USE_FSDP": ("FSDP", "--shard parameters"),
    "ACCELERATE_USE_DEEPSPEED": ("DeepSpeed", "--shard optimizer"),
    "ACCELERATE_USE_MEGATRON_LM": ("Megatron-LM", "--shard optimizer"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("a parallelism config", "--shard optimizer"),
}


@dataclass(frozen=True)
class Distributed:
    """This process's place among all.

    Attributes:
        rank: number of this process, from 0.
        world_size: processes.
        device: where this process computes.
        precision: "bf16" for autocast over fp32 weights, else "fp32".
        matrix_flops: FLOP/s of matrix products in that precision, measured, of all devices.
        local_rank: number of this process on its machine, from 0.
    """

    rank: int
    world_size: int
    device: torch.device
    precision: Literal["fp32", "bf16"]
    matrix_flops: float
    local_rank: int = 0

    @property
    def name(self) -> str:
        """What this process computes on, for people."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"CPU with {torch.get_num_threads()} threads"

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and speaks."""
        return self.rank == 0

    @property
    def matrix_dtype(self) -> torch.dtype:
        """What matrix products are done in."""
        return _DTYPES[self.precision]

    @property
    def is_local_main(self) -> bool:
        """Whether this is the first process of its machine, which checks what lies on its disk."""
        return self.local_rank == 0

    def autocast(self) -> torch.autocast:
        """Returns the context in which forward passes run."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Adds a tensor over all processes, in place, and returns it."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def all_reduce_min(self, tensor: Tensor) -> Tensor:
        """Takes the lowest values of all processes, in place, and returns them."""
        if self.world_size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MIN)
        return tensor

    def any(self, value: bool) -> bool:
        """Says whether `value` is true in any process."""
        return bool(self.all_reduce_sum(torch.tensor(int(value), device=self.device)))

    @contextlib.contextmanager
    def raise_on_all_ranks(self) -> Iterator[None]:
        """Makes a block fail in all processes when it fails in one, so that none waits in vain.

        Whatever only some processes do, or may fail at, stands in such a block. Nothing in it may
        wait for other processes.

        Raises:
            UserError: that of the block, or of the first process that has failed, with its name.
        """
        if self.world_size == 1:
            yield
            return
        failure: Exception | None = None
        try:
            yield
        except Exception as error:  # noqa: BLE001 - raised below, when the others know of it
            failure = error
        nobody = self.world_size
        rank = int(self.all_reduce_min(self._number(nobody if failure is None else self.rank)))
        if rank == nobody:
            return
        told = self._tell(_to_json(failure, self.rank), rank)
        raise failure or _from_json(told)

    def first_says(self, value: float) -> float:
        """Returns the first process's value in every process."""
        if self.world_size == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.broadcast(tensor, src=0)
        return float(tensor)

    def first_tells(self, text: str) -> str:
        """Returns the first process's text in every process."""
        return self._tell(text, 0) if self.world_size > 1 else text

    def _tell(self, text: str, source: int) -> str:
        """Returns the text of process `source` in every process."""
        data = list(text.encode(errors="replace")) if self.rank == source else []
        length = self._number(len(data))
        dist.broadcast(length, src=source)
        content = torch.zeros(int(length), dtype=torch.uint8, device=self.device)
        if self.rank == source:
            content = torch.tensor(data, dtype=torch.uint8, device=self.device)
        dist.broadcast(content, src=source)
        return bytes(content.tolist()).decode()

    def _number(self, value: int) -> Tensor:
        return torch.tensor(value, dtype=torch.int64, device=self.device)

    def barrier(self) -> None:
        """Returns when every process has come here."""
        if self.world_size > 1:
            dist.barrier()


@contextlib.contextmanager
def init_distributed(precision: Literal["auto", "fp32", "bf16"]) -> Iterator[Distributed]:
    """Joins the process group that the launcher prepared, and leaves it at the end.

    Args:
        precision: "auto" follows `accelerate launch --mixed_precision`, else takes bf16 where it is
            faster.

    Raises:
        UserError: the precision is not one this device or kiem has, `accelerate config` asks for a
            plugin that kiem does without, the launcher's variables make no sense, or another
            process was waited for in vain.
    """
    place = read_place()
    rank, local_rank, world_size = place.rank, place.local_rank, place.world_size
    use_gpu = torch.cuda.is_available() and not _is_true("ACCELERATE_USE_CPU")
    device = torch.device("cuda", local_rank) if use_gpu else torch.device("cpu")
    if use_gpu:
        torch.cuda.set_device(device)
    first = Distributed(rank, world_size, device, "fp32", 0.0, local_rank)
    try:
        with lost_processes(rank):
            if world_size > 1:
                store, rank, _ = next(rendezvous("env://"))
                store = _store_of_this_start(store, rank, world_size)
                _check_same_kind(store, device.type, rank, world_size)
                dist.init_process_group(
                    "nccl" if use_gpu else "gloo", store=store, rank=rank, world_size=world_size
                )
            with first.raise_on_all_ranks():
                _refuse_plugins()
                chosen = _choose_precision(precision, use_gpu)
            # The first process speaks for all: its choice, and its speed times their number.
            if chosen == "auto":
                chosen = "bf16" if prefers_bf16(device) else "fp32"
            chosen = cast(Literal["fp32", "bf16"], first.first_tells(chosen))
            with first.raise_on_all_ranks():
                _check_precision(chosen, use_gpu)
            flops = first.first_says(measure_matrix_flops(device, _DTYPES[chosen]))
            yield replace(first, precision=chosen, matrix_flops=flops * world_size)
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
            raise UserError(
                f"computes on a {found}, process 0 on a {kinds[0]}",
                where=f"process {other}",
                fix="See whether torch.cuda.is_available() says the same on all machines, or use "
                "ACCELERATE_USE_CPU=true on all.",
                exit_code=ExitCode.BAD_OPTION,
            )


def _to_json(failure: Exception | None, rank: int) -> str:
    """Returns what the other processes are told of a failure."""
    place = f"process {rank} on {socket.gethostname()}"
    told = {
        "what": f"it has failed ({type(failure).__name__}: {failure})",
        "where": place,
        "fix": "Look at its message.",
        "exit_code": int(ExitCode.PROCESS_LOST),
    }
    if isinstance(failure, UserError):
        where = f"{place}: {failure.where}" if failure.where else place
        code = int(failure.exit_code)
        told = {"what": failure.what, "where": where, "fix": failure.fix, "exit_code": code}
    return json.dumps(told)


def _from_json(told: str) -> UserError:
    values = json.loads(told)
    return UserError(
        values["what"],
        where=values["where"],
        fix=values["fix"],
        exit_code=ExitCode(values["exit_code"]),
    )


def _store_of_this_start(store: Store, rank: int, world_size: int) -> Store:
    """Returns a part of the launcher's store in which nothing is left of an earlier start.

    A launcher that starts processes again gives them the store of those that died. Their addresses
    are in it still, and who reads one before its new owner has written it connects to a port that
    nobody listens on, or waits for ever. torch's own count of starts cannot tell them apart: after
    a failure on one node, only that node counts. So the first process invents a name, and tells it
    to those that have shown that they are alive by a name of their own.
    """
    if rank > 0:
        caller = uuid.uuid4().hex
        store.set(f"kiem/caller/{rank}", caller)
        start = store.get(f"kiem/start/{caller}").decode()
        store.set(f"kiem/heard/{start}/{rank}", "")
        return PrefixStore(f"kiem/{start}", store)
    start = uuid.uuid4().hex
    for other in range(1, world_size):
        # The first caller that is found may be a dead one; its successor will call in its place.
        while not store.check([f"kiem/heard/{start}/{other}"]):
            caller = store.get(f"kiem/caller/{other}").decode()
            store.set(f"kiem/start/{caller}", start)
            time.sleep(_LISTEN_EVERY_SECONDS)
    return PrefixStore(f"kiem/{start}", store)


def _refuse_plugins() -> None:
    for variable, (plugin, option) in _ACCELERATE_PLUGINS.items():
        if _is_true(variable):
            raise UserError(
                f"{plugin} is not used by kiem, which shares models out by itself",
                where="accelerate config",
                fix=f"Take it out of the accelerate file, and use {option}.",
                exit_code=ExitCode.BAD_OPTION,
            )


def _choose_precision(precision: str, use_gpu: bool) -> Literal["auto", "fp32", "bf16"]:
    """Returns the precision that is asked for or clear; "auto" if it takes a measurement."""
    if precision == "auto":
        asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "")
        if asked in ("fp16", "fp8"):
            raise UserError(
                f"mixed precision {asked} is not supported",
                where="accelerate config",
                fix="Choose bf16 or no.",
                exit_code=ExitCode.BAD_OPTION,
            )
        if asked == "bf16":  # "no" is also what the launcher says of itself
            precision = "bf16"
        elif use_gpu:
            precision = "bf16" if _has_bf16(use_gpu) else "fp32"
    return cast(Literal["auto", "fp32", "bf16"], precision)


def _check_precision(precision: str, use_gpu: bool) -> None:
    if precision == "bf16" and not _has_bf16(use_gpu):
        raise UserError(
            "this GPU has no bf16",
            where="--precision",
            fix="Use --precision fp32.",
            exit_code=ExitCode.BAD_OPTION,
        )


def _has_bf16(use_gpu: bool) -> bool:
    return not use_gpu or torch.cuda.is_bf16_supported(including_emulation=False)


def _is_true(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes")
