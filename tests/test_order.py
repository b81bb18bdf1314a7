"""The order of the chunks: a function of the step, with every share kept and every chunk read."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kiem.data.order import ChunkOrder, Part, Stage, chunk_numbers, count_reads, whole_shares
from kiem.optim.batch import own_numbers
from kiem.parallel.distributed import Distributed

# The smallest weight here has a share that a period of 10 000 chunks can express.
WEIGHTS = st.lists(st.floats(0.01, 1), min_size=1, max_size=40)


def plain(num_chunks: int, chunks_per_step: int, seed: int) -> ChunkOrder:
    """The order of one chunk directory."""
    return ChunkOrder((Stage(0, parts([num_chunks], [1.0])),), chunks_per_step, seed)


def parts(sizes: list[int], weights: list[float], first: int = 0) -> tuple[Part, ...]:
    firsts = [first + sum(sizes[:place]) for place in range(len(sizes))]
    names = [str(place) for place in range(len(sizes))]
    return tuple(map(Part, names, firsts, sizes, weights))


def test_one_directory_is_read_as_ever() -> None:
    """Golden, of the version before there were several: a run that is stopped can go on."""
    small = [chunk_numbers(plain(10, 4, seed=3), step).tolist() for step in (0, 1, 2, 7)]
    assert small == [[2, 3, 0, 1], [4, 5, 8, 6], [9, 7, 0, 3], [2, 0, 1, 8]]
    numbers = np.concatenate([chunk_numbers(plain(1000, 24, 42), step) for step in range(200)])
    digest = hashlib.sha256(numbers.astype("<i8").tobytes()).hexdigest()
    assert digest == "93fc70e7e1eed2c218dcae0e46a5bd1a172c0aba9d490b12486e72ad554da93d"


def test_order_shuffles_every_epoch_and_needs_no_history() -> None:
    order = plain(10, 4, seed=3)
    steps = [chunk_numbers(order, step) for step in range(10)]
    places = np.concatenate(steps)
    for epoch in range(4):
        assert sorted(places[epoch * 10 : epoch * 10 + 10]) == list(range(10))
    assert places[:10].tolist() != places[10:20].tolist()
    assert chunk_numbers(order, 7).tolist() == steps[7].tolist()
    assert chunk_numbers(plain(10, 10, seed=4), 0).tolist() != places[:10].tolist()


@pytest.mark.parametrize("weights", [[1.0], [0.7, 0.3]])
def test_resuming_late_costs_no_more_than_early(weights: list[float]) -> None:
    """Chunks are computed, not reached by going through all updates before, which would not end."""
    order = ChunkOrder((Stage(0, parts([700] * len(weights), weights)),), 8, 1)
    numbers = np.concatenate([chunk_numbers(order, 10**15 + step) for step in range(1250)])
    counts = np.bincount(numbers, minlength=700 * len(weights))
    shares = [counts[700 * place : 700 * (place + 1)].sum() for place in range(len(weights))]
    assert shares == [10_000 * weight for weight in weights]


@settings(max_examples=30, deadline=None)
@given(WEIGHTS, st.integers(0, 2**63 - 1), st.integers(50, 500))
def test_every_window_has_the_shares(weights: list[float], seed: int, per_step: int) -> None:
    """1000 consecutive chunks have the share of each part to 1 %, also over the end of a period."""
    sizes = [10_000] * len(weights)
    order = ChunkOrder((Stage(0, parts(sizes, weights)),), per_step, seed)
    num_steps = 12_000 // per_step
    numbers = np.concatenate([chunk_numbers(order, step) for step in range(num_steps)])
    before = np.zeros((len(numbers) + 1, len(weights)))
    before[1:] = np.cumsum(numbers[:, None] // 10_000 == np.arange(len(weights)), axis=0)
    in_window = before[1000:] - before[:-1000]
    exact = 1000 * np.array(weights) / np.sum(weights)
    assert np.abs(in_window - exact).max() <= 10
    assert count_reads(order, num_steps) == [before[-1].tolist()]
    assert np.abs(whole_shares(tuple(weights)) - 10 * exact).max() < 1


def test_no_part_always_has_the_same_place() -> None:
    """Places belong to processes, which would otherwise each read one part only."""
    order = ChunkOrder((Stage(0, parts([50, 50], [1, 1])),), 2, 1)
    firsts = [chunk_numbers(order, step)[0] < 50 for step in range(100)]
    assert 20 < sum(firsts) < 80


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 60), st.floats(0.05, 1)), min_size=1, max_size=5),
    st.lists(st.tuples(st.integers(1, 60), st.floats(0.05, 1)), min_size=1, max_size=3),
    st.integers(1, 40),
    st.integers(0, 100),
)
def test_stages_read_every_chunk_of_their_parts_once_an_epoch(
    main: list[tuple[int, float]], last: list[tuple[int, float]], per_step: int, border: int
) -> None:
    sizes = [size for size, _ in main]
    anneal = parts([s for s, _ in last], [w for _, w in last], first=sum(sizes))
    stages = (Stage(0, parts(sizes, [w for _, w in main])), Stage(border, anneal))
    order = ChunkOrder(stages, per_step, 5)
    read = [chunk_numbers(order, step) for step in range(200)]
    counted = count_reads(order, 200)
    for stage, steps, counts in zip(stages, (read[:border], read[border:]), counted, strict=True):
        numbers = np.concatenate([*steps, np.empty(0, np.int64)])
        assert sum(counts) == len(numbers)
        for part, count in zip(stage.parts, counts, strict=True):
            of_part = numbers[(numbers >= part.first) & (numbers < part.first + part.num_chunks)]
            assert len(of_part) == count
            for start in range(0, count - part.num_chunks + 1, part.num_chunks):
                epoch = of_part[start : start + part.num_chunks]
                assert len({*epoch.tolist()}) == part.num_chunks
    shorter = count_reads(order, border // 2)
    assert sum(shorter[0]) == border // 2 * per_step and sum(shorter[1]) == 0


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(0, 60), st.integers(0, 80), st.integers(0, 2**63 - 1))
def test_small_updates_at_the_start_read_the_same_chunks_in_the_same_order(
    quarter: int, warmup_steps: int, border: int, seed: int
) -> None:
    """Of one stage; the next one begins anew with its own, at whatever size it comes."""
    stages = (Stage(0, parts([50], [1.0])), Stage(border, parts([30], [1.0], first=50)))
    order = ChunkOrder(stages, 4 * quarter, seed, warmup_steps)
    read = [chunk_numbers(order, step) for step in range(100)]
    sizes = [quarter] * (warmup_steps // 2)
    sizes += [2 * quarter] * (warmup_steps - warmup_steps // 2)
    assert [len(numbers) for numbers in read] == (sizes + [4 * quarter] * 100)[:100]
    assert order.count_chunks(100) == sum(map(len, read))
    num_read = [sum(map(len, steps)) for steps in (read[:border], read[border:])]
    assert count_reads(order, 100) == [[num_read[0]], [num_read[1]]]
    before = ChunkOrder(stages[:1], 1, seed)
    one_by_one = [chunk_numbers(before, step) for step in range(num_read[0])]
    assert [n for step in read[:border] for n in step] == [int(number) for [number] in one_by_one]


def test_processes_read_disjoint_places_of_an_update() -> None:
    order = ChunkOrder((Stage(0, parts([500, 500], [3, 1])),), 24, 7)
    numbers = chunk_numbers(order, 11)
    of_ranks = [
        own_numbers(numbers, 4, Distributed(rank, 3, torch.device("cpu"), "fp32", 1e9)).ravel()
        for rank in range(3)
    ]
    assert sorted(np.concatenate(of_ranks)) == sorted(numbers)
    assert len({*numbers.tolist()}) == 24
