"""Steps of the engine without Python: static buffers are filled, and one C call computes the forward.

A recording depends on the number of rows T and of logits R alone, since positions, sequences and pages are
data: decoding, the rows that verify drafts and short prompts are all the same to it. Where T or R lie between
the recorded sizes, dead rows fill up: one run of tokens on a page of its own, whose results nobody reads.
Of larger steps, which prompts fill, the recording ends with the hidden rows and is one for every T.

Dims: T tokens of the step, R rows with logits, S sequences, P pages of the longest, V vocabulary, H width.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lapis.inference.kv_cache import PAGE, pages_for
from lapis.kernels.batch import Batch, LayerCache
from lapis.kernels.cuda_graph import CudaGraphs
from lapis.kernels.replay import MORE, MOST_RECORDINGS, Replay, Unrecordable
from lapis.log import logger
from lapis.model.families import Decoder

MOST_ROWS = 64  # of a step that is replayed with its logits
EXACT_ROWS = 16  # up to here each number of rows has its recording, since a dead row costs as much as any
ROW_STEP = 4


class Part(NamedTuple):
    """Adjacent tokens of one sequence, the position of the first, and the sequence's pages."""

    ids: Sequence[int]
    start: int
    pages: array[int]


def _items(values: NDArray[Any], code: Literal["i", "q"]) -> memoryview:
    """All numbers of an array, to be read and written without numpy."""
    items: memoryview = values.reshape(-1).data.cast("B").cast(code)
    return items


