"""How fast a GPU trains and decodes: kiem, transformers beside it, and what the plan says.

Run by gpu.py.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from gpu_record import (
    BOS,
    PAD,
    Bench,
    compile_refusal,
    first_line,
    made_up_chunks,
    new_model,
    new_peer,
    run_part,
    seconds_of,
    synchronize,
)
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from kiem.compute.cross_entropy import logits_gradient
from kiem.compute.memory import is_out_of_memory
from kiem.config import TrainingOptions
from kiem.inference.engine import Engine, Request
from kiem.inference.sampling import SamplingParams
from kiem.model.gemma3 import Gemma3, run_layer
from kiem.optim.batch import Batch, Collator
from kiem.optim.optimizer import make_optimizers
from kiem.optim.step import Verdict, train_step
from kiem.parallel.parallel_model import ParallelModel
from kiem.planning.memory_estimate import estimate_memory, setting_of
from kiem.planning.time_estimate import calculate_step_seconds, flops_per_token

# Compiled or not, what is recomputed, and the optimizer; the fastest is expected first.
_CASES = (
    (True, "none", "muon"),
    (True, "selective", "muon"),
    (True, "full", "muon"),
    (True, "none", "adamw"),
    (False, "none", "muon"),
)
_TARGET_MFU = 55_000 * 6.13e9 / 989e12  # 55 000 tokens/s of gemma3-1b on one H100
_BEST = "the fastest"
_TOP_KERNELS = 20
_TRAINER_STEPS, _TRAINER_PASSES = 5, 2
# A token may differ from transformers' where its logit there is this close to the highest: about
# what bf16 loses.
_NEAR_TIE = 0.1


class Trainee:
    """A model in training, as training.py does it.

    Args:
        bench, model: the part, and what it trains.
        compiled, recompute, optimizer: the case.
    """

    def __init__(
        self, bench: Bench, model: Gemma3, compiled: bool, recompute: Any, optimizer: Any
    ) -> None:
        self.case = compiled, recompute, optimizer
        model.recompute = recompute
        model.run_layer = run_layer
        model.logits_gradient = logits_gradient
        if compiled:
            torch.compiler.reset()
            model.compile_layers()
        self._distributed = bench.distributed
        self._model = ParallelModel(model, self._distributed, "none")
        dtype = self._distributed.matrix_dtype
        self._optimizers = make_optimizers(model, optimizer, 0.1, matrix_dtype=dtype)
        self._options = TrainingOptions(dataset_path=(Path(),))

    def update(self, batches: list[Batch]) -> float:
        """Does an update; returns its seconds."""
        device = self._distributed.device
        synchronize(device)
        started = time.perf_counter()
        train_step(
            self._model,
            self._optimizers,
            batches,
            self._distributed,
            self._options,
            1e-4,
            lambda *_: Verdict("update"),
        )
        synchronize(device)
        return time.perf_counter() - started


def training(bench: Bench) -> None:
    """Updates of the true model: how it is computed, what is recomputed, and both optimizers."""
    sizes, device = bench.sizes, bench.device
    model = new_model(bench)
    refusal = compile_refusal(device)
    cases = _CASES[:: 4 if bench.rehearse else 1]
    best = 0.0
    for compiled, recompute, optimizer in cases:
        name = f"{'compiled' if compiled else 'eager'}, recompute {recompute}, {optimizer}"
        if compiled and refusal is not None:
            bench.report(name, refusal, verdict="eager only")
            continue
        batch_size = sizes.batch_size
        while batch_size:
            free(model, device)
            trainee = None
            try:
                trainee = Trainee(bench, model, compiled, recompute, optimizer)
                best = max(best, time_updates(bench, name, trainee, batch_size))
                break
            except Exception as error:  # noqa: BLE001 - the other cases go on
                if not is_out_of_memory(error):
                    report_failure(bench, name, error, "failed")
                    break
            finally:
                trainee = None  # its moments, before the next one makes its own
            batch_size //= 2
        else:
            bench.report(name, "does not fit", verdict="measured")
    if best and bench.gpu is not None:
        flops = flops_per_token(sizes.config, sizes.chunk_size)
        peak = bench.gpu.matrix_flops
        target = _TARGET_MFU * peak / flops
        bench.report(_BEST, best, "tokens/s", at_least=round(target), is_speed=True)
        bench.report("share of the published peak", best * flops / peak)


def time_updates(bench: Bench, name: str, trainee: Trainee, batch_size: int) -> float:
    """Reports speed and memory of updates, and of the first case what the GPU did.

    Returns:
        Tokens per second.
    """
    sizes, device = bench.sizes, bench.device
    started = time.perf_counter()
    num_passes = sizes.accumulation * sizes.batch_size // batch_size
    collate = Collator(BOS, PAD, True, device)
    chunks = made_up_chunks(sizes, num_passes * batch_size)
    batches = [collate(part) for part in chunks.reshape(num_passes, batch_size, -1)]
    for _ in range(2):
        trainee.update(batches[:2])
    prepared = time.perf_counter() - started
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    is_first = trainee.case == _CASES[0]
    num_graphs = counters["stats"]["unique_graphs"]
    seconds = [trainee.update(batches) for _ in range(3 if is_first else 1)]
    memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    speed = chunks.size / min(seconds)
    compiled, recompute, optimizer = trainee.case
    bench.report(
        name,
        speed,
        "tokens/s",
        memory_bytes=memory,
        compiled=compiled,
        recompute=recompute,
        optimizer=optimizer,
        batch_size=batch_size,
        accumulation=num_passes,
        update_seconds=seconds,
        preparation_seconds=prepared,
        graphs_compiled_meanwhile=counters["stats"]["unique_graphs"] - num_graphs,
    )
    if is_first:
        report_kernels(bench, lambda: trainee.update(batches[:2]))
    return speed


def report_kernels(bench: Bench, run: Callable[[], float]) -> None:
    """Reports what takes the GPU's time in a call: its busy share, and the kernels by time."""
    on_gpu = bench.device.type == "cuda"
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    try:
        with profile(activities=[activity]) as profiled:
            seconds = run()
    except RuntimeError as error:  # not every machine lets one look
        return bench.report("GPU's busy share", first_line(error), verdict="left out")
    times = {
        event.key: event.self_device_time_total if on_gpu else event.self_cpu_time_total
        for event in profiled.key_averages()
        if not on_gpu or event.device_type == DeviceType.CUDA
    }
    top = sorted(times, key=times.__getitem__, reverse=True)[:_TOP_KERNELS]
    kernels = {name[:120]: round(times[name] / 1000, 3) for name in top}
    busy = sum(times.values()) / 1e6 / seconds
    bench.report("GPU's busy share", busy, kernels_ms=kernels, seconds=seconds)


