"""Where a run's time went: productive time / wall time, and the causes of the rest.

Times inside a process come from a clock that never jumps. Between two processes of one boot it is the same clock;
across boots there is only the wall clock.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Cause = Literal["start", "data", "step", "compile", "replay", "checkpoint", "heldout", "samples"]

BOOT = Path("/proc/sys/kernel/random/boot_id")
# what is told of each cause; "step" is the productive one
NAMES = {
    "start": "start-up",
    "data": "data wait",
    "compile": "compile",
    "replay": "replayed and skipped steps",
    "checkpoint": "checkpoint stall",
    "heldout": "held-out loss",
    "samples": "samples",
    "gap": "restart gap",
    "recomputed": "recomputed steps",
    "other": "other",
}


class Spent:
    """Seconds of this process by cause, from now on."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def on(self, cause: Cause) -> Iterator[None]:
        """Count the time of a block; a first step ends the start-up."""
        begun = time.monotonic()
        if "start" not in self.seconds:
            self.seconds["start"] = begun - self.began
        try:
            yield
        finally:
            self.seconds[cause] = self.seconds.get(cause, 0.0) + time.monotonic() - begun

    def move(self, seconds: float, source: Cause, target: Cause) -> None:
        """Count seconds under another cause, now that it is known."""
        self.seconds[source] = self.seconds.get(source, 0.0) - seconds
        self.seconds[target] = self.seconds.get(target, 0.0) + seconds

    def facts(self) -> dict[str, float]:
        """For an event: the seconds by cause, and `elapsed`, all of them."""
        elapsed = time.monotonic() - self.began
        return {name: round(value, 3) for name, value in {**self.seconds, "elapsed": elapsed}.items()}


def clock() -> dict[str, Any]:
    """For a start event: the clock that never jumps, and the boot that it counts from."""
    boot = BOOT.read_text().strip() if BOOT.exists() else ""
    return {"boot": boot, "monotonic": round(time.monotonic(), 3)}


@dataclass(frozen=True)
class Goodput:
    """Seconds of a run so far: all, the productive ones, and the others by cause."""

    wall_s: float
    productive_s: float
    lost_s: Mapping[str, float]

    @property
    def ratio(self) -> float:
        """Productive time / wall time."""
        return self.productive_s / self.wall_s if self.wall_s else 0.0


def account(events: Sequence[Mapping[str, Any]]) -> Goodput | None:
    """The goodput that a run's events tell; None before the first step. Waiting after a stop is no loss."""
    lost = dict.fromkeys(NAMES, 0.0)
    wall = productive = 0.0
    reached = 0.0  # training seconds of the steps that were done before a resume took some of them back
    for process in _processes(events):
        last = next((event["spent"] for event in reversed(process) if "spent" in event), None)
        waited = float(process[0].get("gap", 0.0))
        lost["gap"] += waited
        wall += waited
        resume = next((event for event in process if event["event"] == "resume"), None)
        again = max(0.0, reached - resume.get("seconds", reached)) if resume else reached
        productive -= again
        lost["recomputed"] += again
        if last is not None:
            wall += last["elapsed"]
            productive += last.get("step", 0.0)
            for name in ("start", "data", "compile", "replay", "checkpoint", "heldout", "samples"):
                lost[name] += last.get(name, 0.0)
            lost["other"] += max(
                0.0, last["elapsed"] - sum(value for key, value in last.items() if key != "elapsed")
            )
        steps = [event for event in process if event["event"] == "step"]
        reached = steps[-1]["seconds"] if steps else (resume or {}).get("seconds", 0.0)
    if wall == 0.0:
        return None
    return Goodput(wall, max(0.0, productive), {name: value for name, value in lost.items() if value > 0})


def _processes(events: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """The events of each process that trained, from its start on."""
    found: list[list[Mapping[str, Any]]] = []
    for event in events:
        if event["event"] == "start":
            found.append([])
        if found:
            found[-1].append(event)
    return found


def gap(events: Sequence[Mapping[str, Any]], now: Mapping[str, Any], wall_now: float) -> float:
    """Seconds between the last sign of a killed process and a new one's start; 0 after an end that was meant.

    `now` is the new one's `clock()`, `wall_now` its seconds since 1970.
    """
    processes = _processes(events)
    if not processes or any(event["event"] == "end" for event in processes[-1]):
        return 0.0
    start, signs = processes[-1][0], [event for event in processes[-1] if "spent" in event]
    elapsed = signs[-1]["spent"]["elapsed"] if signs else 0.0
    before = start.get("clock", {})
    if before.get("boot") and before["boot"] == now["boot"]:
        return max(0.0, float(now["monotonic"] - before["monotonic"] - elapsed))
    return max(0.0, float(wall_now - processes[-1][-1]["time"]))
