"""The checkpoints of a run in training: when one is due, saving beside the steps, falling back; and what is told."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from lapis.checkpoint.folder import newest
from lapis.checkpoint.ranks import Ranks
from lapis.checkpoint.retention import Retention
from lapis.checkpoint.saver import Saver
from lapis.checkpoint.sharded import Checkpoint, Groups, save
from lapis.errors import IntegrityError, StorageError
from lapis.log import logger
from lapis.train.goodput import Spent
from lapis.train.recipe import CheckpointSection
from lapis.train.run import Run


@dataclass(frozen=True)
class Snapshot:
    """All that a checkpoint of one moment keeps. The score is a loss, by which the best ones are known."""

    step: int
    groups: Groups
    state: Mapping[str, Any]
    score: float | None


class Checkpoints:
    """Saves a run's checkpoints; one that cannot be saved costs the run nothing but an event, except the last.

    With several ranks, every rank makes and calls it alike; the first one tells the events. Leave it as a context
    manager: it waits for the one in progress.
    """

    def __init__(self, run: Run, section: CheckpointSection, spent: Spent) -> None:
        self.run, self.section, self.spent = run, section, spent
        self.keep = Retention(section.keep, section.every, section.best)
        self.saver = Saver(run.checkpoints, self.keep)
        self.ranks = Ranks.own()  # to decide together, while the saver's thread talks over its own group
        self.last: int | None = None  # the step of this process's last checkpoint, begun or committed
        self._committed: int | None = None
        self._good: int | None = None  # the step of the last one that can be gone on from
        self._begun, self._stall = time.monotonic(), 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._settle()
        self.saver.close()

    def newest(self) -> Checkpoint | None:
        """The last good one. Newer ones that are damaged are skipped, with an event `fallback` for each.

        Raises IntegrityError if there are some but none is whole: a new beginning would remove them.
        """
        found, skipped = self.ranks.decide(lambda: newest(self.run.checkpoints))
        for name, error in skipped.items() if self.ranks.first else ():
            to = found.folder.name if found else None
            self.run.events.write("fallback", checkpoint=name, to=to, why=error.message)
        if skipped and found is None:
            raise IntegrityError(
                f"No checkpoint of the run {self.run.id} is whole: {next(iter(skipped.values())).message}",
                hint=f"To begin this run anew, remove {self.run.checkpoints}",
            )
        self._good = found.step if found else None
        return found

    def due(self, step: int) -> bool:
        """Whether a checkpoint is to be begun after so many steps. One by time is put off while another is saved."""
        if self.section.steps is not None:
            return step % self.section.steps == 0
        return self.ranks.decide(  # clocks differ, the answer must not
            lambda: not self.saver.busy and time.monotonic() - self._begun >= self.section.seconds
        )

    def begin(self, snapshot: Snapshot) -> None:
        """Begin to save beside the training (or save now, if the recipe says so)."""
        with self.spent.on("checkpoint"):
            self._settle()
            begun = time.monotonic()
            if self.section.asynchronous:
                self.saver.start(snapshot.step, snapshot.groups, snapshot.state, score=snapshot.score)
            else:
                try:
                    self._tell(self._save(snapshot), time.monotonic() - begun)
                except (StorageError, IntegrityError) as error:
                    self._tell_failure(snapshot.step, error)
        self.last, self._begun, self._stall = snapshot.step, time.monotonic(), time.monotonic() - begun

    def poll(self) -> None:
        """Note what was committed or failed meanwhile. Raises UnavailableError if a rank is gone, ConflictError."""
        if not self.saver.busy:
            self._settle()

    def finish(self, snapshot: Snapshot) -> None:
        """Save the last state and wait for it; nothing if it is saved already. Raises as `save` does."""
        with self.spent.on("checkpoint"):
            self._settle()
            if self._committed == snapshot.step:
                return
            begun = time.monotonic()
            checkpoint = self._save(snapshot)
        self.last = snapshot.step
        self._tell(checkpoint, time.monotonic() - begun)

    def kept(self) -> str:
        """Which checkpoint a run that fails leaves, as a sentence; waits for the one in progress."""
        self._settle()
        return (
            "There is no checkpoint yet."
            if self._good is None
            else f"Its checkpoint of step {self._good:,} is good."
        )

    def _save(self, snapshot: Snapshot) -> Checkpoint:
        return save(
            self.run.checkpoints,
            snapshot.step,
            snapshot.groups,
            snapshot.state,
            self.keep,
            score=snapshot.score,
            ranks=self.saver.ranks,
        )

    def _settle(self) -> None:
        """Wait for the one in progress, if any, and tell how it went."""
        begun = time.monotonic()
        try:
            checkpoint = self.saver.wait()
        except (StorageError, IntegrityError) as error:
            self._tell_failure(self.last, error)
            return
        if checkpoint is not None:
            self._tell(checkpoint, self._stall + time.monotonic() - begun)

    def _tell(self, checkpoint: Checkpoint, stall: float) -> None:
        self._committed = self._good = checkpoint.step
        if self.ranks.first:
            self.run.events.note(
                "checkpoint",
                step=checkpoint.step,
                folder=checkpoint.folder.name,
                digest=checkpoint.digest,
                score=checkpoint.manifest.score,
                stall=round(stall, 4),
                spent=self.spent.facts(),
            )

    def _tell_failure(self, step: int | None, error: StorageError | IntegrityError) -> None:
        logger.warning("the checkpoint of step %s was not saved: %s", step, error.message)
        if self.ranks.first:
            self.run.events.note("checkpoint_failed", step=step, why=error.message)
