"""Where a run's time went, from its events."""

from __future__ import annotations

import time
from typing import Any

import pytest

from lapis.train.goodput import Spent, account, gap


def event(name: str, **facts: Any) -> dict[str, Any]:
    return {"event": name, "time": 0.0, **facts}


def test_reading_what_the_model_writes_is_no_productive_time() -> None:
    events = [
        event("start", gap=0.0),
        event("step", step=1, seconds=1.0, **spent(3.0, step=1.0, samples=2.0)),
    ]
    found = account(events)
    assert found is not None
    assert (found.productive_s, found.lost_s) == (1.0, {"samples": 2.0})


def spent(elapsed: float, **seconds: float) -> dict[str, Any]:
    return {"spent": {"elapsed": elapsed, **seconds}}


def test_a_killed_run_lost_its_gap_and_the_steps_it_did_again() -> None:
    events = [
        event("create"),
        event("start", gap=0.0),
        event("checkpoint", step=10, **spent(7.0, start=1.0, step=5.0, checkpoint=1.0)),
        event("step", step=14, seconds=7.0, **spent(9.0, start=1.0, step=7.0, checkpoint=1.0)),
        event("start", gap=4.0),  # killed after step 14
        event("resume", step=10, seconds=5.0),
        event("step", step=20, seconds=10.0, **spent(7.0, start=1.5, step=5.0, data=0.5)),
        event("end", step=20, reason="finished", **spent(7.5, start=1.5, step=5.0, data=0.5)),
    ]
    found = account(events)
    assert found is not None
    assert found.wall_s == pytest.approx(9.0 + 4.0 + 7.5)
    assert found.productive_s == pytest.approx(7.0 + 5.0 - 2.0)  # steps 11 to 14 count once
    assert found.lost_s == pytest.approx(
        {"start": 2.5, "data": 0.5, "checkpoint": 1.0, "gap": 4.0, "recomputed": 2.0, "other": 0.5}
    )
    assert sum(found.lost_s.values()) + found.productive_s == pytest.approx(found.wall_s)
    assert found.ratio == pytest.approx(10.0 / 20.5)


def test_a_run_killed_before_its_first_checkpoint_did_all_for_nothing() -> None:
    events = [
        event("start"),
        event("step", step=3, seconds=3.0, **spent(4.0, start=1.0, step=3.0)),
        event("start", gap=1.0),
        event("step", step=1, seconds=1.0, **spent(2.0, start=1.0, step=1.0)),
    ]
    found = account(events)
    assert found is not None
    assert (found.productive_s, found.lost_s["recomputed"]) == (1.0, 3.0)


def test_there_is_no_goodput_before_the_first_step() -> None:
    assert account([]) is None
    assert account([event("create"), event("start")]) is None


def test_the_gap_is_measured_on_the_clock_that_never_jumps() -> None:
    start = event("start", clock={"boot": "a", "monotonic": 100.0})
    events = [start, {**event("step", **spent(30.0)), "time": 5000.0}]
    assert gap(events, {"boot": "a", "monotonic": 140.0}, wall_now=-9999.0) == 10.0
    assert gap(events, {"boot": "b", "monotonic": 3.0}, wall_now=5042.0) == 42.0  # another boot
    assert gap(events, {"boot": "b", "monotonic": 3.0}, wall_now=0.0) == 0.0  # whose clock went back
    stopped = [*events, event("end", reason="stopped")]
    assert gap(stopped, {"boot": "a", "monotonic": 999.0}, 0.0) == 0.0  # that was meant
    assert gap([], {"boot": "a", "monotonic": 1.0}, 0.0) == 0.0


def test_time_is_counted_under_its_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [50.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    meter = Spent()
    now[0] += 2
    for cause, seconds in (("data", 1.0), ("step", 3.0), ("data", 0.5)):
        with meter.on(cause):  # type: ignore[arg-type]
            now[0] += seconds
    now[0] += 1
    assert meter.facts() == {"start": 2.0, "data": 1.5, "step": 3.0, "elapsed": 7.5}