def report_failure(bench: Bench, name: str, error: Exception, verdict: str) -> None:
    """Reports an error, with its traceback in the file."""
    why = f"{type(error).__name__}: {first_line(error)}"
    bench.report(name, why, verdict=verdict, trace=traceback.format_exc()[-3000:])


def free(model: nn.Module, device: torch.device) -> None:
    """Frees gradients and what else an earlier case has left."""
    for parameter in model.parameters():
        parameter.grad = None
    free_memory(device)


def free_memory(device: torch.device) -> None:
    """Gives back what nobody uses any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def trainer(bench: Bench) -> None:
    """transformers' Trainer on the same chunks, plain and as fast as its users make it."""
    # Layers are compiled one by one, which takes a minute less and runs as fast.
    os.environ["ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION"] = "true"
    ours = max((r["value"] for r in bench.results("training") if r["check"] == _BEST), default=0.0)
    has_liger = importlib.util.find_spec("liger_kernel") is not None and not bench.rehearse
    # The plain one first: Liger changes functions of transformers for good.
    time_peer(bench, "Trainer", ours, liger=False, compiled=False)
    name = "Trainer, Liger and torch.compile" if has_liger else "Trainer, torch.compile"
    works = compile_refusal(bench.device) is None
    works = works and time_peer(bench, name, ours, liger=has_liger, compiled=True)
    if not works and has_liger:
        time_peer(bench, "Trainer, Liger", ours, liger=True, compiled=False)


