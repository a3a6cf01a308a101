"""Save beside the training: it waits only while its tensors are copied, all else happens in a thread."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lapis.checkpoint.piece import Part, Sharded
from lapis.checkpoint.ranks import Ranks
from lapis.checkpoint.retention import Retention
from lapis.checkpoint.sharded import Checkpoint, Groups, save, sharded
from lapis.hashing import canonical_json

PATIENT = 5  # niceness of the thread: where cores are few, the training goes first


class Saver:
    """Saves checkpoints in the background, one at a time. With several ranks, every rank makes and calls it alike.

    A process that is killed meanwhile leaves the checkpoints that were there before.
    """

    def __init__(self, folder: Path, keep: Retention) -> None:
        self.folder, self.keep = folder, keep
        self.ranks = Ranks.own()
        self._staging: dict[tuple[str, str, int], Tensor] = {}  # by group, tensor and part; reused
        self._thread = ThreadPoolExecutor(
            max_workers=1, thread_name_prefix="checkpoint", initializer=_step_back
        )
        self._saving: Future[Checkpoint] | None = None

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is still being written."""
        return self._saving is not None and not self._saving.done()

    def start(
        self, step: int, groups: Groups, state: Mapping[str, Any], *, score: float | None = None
    ) -> Checkpoint | None:
        """Copy the tensors and begin to save; they may change as soon as this returns. See `save` for the rest.

        Waits for a checkpoint that is still being written, and returns the one that was last committed (or raises
        its error: then nothing new is begun).
        """
        last = self.wait()
        plain = json.loads(canonical_json(dict(state)))  # a copy too; a bad state costs nothing
        snapshot = self._copied(groups)
        self._saving = self._thread.submit(
            save, self.folder, step, snapshot, plain, self.keep, score=score, ranks=self.ranks
        )
        return last

    def poll(self) -> Checkpoint | None:
        """The checkpoint that was committed since the last call, without waiting. Raises the error of a failed one."""
        return None if self.busy else self.wait()

    def wait(self) -> Checkpoint | None:
        """The checkpoint in progress, once it is committed; None if there was none. Raises its error."""
        saving, self._saving = self._saving, None
        return saving.result() if saving else None

    def close(self) -> None:
        """Wait for the thread to end. Call `wait` before, to see how the last checkpoint went."""
        self._thread.shutdown()

    def _copied(self, groups: Groups) -> Groups:
        return {
            group: {name: self._staged(group, name, sharded(value)) for name, value in values.items()}
            for group, values in groups.items()
        }

    def _staged(self, group: str, name: str, value: Sharded[Tensor]) -> Sharded[Tensor]:
        """The tensor with the parts that this rank writes copied; the others are only named."""
        parts = []
        for index, part in enumerate(value.parts):
            if not part.owned:
                parts.append(part)
                continue
            key = group, name, index
            kept = self._staging.get(key)
            if kept is None or kept.shape != part.data.shape or kept.dtype != part.data.dtype:
                kept = torch.empty(part.data.shape, dtype=part.data.dtype, pin_memory=part.data.is_cuda)
                self._staging[key] = kept
            kept.copy_(part.data.detach())
            parts.append(Part(part.box, kept))
        return Sharded(value.shape, tuple(parts))


def _step_back() -> None:
    """Let this thread, and those that it starts, run after the training's threads. Only Linux counts them singly."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), PATIENT)
