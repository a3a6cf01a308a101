"""The processes that save together. They talk over a process group of their own, or there is only one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Generic, TypeVar

import torch.distributed as dist

from lapis.errors import LapisError, UnavailableError

T = TypeVar("T")

PATIENCE = timedelta(minutes=10)  # for a rank that is slow; one that died is noticed at once


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """What an action returned, or the error that it ended with, in a form that can be sent to other ranks."""

    value: T | None = None
    error: LapisError | OSError | None = None

    @staticmethod
    def of(action: Callable[[], T]) -> Outcome[T]:
        """Run an action, whose value is not None."""
        try:
            return Outcome(value=action())
        except (LapisError, OSError) as error:
            return Outcome(error=error)

    def unwrap(self) -> T:
        """The value; raises the error if there is one."""
        if self.error is not None:
            raise self.error
        assert self.value is not None
        return self.value


class Ranks:
    """This process among those that save together; the first one writes the manifest and commits."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank = dist.get_rank(group) if group else 0
        self.size = dist.get_world_size(group) if group else 1
        self.first = self.rank == 0

    @staticmethod
    def own() -> Ranks:
        """All ranks of this run with a gloo group of their own, so that they can talk beside the training.

        Collective: every rank makes it at the same point of the program.
        """
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            return Ranks(dist.new_group(backend="gloo", timeout=PATIENCE))
        return Ranks()

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in order, on the first rank; nothing on the others. Raises UnavailableError."""
        if self.group is None:
            return [value]
        values: list[T | None] | None = [None] * self.size if self.first else None
        with self._peers():
            dist.gather_object(value, values, group=self.group, group_dst=0)
        return [found for found in values or () if found is not None]

    def share(self, value: T | None) -> T:
        """The first rank's value, on every rank. Raises UnavailableError if a rank is gone."""
        values = [value]
        if self.group is not None:
            with self._peers():
                dist.broadcast_object_list(values, group=self.group, group_src=0)
        assert values[0] is not None
        return values[0]

    def decide(self, action: Callable[[], T]) -> T:
        """What the first rank's action returns, on every rank; its error is raised on every rank too."""
        return self.share(Outcome.of(action) if self.first else None).unwrap()

    @contextmanager
    def _peers(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # what gloo raises when a peer closes its connection or lets it wait
            raise UnavailableError(
                f"A process of this run did not answer rank {self.rank} over a checkpoint: "
                f"{str(error).splitlines()[0]}",
                hint="What was committed is whole. Start the run again: it goes on from there.",
            ) from error