def time_peer(bench: Bench, name: str, ours: float, *, liger: bool, compiled: bool) -> bool:
    """Reports the speed of Trainer, and kiem's beside it; returns whether it worked."""
    batch_size = bench.sizes.batch_size
    while batch_size:
        free_memory(bench.device)
        try:
            speed, memory = time_trainer(bench, batch_size, liger, compiled)
            break
        except Exception as error:  # noqa: BLE001 - a peer that fails is a result
            if not is_out_of_memory(error):
                report_failure(bench, name, error, "left out")
                return False
        batch_size //= 2
    else:
        bench.report(name, "does not fit", verdict="measured")
        return False
    bench.report(name, speed, "tokens/s", memory_bytes=memory, batch_size=batch_size)
    if ours:
        target = 1.5 if liger or compiled else None
        bench.report(f"kiem beside {name}", ours / speed, "x", at_least=target, is_speed=True)
    return True


def time_trainer(bench: Bench, batch_size: int, liger: bool, compiled: bool) -> tuple[float, int]:
    """Returns the tokens per second and the peak memory of transformers' Trainer."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    sizes, device = bench.sizes, bench.device
    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            synchronize(device)
            self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            synchronize(device)
            times.append(time.perf_counter() - self.started)

    arguments = TrainingArguments(
        output_dir=str(bench.folder / "trainer"),
        max_steps=_TRAINER_STEPS,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=_TRAINER_PASSES * sizes.batch_size // batch_size,
        learning_rate=1e-4,
        weight_decay=0.1,
        bf16=not bench.rehearse,
        use_cpu=bench.rehearse,
        use_liger_kernel=liger,
        torch_compile=compiled,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    num_chunks = _TRAINER_STEPS * _TRAINER_PASSES * sizes.batch_size
    rows = torch.from_numpy(made_up_chunks(sizes, num_chunks)).long()
    data = [{"input_ids": row, "labels": row} for row in rows]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    Trainer(model=new_peer(bench), args=arguments, train_dataset=data, callbacks=[Clock()]).train()
    memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    tokens = _TRAINER_PASSES * sizes.batch_size * sizes.chunk_size
    return tokens / min(times[2:]), memory


def decoding(bench: Bench) -> None:
    """One stream and eight, beside transformers' generate with the same weights in bf16."""
    dtype = bench.distributed.matrix_dtype
    model = new_model(bench).to(dtype).requires_grad_(False).eval()
    peer = new_peer(bench, model).eval()
    for parameter in peer.parameters():  # alone: its rotary frequencies stay in fp32
        parameter.data = parameter.data.to(dtype)
    for num_streams, target in ((1, 5.0), (8, None)):
        ours, prefill, tokens = time_engine(bench, model, num_streams)
        theirs, expected = time_generate(bench, peer, num_streams)
        name = f"{num_streams} stream{'s' if num_streams > 1 else ''}"
        bench.report(name, ours, "tokens/s", prefill_seconds=prefill)
        bench.report(f"{name}, generate", theirs, "tokens/s")
        bench.report(f"{name}, ratio", ours / theirs, "x", at_least=target, is_speed=True)
        same = (tokens == expected).float().mean().item()
        bench.report(
            f"{name}, farthest token from transformers' choice",
            distance_from_choice(bench, peer, tokens),
            at_most=_NEAR_TIE,
            equal_share=same,
        )


def prompts(bench: Bench, num_streams: int) -> Tensor:
    """Returns prompts, int64 [num_streams, prompt_tokens]."""
    generator = torch.Generator().manual_seed(1)
    shape = (num_streams, bench.sizes.prompt_tokens)
    ids = torch.randint(3, bench.sizes.vocabulary, shape, generator=generator)
    ids[:, 0] = BOS
    return ids


