"""Which checkpoints stay when a new one is committed. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Retention:
    """The `keep` newest stay, those whose step is a multiple of `every`, and the `best` ones of lowest score."""

    keep: int = 2
    every: int | None = None
    best: int = 0

    def __post_init__(self) -> None:
        assert self.keep >= 1, "at least the new checkpoint is kept"
        assert self.every is None or self.every >= 1
        assert self.best >= 0


class Kept(NamedTuple):
    """A committed checkpoint as retention sees it. The score is a loss: lower is better; None was not scored."""

    step: int
    name: str
    score: float | None = None


def superseded(others: Iterable[Kept], new: Kept, retention: Retention) -> list[str]:
    """The names of those that may go once `new` is committed, oldest first.

    Those at or past its step belong to a future that the run has left (it went on from an older checkpoint), so
    they go whatever the rule: the highest step is the newest.
    """
    rest = sorted((other for other in others if other.name != new.name), key=lambda item: item[:2])
    past = [other for other in rest if other.step < new.step]
    stay = {other.name for other in past[max(0, len(past) - retention.keep + 1) :]}
    if retention.every:
        stay |= {other.name for other in past if other.step % retention.every == 0}
    scored = sorted(
        (other.score, other.step, other.name) for other in [*past, new] if other.score is not None
    )
    stay |= {name for _, _, name in scored[: retention.best]}
    return [other.name for other in rest if other.name not in stay]
