"""CUDA graphs: hundreds of small kernels, started as one.

A token of gemma3-1b takes some 950 kernels. Started one by one from Python they take several times
as long as the GPU needs for them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch

# Numbers that decide which kernels a function starts.
Arguments = tuple[int, ...]


class CudaGraphs:
    """Runs a function without results on a GPU, and replays it from its second call on.

    There is a graph for each set of arguments. All share one pool of memory, so what a function
    leaves behind must be in tensors that were there before it.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[Arguments, torch.cuda.CUDAGraph] = {}
        self._is_possible = True

    @property
    def num_graphs(self) -> int:
        """How many sets of arguments have a graph."""
        return len(self._graphs)

    def run(self, function: Callable[..., None], *arguments: int) -> None:
        """Runs `function(*arguments)`, which must be the same function every time.

        It runs plainly if it cannot be captured; a warning tells that once.
        """
        if arguments in self._graphs:
            self._graphs[arguments].replay()
        elif not self._is_possible:
            function(*arguments)
        else:
            self._run_and_capture(function, arguments)

    def _run_and_capture(self, function: Callable[..., None], arguments: Arguments) -> None:
        """Runs the function, which loads its kernels, and makes a graph for the next time."""
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            function(*arguments)
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        try:
            # The outer block: after an error, torch's own leaves the side stream on.
            with (
                torch.cuda.stream(current),
                torch.cuda.graph(
                    graph, self._pool, self._stream, capture_error_mode="thread_local"
                ),
            ):
                function(*arguments)
        except RuntimeError as error:
            self._is_possible = False
            message = f"Decoding goes on without CUDA graphs, more slowly: {error}"
            warnings.warn(message, stacklevel=2)
        else:
            self._graphs[arguments] = graph
