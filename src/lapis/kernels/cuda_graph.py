"""Forwards on a GPU as CUDA graphs: captured once over static buffers, launched as one. As `replay.py` for the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lapis.kernels.replay import MOST_RECORDINGS, Forward, Outputs, Unrecordable


class CudaGraphs:
    """Forwards of one model, captured by a key that fixes their shapes and their buffers, in one pool of memory."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self._weights = list(weights)
        self._pointers = self._weight_pointers()
        self._pool: Any = None
        self._graphs: dict[object, tuple[torch.cuda.CUDAGraph, Outputs]] = {}

    def run(self, key: object, rows: int, forward: Forward) -> Outputs:
        """What `forward`, without gradients, returns: overwritten by the next run.

        The first call of a key captures. Weights may change in place; when one has moved, everything is captured
        anew. Raises Unrecordable for a forward that waits for the device.
        """
        pointers = self._weight_pointers()
        if pointers != self._pointers:
            self._graphs.clear()
            self._pointers = pointers
        found = self._graphs.get(key)
        if found is None:
            while len(self._graphs) >= MOST_RECORDINGS:
                del self._graphs[next(iter(self._graphs))]
            found = self._graphs[key] = self._capture(forward)
        found[0].replay()
        return found[1]

    def _capture(self, forward: Forward) -> tuple[torch.cuda.CUDAGraph, Outputs]:
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            forward()  # compiles kernels and prepares the batch, so that the captured run does neither
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            # other threads may go on using the device: only this one is being captured
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                outputs = forward()
        except RuntimeError as error:
            raise Unrecordable(f"the forward cannot be captured: {error}") from error
        self._pool = graph.pool()
        return graph, outputs

    def _weight_pointers(self) -> list[int]:
        return [weight.data_ptr() for weight in self._weights]
