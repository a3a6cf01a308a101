"""Steps of the engine without Python: static buffers are filled, and one C call computes the forward.

A recording depends on the number of rows T and of logits R alone, since positions, sequences and pages are
data: decoding, the rows that verify drafts and short prompts are all the same to it. Where T or R lie between
the recorded sizes, dead rows fill up: one run of tokens on a page of its own, whose results nobody reads.
Of larger steps, which prompts fill, the recording ends with the hidden rows, so that it depends on T alone.

Dims: T tokens of the step, R rows with logits, S sequences, P pages of the longest, V vocabulary, H width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lapis.inference.kv_cache import PAGE, pages_for
from lapis.kernels.batch import Batch, LayerCache
from lapis.kernels.cuda_graph import CudaGraphs
from lapis.kernels.replay import Replay, Unrecordable
from lapis.log import logger
from lapis.model.families import Decoder

MOST_ROWS = 64  # of a step that is replayed with its logits
EXACT_ROWS = 16  # up to here each number of rows has its recording, since a dead row costs as much as any
ROW_STEP = 4


class Part(NamedTuple):
    """Adjacent tokens of one sequence, the position of the first, and the sequence's pages."""

    ids: Sequence[int]
    start: int
    pages: Sequence[int]


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
        self.most = max(most, MOST_ROWS)
        self._model, self._caches, self._vocabulary = model, caches, vocabulary
        room = recorded_size(self.most)
        self._ids_T = np.zeros(room, np.int64)
        self._rows_R = np.zeros(MOST_ROWS, np.int64)
        self._sequence_T = np.zeros(room, np.int32)
        self._position_T = np.zeros(room, np.int32)
        self._table_SP = np.zeros((room + 1, pages_for(model.config.context)), np.int32)
        self._dead = room  # the sequence of dead rows
        self._table_SP[room] = scratch
        host = (self._ids_T, self._rows_R, self._sequence_T, self._position_T, self._table_SP)
        self._host = [torch.from_numpy(array) for array in host]
        self._static = [tensor.to(model.ops.device) for tensor in self._host]  # the same ones on a CPU
        self._batches: dict[int, Batch] = {}
        self._met: set[int] = set()  # sizes of larger steps that have been asked for
        self._replay: Replay | CudaGraphs | None = None
        self._large: Replay | None = None  # apart, so that its arena's blocks need not fit logits of all rows
        try:
            if model.ops.device.type == "cuda":
                self._replay = CudaGraphs(list(model.parameters()))
            else:
                self._replay = Replay(model.ops, list(model.parameters()), MOST_ROWS)
                self._large = Replay(model.ops, list(model.parameters()), room)
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
        tokens = self._fill(parts)
        size, picked = recorded_size(tokens), recorded_size(len(rows))
        some = list(rows) != list(range(tokens))
        self._rows_R[: len(rows)] = rows
        self._rows_R[len(rows) : picked] = 0
        batch = self._batch(size)
        self._upload(size, picked, len(parts))
        ids_T, rows_R = self._static[0][:size], self._static[1][:picked]

        def forward() -> tuple[Tensor, ...]:
            logits_RV = self._model(ids_T, batch, rows_R if some else None)
            return logits_RV, self._model.ops.argmax(logits_RV, self._vocabulary)

        try:
            logits_RV, best_R = self._replay.run((size, picked if some else 0), size, forward)
        except Unrecordable as why:
            self._give_up(why)
            return None
        return logits_RV[: len(rows)], best_R[: len(rows)].tolist()

    def hidden(self, parts: Sequence[Part]) -> Tensor | None:
        """Hidden rows (T, H) of all tokens, overwritten by the next call; None if the step is not replayed.

        A size is recorded when it is met again: that costs a forward more, which a size met once is not worth.
        """
        tokens = sum(len(part.ids) for part in parts)
        size = recorded_size(tokens)
        if self._large is None or tokens > self.most:
            return None
        if size not in self._met:
            self._met.add(size)
            return None
        self._fill(parts)
        batch, ids_T = self._batch(size), self._static[0][:size]
        try:
            (x_TH,) = self._large.run(size, size, lambda: (self._model.hidden(ids_T, batch),))
        except Unrecordable as why:
            self._give_up(why)
            return None
        return x_TH[:tokens]

    def _give_up(self, why: Unrecordable) -> None:
        logger.warning("steps call each kernel from Python: %s", why)
        self.reason, self._replay, self._large = str(why), None, None

    def _fill(self, parts: Sequence[Part]) -> int:
        ids: list[int] = []
        positions: list[int] = []
        sequences: list[int] = []
        for row, part in enumerate(parts):
            count = len(part.ids)
            ids += part.ids
            positions += range(part.start, part.start + count)
            sequences += [row] * count
            self._table_SP[row, : len(part.pages)] = part.pages
        tokens = len(ids)
        size = recorded_size(tokens)
        self._ids_T[:tokens] = ids
        self._ids_T[tokens:size] = 0
        self._position_T[:tokens] = positions
        self._position_T[tokens:size] = range(size - tokens)
        self._sequence_T[:tokens] = sequences
        self._sequence_T[tokens:size] = self._dead
        return tokens

    def _upload(self, size: int, picked: int, sequences: int) -> None:
        """What has been filled in, onto the device; nothing where that is the CPU."""
        for host, static, count in zip(
            self._host, self._static, (size, picked, size, size, sequences), strict=True
        ):
            if static is not host:
                static[:count].copy_(host[:count])

    def _batch(self, size: int) -> Batch:
        batch = self._batches.get(size)
        if batch is None:
            sequence_T, position_T, table_SP = self._static[2][:size], self._static[3][:size], self._static[4]
            batch = self._batches[size] = Batch(sequence_T, position_T, table_SP, self._caches, ())
        return batch


assert ROW_STEP <= PAGE  # dead rows fit into one page
