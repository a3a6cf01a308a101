"""Whatever happens to the ranks, the supervisor keeps its rules. The world is played by hypothesis."""

from __future__ import annotations

import signal

from hypothesis import given
from hypothesis import strategies as st

from lapis.train import health
from lapis.train.heartbeat import Beat, Phase
from lapis.train.recipe import SupervisorSection
from lapis.train.supervisor import FATAL, Facts, Renew, Report, Signal, Start, State, begin, decide

SECTION = SupervisorSection(hang_seconds=3, start_seconds=6, restarts=2)
CODES = (0, 1, 2, 9, 10, 70, 130, -9, -6, -11)


class World:
    """Ranks that do what they are told, and now and then what the data says."""

    def __init__(self, data: st.DataObject, ranks: int, spares: int) -> None:
        self.data, self.ranks = data, ranks
        self.exits: list[int | None] = [None] * ranks
        self.order: list[int] = []
        self.steps = [0] * ranks
        self.counts = [0] * ranks
        self.checkpoint, self.stops, self.now = -1, 0, 0.0
        self.starts, self.since_progress, self.progress = 0, 0, -1
        self.state, actions = begin(ranks, spares, 0.0)
        self.obey(actions)

    def obey(self, actions: tuple[object, ...]) -> None:
        for action in actions:
            if isinstance(action, Start):
                assert self.starts == 0 or None not in self.exits, "it starts beside a living rank"
                assert len(action.slots) == self.ranks
                assert self.stops == 0, "it starts after it was asked to stop"
                assert not self.starts or self.state.causes[-1].exit not in FATAL, (
                    "it tries what cannot be mended"
                )
                self.since_progress = 0 if self.checkpoint > self.progress else self.since_progress + 1
                self.progress = self.checkpoint
                self.starts += 1
                self.exits, self.order, self.counts = [None] * self.ranks, [], [0] * self.ranks
                self.steps = [max(0, self.checkpoint)] * self.ranks
            elif isinstance(action, Signal | Renew):
                deadly = isinstance(action, Renew) or action.number == signal.SIGKILL
                obeyed = isinstance(action, Renew) or self.data.draw(st.booleans())
                for rank in range(self.ranks):
                    if obeyed and self.exits[rank] is None:
                        self.end(rank, -9 if deadly else 130)
            else:
                assert isinstance(action, Report)

    def end(self, rank: int, code: int) -> None:
        self.exits[rank] = code
        self.order.append(rank)

    def happen(self) -> None:
        """One more moment: a rank steps, ends, or a checkpoint is written, or somebody wants it to stop."""
        what = self.data.draw(st.sampled_from(["step"] * 4 + ["save", "end", "wait", "hang", "stop"]))
        rank = self.data.draw(st.integers(0, self.ranks - 1))
        self.now += 0.5
        if what == "step":
            for each in range(self.ranks):
                if self.exits[each] is None:
                    self.steps[each] += 1
                    self.counts[each] += 1
        elif what == "save" and None in self.exits:
            self.checkpoint = max(self.checkpoint, min(self.steps))
        elif what == "end" and self.exits[rank] is None:
            self.end(rank, self.data.draw(st.sampled_from(CODES)))
        elif what == "hang":
            self.now += 7
        elif what == "stop" and self.data.draw(st.integers(0, 3)) == 0:
            self.stops += 1

    def look(self) -> None:
        beats = tuple(
            Beat(count, step, 0.0, Phase.WORKING) if count else None
            for count, step in zip(self.counts, self.steps, strict=True)
        )
        seen = Facts(self.now, tuple(self.exits), beats, tuple(self.order), (), self.checkpoint, self.stops)
        self.state, actions = decide(self.state, seen, SECTION)
        self.obey(actions)


@given(st.data(), st.integers(1, 4), st.integers(0, 2))
def test_whatever_happens_the_rules_hold(data: st.DataObject, ranks: int, spares: int) -> None:
    world = World(data, ranks, spares)
    for _ in range(30):
        if world.state.phase == "ended":
            break
        world.happen()
        world.look()
        check(world, ranks, spares)
    if world.state.phase == "ended":
        settled(world)


def check(world: World, ranks: int, spares: int) -> None:
    state = world.state
    assert sorted(state.slots) == list(range(ranks + spares)), "a slot is lost or used twice"
    assert world.since_progress <= SECTION.restarts + 1, "it goes on without any progress"
    assert len(state.causes) <= SECTION.restarts + 1


def settled(world: World) -> None:
    """An end is final, and it says what happened."""
    state: State = world.state
    assert state.end is not None
    assert None not in world.exits, "it ends while a rank lives"
    assert (state.end.outcome == "finished") == (state.end.status == 0)
    assert state.end.outcome != "finished" or set(world.exits) == {0}
    assert state.end.outcome != "stopped" or world.stops or 130 in world.exits
    assert state.end.outcome != "gave_up" or (state.end.reason and state.causes)
    world.happen()
    before, starts = world.state, world.starts
    world.look()
    assert (world.state.end, world.state.phase, world.starts) == (before.end, "ended", starts)


@given(st.integers(1, 4), st.sampled_from(CODES[1:]))
def test_a_group_that_always_fails_is_given_up(ranks: int, code: int) -> None:
    state, _ = begin(ranks, 0, 0.0)
    starts, now = 1, 0.0
    while state.phase != "ended":
        now += 0.5
        state, actions = decide(state, Facts(now, (code,) * ranks, (None,) * ranks), SECTION)
        starts += any(isinstance(action, Start) for action in actions)
        assert now < 100
    assert starts <= SECTION.restarts + 1
    assert code not in FATAL or starts == 1


@given(st.integers(2, 5), st.lists(st.floats(0.9, 1.1), min_size=25, max_size=60), st.data())
def test_ranks_that_keep_the_same_pace_are_neither_slow_nor_hung(
    ranks: int, steps: list[float], data: st.DataObject
) -> None:
    """Steps of about a second, with one step in which one rank stalls."""
    stalled, at = data.draw(st.integers(0, ranks - 1)), data.draw(st.integers(0, len(steps) - 1))
    state, now, own = health.newborn(ranks, 0.0), 0.0, [0.0] * ranks
    for step, seconds in enumerate(steps):
        now += seconds
        own = [
            total + seconds * (5 if (rank, step) == (stalled, at) else 1) for rank, total in enumerate(own)
        ]
        assert health.silent(state, [True] * ranks, now, SECTION) is None
        state = health.observe(state, [Beat(step + 1, step, total, Phase.WORKING) for total in own], now)
        assert health.slow(state, frozenset(), SECTION) == {}
