"""What the heartbeats of a group tell: its pace, who is silent, who is slow. Pure: beats and times in, facts out."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from statistics import median

from lapis.train.heartbeat import Beat, Phase
from lapis.train.recipe import SupervisorSection

WINDOW = 20  # measurements that a median is taken over
ENOUGH = 10  # measurements before a rank can be called slow
SHARE = 0.1  # of a step: a smaller loss is not worth a word


@dataclass(frozen=True)
class Health:
    """What is known of the ranks of one attempt. Times are seconds of the supervisor's clock."""

    beats: tuple[Beat | None, ...]
    heard: tuple[float, ...]  # when something new was last seen of each rank
    stepped: float | None = None  # when the last of them finished a step
    pace: tuple[float, ...] = ()  # seconds per step of the group, the newest last
    own: tuple[tuple[float, ...], ...] = ()  # by rank: seconds per step of its own work, the newest last

    @property
    def step(self) -> int:
        """Steps that all ranks have done; -1 before the first is known."""
        return min((beat.step if beat else -1 for beat in self.beats), default=-1)

    @property
    def step_s(self) -> float:
        """The median step in seconds; 0 before one was measured."""
        return median(self.pace) if self.pace else 0.0


def newborn(ranks: int, now: float) -> Health:
    """The health of a group that starts now."""
    return Health((None,) * ranks, (now,) * ranks, own=((),) * ranks)


def observe(health: Health, beats: Sequence[Beat | None], now: float) -> Health:
    """Take in what the heartbeats say now; an unreadable one (None) changes nothing."""
    newest, heard, own = [], [], []
    for rank, (before, beat) in enumerate(zip(health.beats, beats, strict=True)):
        fresh = beat is not None and (before is None or beat.count > before.count)
        newest.append(beat if fresh else before)
        heard.append(now if fresh else health.heard[rank])
        own.append(_own_work(health.own[rank], before, beat) if fresh else health.own[rank])
    after = replace(health, beats=tuple(newest), heard=tuple(heard), own=tuple(own))
    if after.step <= health.step:
        return after
    if health.stepped is None or health.step < 0:
        return replace(after, stepped=now)  # from here on steps are timed: the first one warms up
    each = (now - health.stepped) / (after.step - health.step)
    return replace(after, stepped=now, pace=(*health.pace, each)[-WINDOW:])


def silent(
    health: Health,
    alive: Sequence[bool],
    now: float,
    section: SupervisorSection,
    frozen: Collection[int] = (),
) -> tuple[int, float] | None:
    """The rank that hangs and the seconds since it was heard, when the whole group has stood still for too long.

    Ranks wait for each other, so it hangs only when every living one is beyond its limit; to blame is one that is
    `frozen`, else the one that is furthest behind: the others wait for it.
    """
    stepping = max(section.hang_seconds, section.hang_factor * health.step_s)
    behind: tuple[tuple[bool, int, int, int, float], int] | None = None
    for rank, beat in enumerate(health.beats):
        if not alive[rank]:
            continue
        starting = beat is None or beat.phase is Phase.BUSY
        if now - health.heard[rank] < (max(section.start_seconds, stepping) if starting else stepping):
            return None
        step, at, phase = (beat.step, beat.place, int(beat.phase)) if beat else (-1, 0, 0)
        place = (rank not in frozen, step, at, phase, health.heard[rank])
        behind = min(behind, (place, rank)) if behind else (place, rank)
    return (behind[1], now - health.heard[behind[1]]) if behind else None


def slow(health: Health, before: frozenset[int], section: SupervisorSection) -> dict[int, float]:
    """The slow ranks, each with how many times the others' own work its own takes; medians, so outliers do not count.

    A rank that was slow `before` stays so until it is half-way back.
    """
    if len(health.own) < 2 or any(len(own) < ENOUGH for own in health.own):
        return {}
    own = [median(seconds) for seconds in health.own]
    found = {}
    for rank, seconds in enumerate(own):
        others = median(own[:rank] + own[rank + 1 :])
        factor = 1 + (section.slow_factor - 1) / 2 if rank in before else section.slow_factor
        if seconds > factor * others and seconds - others > SHARE * health.step_s:
            found[rank] = seconds / max(others, 1e-9)
    return found


def _own_work(known: tuple[float, ...], before: Beat | None, beat: Beat | None) -> tuple[float, ...]:
    """Own work per step since the beat before: two looks may lie several steps apart."""
    if before is None or beat is None or before.step < 0 or beat.step <= before.step:
        return known
    return (*known, (beat.own_s - before.own_s) / (beat.step - before.step))[-WINDOW:]