def recorded_size(rows: int) -> int:
    """The number of rows of the recording that serves so many: at most three are dead."""
    return rows if rows <= EXACT_ROWS else -(-rows // ROW_STEP) * ROW_STEP


class ReplayedSteps:
    """Steps of up to `most` tokens of one model over one key/value memory, `scratch` being a page nobody owns.

    `active` is false where they cannot be recorded; `reason` then says why.
    """

    def __init__(
        self,
        model: Decoder,
        caches: Sequence[LayerCache],
        scratch: int,
        vocabulary: int,
        most: int = MOST_ROWS,
    ) -> None:
        self.reason = ""
        self.most = room = max(most, MOST_ROWS)
        self._model, self._caches, self._vocabulary = model, caches, vocabulary
        ids_T, rows_R = np.zeros(room, np.int64), np.zeros(MOST_ROWS, np.int64)
        sequence_T, position_T = np.zeros(room, np.int32), np.zeros(room, np.int32)
        self._table_SP = np.zeros((room + 1, pages_for(model.config.context)), np.int32)
        self._dead = room  # the sequence of dead rows
        self._table_SP[room] = scratch
        self._ids, self._rows = _items(ids_T, "q"), _items(rows_R, "q")
        self._sequences, self._positions = _items(sequence_T, "i"), _items(position_T, "i")
        self._tables = _items(self._table_SP, "i")
        host = (ids_T, rows_R, sequence_T, position_T, self._table_SP)
        self._host = [torch.from_numpy(values) for values in host]
        self._static = [tensor.to(model.ops.device) for tensor in self._host]  # the same ones on a CPU
        self._on_device = model.ops.device.type != "cpu"
        self._lists: dict[int, tuple[Tensor, memoryview]] = {}  # best tokens of each recording
        self._batches: dict[int, Batch] = {}
        self._replay: Replay | CudaGraphs | None = None
        weights = [] if model.sealed else list(model.parameters())  # looked at in each step
        self._large: Replay | None = None  # apart, so that its arena's blocks need not fit logits of all rows
        try:
            if model.ops.device.type == "cuda":
                self._replay = CudaGraphs(weights)
            else:
                self._replay = Replay(model.ops, weights, MOST_ROWS)
                self._large = Replay(model.ops, weights, room)
        except Unrecordable as why:
            self.reason = str(why)

    @property
    def active(self) -> bool:
        """Whether steps are replayed."""
        return self._replay is not None

    def run(self, parts: Sequence[Part], rows: Sequence[int]) -> tuple[Tensor, list[int]] | None:
        """Logits (R, V) of some of all rows, overwritten by the next run, and the best token of each.

        The best is that among the first `vocabulary`, -1 where a row's logits are not finite. None if such a
        step cannot be recorded.
        """
        if self._replay is None:
            return None
        tokens = sum(len(part.ids) for part in parts)
        size, picked = recorded_size(tokens), recorded_size(len(rows))
        self._fill(parts, size)
        some = list(rows) != list(range(tokens))
        if some:
            self._rows[:picked] = array("q", [*rows, *[0] * (picked - len(rows))])
        if self._on_device:
            self._upload(size, picked, len(parts))
        key = (size, picked if some else 0)
        try:
            logits_RV, best_R = self._replay.run(key, size, lambda: self._forward(*key))
        except Unrecordable as why:
            self._give_up(why)
            return None
        return logits_RV if picked == len(rows) else logits_RV[: len(rows)], self._listed(best_R, len(rows))

    def hidden(self, parts: Sequence[Part]) -> Tensor | None:
        """Hidden rows (T, H) of all tokens, overwritten by the next call; None if the step is not replayed."""
        tokens = sum(len(part.ids) for part in parts)
        if self._large is None or not MORE <= tokens <= self.most:
            return None
        self._fill(parts, tokens)

        def forward(rows: int) -> tuple[Tensor, ...]:
            return (self._model.hidden(self._static[0][:rows], self._batch(rows)),)

        try:
            (x_TH,) = self._large.run_rows(tokens, forward)
        except Unrecordable as why:
            logger.warning("large steps call each kernel from Python: %s", why)
            self._large = None
            return None
        return x_TH

    @torch.inference_mode()
    def _forward(self, size: int, picked: int) -> tuple[Tensor, ...]:
        """Logits of so many rows that are picked, or of all, and their best tokens; from the buffers."""
        ids_T, rows_R = self._static[0][:size], self._static[1][:picked]
        logits_RV = self._model(ids_T, self._batch(size), rows_R if picked else None)
        return logits_RV, self._model.ops.argmax(logits_RV, self._vocabulary)

    def _listed(self, best_R: Tensor, count: int) -> list[int]:
        if self._on_device:
            return best_R[:count].tolist()
        address = id(best_R)
        known = self._lists.get(address)
        if known is None or known[0] is not best_R:
            if len(self._lists) >= MOST_RECORDINGS:
                self._lists.clear()
            known = self._lists[address] = best_R, _items(best_R.numpy(), "q")
        return known[1][:count].tolist()

    def _give_up(self, why: Unrecordable) -> None:
        logger.warning("steps call each kernel from Python: %s", why)
        self.reason, self._replay, self._large = str(why), None, None

    def _fill(self, parts: Sequence[Part], size: int) -> None:
        """Write the step and dead rows up to `size` into the buffers: by the item, not by numpy or torch.

        The step before has read all weights, so nothing else is in a cache: the less code runs, the better.
        """
        ids, positions, sequences = array("q"), array("i"), array("i")
        columns = self._table_SP.shape[1]
        for row, part in enumerate(parts):
            count = len(part.ids)
            ids.extend(part.ids)
            positions.extend(range(part.start, part.start + count))
            sequences.extend([row] * count)
            self._tables[row * columns : row * columns + len(part.pages)] = part.pages
        tokens = len(ids)
        if dead := size - tokens:
            ids.extend([0] * dead)
            positions.extend(range(dead))
            sequences.extend([self._dead] * dead)
        self._ids[:size], self._positions[:size], self._sequences[:size] = ids, positions, sequences

    def _upload(self, size: int, picked: int, sequences: int) -> None:
        """What has been filled in, onto the device."""
        for host, static, count in zip(
            self._host, self._static, (size, picked, size, size, sequences), strict=True
        ):
            static[:count].copy_(host[:count])

    def _batch(self, size: int) -> Batch:
        batch = self._batches.get(size)
        if batch is None:
            sequence_T, position_T, table_SP = self._static[2][:size], self._static[3][:size], self._static[4]
            batch = self._batches[size] = Batch(sequence_T, position_T, table_SP, self._caches, ())
        return batch


assert ROW_STEP <= PAGE  # dead rows fit into one page