def time_engine(bench: Bench, model: Gemma3, num_streams: int) -> tuple[float, float, Tensor]:
    """Returns tokens/s of decoding, seconds of reading the prompts, and the tokens written."""
    sizes = bench.sizes
    num_tokens = sizes.prompt_tokens + sizes.new_tokens
    engine = Engine(model, None, max_requests=num_streams, max_tokens=num_tokens)
    greedy = SamplingParams(temperature=0, repetition_penalty=1, max_new_tokens=sizes.new_tokens)
    requests = [Request(ids, greedy, seed=0) for ids in prompts(bench, num_streams).tolist()]
    for _ in range(2):  # the first time is for what is prepared once
        written: list[list[int]] = [[] for _ in requests]
        started, ends = time.perf_counter(), []
        for index, output in engine.stream(requests):
            written[index].append(output.token)
            if index == 0:
                ends.append(time.perf_counter())
    # The first two tokens come with the prompts.
    seconds = (ends[-1] - ends[1]) / (len(ends) - 2)
    return num_streams / seconds, ends[0] - started, torch.tensor(written)


def time_generate(bench: Bench, peer: Any, num_streams: int) -> tuple[float, Tensor]:
    """Returns tokens/s of decoding by generate, and the tokens written."""
    sizes, device = bench.sizes, bench.device
    ids = prompts(bench, num_streams).to(device)
    how = {"attention_mask": torch.ones_like(ids), "do_sample": False, "eos_token_id": None}

    def generate(num_new: int) -> Tensor:
        return peer.generate(ids, max_new_tokens=num_new, min_new_tokens=num_new, **how)

    first = seconds_of(lambda: generate(1), device, repeats=2, warm_ups=1)
    whole = seconds_of(lambda: generate(sizes.new_tokens), device, repeats=2, warm_ups=1)
    written = generate(sizes.new_tokens)[:, sizes.prompt_tokens :].cpu()
    return num_streams * (sizes.new_tokens - 1) / (whole - first), written


def distance_from_choice(bench: Bench, peer: Any, tokens: Tensor) -> float:
    """Returns the most by which transformers' highest logit is above that of a token written."""
    ids = torch.cat([prompts(bench, len(tokens)), tokens], 1).to(bench.device)
    most = 0.0
    for row in ids:  # one by one, for the memory of the logits
        with torch.no_grad():
            logits = peer(row[None, :-1], logits_to_keep=tokens.shape[1]).logits[0].float()
        chosen = logits.gather(1, row[-len(logits) :, None])[:, 0]
        most = max(most, float((logits.amax(1) - chosen).max()))
    return most


def plan(bench: Bench) -> None:
    """What the plan calculates for the updates that the part training has measured."""
    sizes, gpu = bench.sizes, bench.gpu
    cases = [r for r in bench.results("training") if r.get("compiled")]
    if not cases or gpu is None:
        why = "nothing was measured" if gpu else "the plan has no figures of this card"
        return bench.report("end", why, verdict="left out")
    for case in cases:
        options = TrainingOptions(
            dataset_path=(Path(),),
            activation_checkpointing=case["recompute"],
            optimizer=case["optimizer"],
        )
        setting = setting_of(sizes.config, options, bench.distributed, sizes.chunk_size)
        setting = replace(setting, batch_size=case["batch_size"], recompute=case["recompute"])
        num_bytes = estimate_memory(setting).total
        seconds = calculate_step_seconds(setting, case["accumulation"], gpu)
        speed = case["accumulation"] * case["batch_size"] * sizes.chunk_size / seconds
        name = f"recompute {case['recompute']}, {case['optimizer']}"
        found = case["memory_bytes"] or num_bytes  # a rehearsal does not measure it
        bench.report(
            f"memory, {name}",
            abs(num_bytes / found - 1),
            at_most=0.1,
            planned_bytes=num_bytes,
            found_bytes=found,
        )
        bench.report(
            f"speed, {name}",
            abs(speed / case["value"] - 1),
            at_most=0.15,
            is_speed=True,
            planned=speed,
            found=case["value"],
        )


if __name__ == "__main__":
    run_part(training, trainer, decoding, plan)
