"""The supervisor's decisions, one at a time: who is to blame, what is tried again, what is given up."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from lapis.home import Home
from lapis.train import health
from lapis.train.health import newborn, observe
from lapis.train.heartbeat import SIZE, Beat, Heartbeat, Phase, decode, encode
from lapis.train.launch import environment, threads_per_rank
from lapis.train.recipe import SupervisorSection
from lapis.train.run import Run
from lapis.train.supervisor import (
    Action,
    End,
    Facts,
    Renew,
    Report,
    Signal,
    Start,
    State,
    begin,
    decide,
    given_up,
)

SECTION = SupervisorSection(hang_seconds=10, start_seconds=100, restarts=2)
KILL, TERM = Signal(signal.SIGKILL), Signal(signal.SIGTERM)


def started(ranks: int = 3, spares: int = 0) -> State:
    state, actions = begin(ranks, spares, 0.0)
    assert actions == (Start(tuple(range(ranks))),)
    return state


def facts(now: float, *exits: int | None, step: int = 0, **more: object) -> Facts:
    beats = tuple(Beat(step + 1, step, 0.0, Phase.WORKING) for _ in exits)
    return replace(Facts(now, exits, beats), **more)  # type: ignore[arg-type]


def events(actions: tuple[Action, ...]) -> list[str]:
    return [action.event for action in actions if isinstance(action, Report)]


def test_a_killed_rank_is_blamed_at_once_and_its_slot_goes_to_the_spares() -> None:
    state, actions = decide(started(spares=1), facts(1, 1, -9, None, order=(0, 1)), SECTION)
    assert state.phase == "clearing"
    assert KILL in actions
    assert (
        state.causes[0].rank == 1
    )  # rank 0 ended first, with the status of a Python error: it can be a consequence
    assert decide(state, facts(2, 1, -9, None), SECTION) == (state, ())  # nothing starts beside a living rank
    state, actions = decide(state, facts(3, 1, -9, -9), SECTION)
    assert events(actions) == ["restart"]
    assert actions[-1] == Start((0, 3, 2))
    assert (state.phase, state.attempt, state.slots) == ("running", 2, (0, 3, 2, 1))


def test_an_error_settles_before_somebody_is_blamed() -> None:
    state, actions = decide(started(), facts(1, 1, None, None, order=(0,)), SECTION)
    assert (state.phase, actions) == ("settling", ())
    assert decide(state, facts(1.2, 1, 1, None, order=(0, 1)), SECTION) == (state, ())
    late, _ = decide(state, facts(2.5, 1, 1, None, order=(0, 1)), SECTION)
    assert late.causes[0].rank == 0
    clear, _ = decide(state, facts(1.3, 1, 1, 2, order=(0, 1, 2)), SECTION)
    assert clear.causes[0].rank == 2
    assert clear.end == End("gave_up", 2, "a restart cannot mend this")


def test_ranks_that_will_not_die_lose_their_nursery() -> None:
    state, _ = decide(started(), facts(1, None, -9, None), SECTION)
    state, actions = decide(state, facts(7, None, -9, None), SECTION)
    assert actions == (Renew(),)


def test_attempts_without_a_new_checkpoint_count_and_progress_forgives() -> None:
    state, now, starts = started(), 0.0, 1
    for checkpoint in (-1, -1, 10, 10, 10):
        state, _ = decide(state, facts(now + 1, -9, None, None, checkpoint=checkpoint), SECTION)
        state, actions = decide(state, facts(now + 2, -9, -9, -9, checkpoint=checkpoint), SECTION)
        starts += any(isinstance(action, Start) for action in actions)
        now += 2
    assert starts == 5
    assert (state.phase, events(actions)) == ("ended", ["gave_up"])
    assert state.end == End("gave_up", 10, "3 attempts in a row brought no new checkpoint")


def test_checkpoints_after_a_fallback_are_progress() -> None:
    """The one of step 20 was damaged: the ranks went on from step 10, and lose a rank after each new one."""
    (state, _), now = begin(3, 0, 0.0, checkpoint=20), 0.0
    for checkpoint in (12, 14, 16, 18, 19):
        state, _ = decide(state, facts(now + 1, -9, None, None, checkpoint=checkpoint), SECTION)
        state, actions = decide(state, facts(now + 2, -9, -9, -9, checkpoint=checkpoint), SECTION)
        assert isinstance(actions[0], Report)
        assert (actions[0].facts["step"], actions[0].facts["without_progress"]) == (checkpoint, 1)
        now += 2


def test_numbers_that_fail_again_at_the_same_place_are_not_tried_a_third_time() -> None:
    state, _ = decide(started(), facts(1, None, None, None, step=5), SECTION)
    state, _ = decide(state, facts(2, 10, 10, 10, step=5), SECTION)
    state, _ = decide(state, facts(3, 10, 10, 10), SECTION)
    assert state.phase == "running"
    state, _ = decide(state, facts(4, 10, 10, 10), SECTION)
    assert state.end == End("gave_up", 10, "it failed the same way twice")


def test_a_run_that_its_ranks_called_failed_is_not_said_to_go_on(tmp_path: Path) -> None:
    class Gone:
        def log(self, rank: int) -> Path:
            return tmp_path / f"rank-{rank}.log"

    run, end = (
        Run.create(Home(tmp_path), "r", "", "0" * 64),
        End("gave_up", 10, "it failed the same way twice"),
    )
    (run.checkpoints / f"step-{4:08}-0123456789ab").mkdir(parents=True)
    run.events.write("start")
    run.events.write("rank_lost", rank=0)
    run.events.write("gave_up", causes=[])
    told = str(given_up(run, Gone(), end))  # type: ignore[arg-type]
    assert "step 4 is kept: the same command goes on from it" in told
    run.events.write("end", reason="failed")
    told = str(given_up(run, Gone(), end))  # type: ignore[arg-type]
    assert "goes on" not in told
    assert "the same command begins a new run" in told


def test_the_group_finishes_only_when_all_have() -> None:
    state, actions = decide(started(), facts(1, 0, None, 0), SECTION)
    assert (state.phase, actions) == ("running", ())
    state, _ = decide(state, facts(2, 0, 0, 0), SECTION)
    assert state.end == End("finished", 0)


def test_a_stop_is_passed_on_and_the_second_one_kills() -> None:
    state, actions = decide(started(), facts(1, None, None, None, stops=1), SECTION)
    assert (state.phase, actions) == ("stopping", (TERM,))
    assert decide(state, facts(2, 130, None, None, stops=1), SECTION)[1] == ()
    ended, _ = decide(state, facts(3, 130, 130, 130, stops=1), SECTION)
    assert ended.end == End("stopped", 130)
    state, actions = decide(state, facts(3, None, None, None, stops=2), SECTION)
    assert actions == (KILL,)
    state, _ = decide(state, facts(4, -9, -9, -9, stops=2), SECTION)
    assert state.end == End("stopped", 130)


def test_the_rank_that_the_others_wait_for_is_the_one_that_hangs() -> None:
    state = started()
    beats = tuple(Beat(9, 4, 0.0, phase) for phase in (Phase.WAITING, Phase.WORKING, Phase.WAITING))
    state, _ = decide(state, Facts(1, (None,) * 3, beats), SECTION)
    assert decide(state, Facts(10.9, (None,) * 3, beats), SECTION) == (state, ())
    state, _ = decide(state, Facts(11.1, (None,) * 3, beats), SECTION)
    assert state.causes[0].rank == 1
    assert state.causes[0].text == "gave no sign for 10.1 s"


def test_of_ranks_that_wait_the_one_with_fewest_signs_or_frozen_hangs() -> None:
    def blamed(places: tuple[int, ...], frozen: tuple[int, ...] = ()) -> int:
        beats = [Beat(9, 4, 0.0, Phase.WAITING, place) for place in places]
        state = observe(newborn(len(places), 0.0), beats, 1.0)
        found = health.silent(state, [True] * len(places), 12.0, SECTION, frozen)
        assert found is not None
        return found[0]

    assert blamed((7, 6, 7)) == 1
    assert blamed((7, 7, 7), frozen=(2,)) == 2
    assert blamed((7, 6, 7), frozen=(2,)) == 2  # the kernel knows better


def test_an_error_of_who_lost_a_peer_is_a_consequence() -> None:
    state, _ = decide(started(), facts(1, 8, None, None, order=(0,)), SECTION)
    assert state.phase == "settling"
    state, _ = decide(state, facts(1.1, 8, -9, None, order=(0, 1)), SECTION)
    assert (state.causes[0].rank, state.end) == (1, None)


def test_own_work_is_told_with_the_step_and_not_while_busy(tmp_path: Path) -> None:
    path = tmp_path / "beat"
    path.write_bytes(bytes(SIZE))
    heartbeat = Heartbeat(path)
    heartbeat.waits(5.0)  # before the first step: it compiles
    heartbeat.stepped(1)
    heartbeat.works()
    heartbeat.waits(0.25)
    with heartbeat.busy():
        heartbeat.waits(7.0)  # an evaluation
        assert decode(path.read_bytes()) == Beat(6, 1, 0.0, Phase.BUSY, 4)
    heartbeat.stepped(2)
    assert decode(path.read_bytes()) == Beat(8, 2, 0.25, Phase.WORKING, 0)


def test_who_saves_or_starts_has_longer() -> None:
    saving = (Beat(9, 4, 0.0, Phase.BUSY), Beat(9, 4, 0.0, Phase.WAITING))
    state, _ = decide(started(2), Facts(1, (None, None), saving), SECTION)
    assert decide(state, Facts(60, (None, None), saving), SECTION)[0].phase == "running"
    assert decide(state, Facts(102, (None, None), saving), SECTION)[0].phase == "clearing"
    assert decide(started(2), Facts(99, (None, None), (None, None)), SECTION)[0].phase == "running"
    assert decide(started(2), Facts(101, (None, None), (None, None)), SECTION)[0].phase == "clearing"


def test_long_steps_stretch_the_limit() -> None:
    state = newborn(1, 0.0)
    for step in range(5):
        state = observe(state, [Beat(step + 1, step, 0.0, Phase.WORKING)], 30.0 * step)
    assert state.step_s == 30.0
    assert health.silent(state, [True], 120 + 599, SECTION) is None
    assert health.silent(state, [True], 120 + 601, SECTION) == (0, 601)


def slowness(own: list[float], steps: int = 30) -> dict[int, float]:
    state = newborn(len(own), 0.0)
    for step in range(steps):
        beats = [Beat(step + 1, step, seconds * step, Phase.WORKING) for seconds in own]
        state = observe(state, beats, max(own) * step)
    return {rank: round(times, 2) for rank, times in health.slow(state, frozenset(), SECTION).items()}


def test_a_slow_rank_is_one_whose_own_work_takes_longer() -> None:
    assert slowness([1.0, 1.0, 1.8]) == {2: 1.8}
    assert slowness([1.0, 3.0]) == {1: 3.0}
    assert slowness([1.0, 1.2, 0.8]) == {}
    assert slowness([1.0, 1.0, 1.8], steps=5) == {}  # not enough seen
    assert slowness([1.0]) == {}


def test_a_heartbeat_survives_only_whole(tmp_path: object) -> None:
    beat = Beat(7, 3, 1.5, Phase.WAITING)
    data = encode(beat)
    assert decode(data) == beat
    assert decode(bytes(len(data))) is None
    assert decode(data[:-1]) is None
    assert all(decode(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]) is None for at in range(len(data)))


def test_without_a_supervisor_a_heartbeat_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LAPIS_HEARTBEAT", raising=False)
    heartbeat = Heartbeat.of_environment()
    with heartbeat.busy():
        heartbeat.stepped(1)


def test_a_rank_is_told_what_torch_distributed_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    names = environment(1, (0, 2), 4321)
    assert names == {
        "RANK": "1",
        "LOCAL_RANK": "2",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "4321",
    }
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    assert [threads_per_rank(ranks) for ranks in (1, 3, 16)] == [8, 2, 1]
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert threads_per_rank(1) == len(os.sched_getaffinity(0))
