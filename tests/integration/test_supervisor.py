"""The supervisor over real processes: what is lost starts again, what cannot be mended ends, nobody is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lapis.log import EventLog
from lapis.train.launch import Group, Program
from lapis.train.recipe import SupervisorSection
from lapis.train.supervisor import End, last_words, newest_step, supervise

FAST = SupervisorSection(hang_seconds=1.0, restarts=3)

# A supervisor of its own process, for tests that kill it: prints nothing, ends with the group's status.
SUPERVISOR = """
import sys
from pathlib import Path
from tests.integration.test_supervisor import run
sys.exit(run(Path(sys.argv[1]), *sys.argv[2:]).status)
"""


def run(
    folder: Path,
    steps: int | str = 40,
    *faults: str,
    section: SupervisorSection = FAST,
    spares: int = 1,
    every: int = 10,
    step_s: float = 0.02,
) -> End:
    """Run the small program on two ranks to its end."""
    program = Program("tests.rank_program", (str(folder), str(steps), str(every), str(step_s), *faults))
    with Group(program, 2, folder / "ranks", spares) as group:
        end = supervise(group, section, events_of(folder), lambda: newest_step(folder / "checkpoints"))
        assert None not in group.exits
    return end


def events_of(folder: Path) -> EventLog:
    return EventLog(folder / "events.jsonl")


def told(folder: Path, event: str) -> list[dict[str, Any]]:
    return events_of(folder).read(event)


def until(true: Callable[[], bool], seconds: float = 150) -> None:
    give_up = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < give_up, "waited for nothing"
        time.sleep(0.01)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_rank_that_always_fails_is_given_up(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    end = run(tmp_path, 40, "1:15:1")
    assert (end.outcome, end.status) == ("gave_up", 10)
    assert len(told(tmp_path, "restart")) == FAST.restarts
    gave_up = told(tmp_path, "gave_up")[0]
    assert gave_up["causes"] == ["rank 1 ended with status 1 after step 15"] * 4
    assert "no new checkpoint" in gave_up["reason"]
    assert (tmp_path / "ranks" / "rank-0001.log").read_text().count("it fails on purpose") == 4
    assert last_words(tmp_path / "ranks" / "rank-0001.log") == "it fails on purpose"
    survivor = (tmp_path / "ranks" / "rank-0000.log").read_text()
    assert "RuntimeError" in survivor  # that its peer is gone: no matter for the terminal
    assert capfd.readouterr() == ("", "it is told\n" * 4)


def test_what_a_restart_cannot_mend_ends_at_once(tmp_path: Path) -> None:
    assert run(tmp_path / "config", 40, "0:0:2").status == 2
    assert not told(tmp_path / "config", "restart")
    end = run(
        tmp_path / "numbers", 40, "1:12:10"
    )  # tried once again: a fault of the machine would not come back
    assert (end.status, end.reason) == (10, "it failed the same way twice")
    assert len(told(tmp_path / "numbers", "restart")) == 1


def test_a_slow_rank_is_told_and_goes_on(tmp_path: Path) -> None:
    assert run(tmp_path, 60, "1:5:slow", step_s=0.01, every=30) == End("finished", 0)
    slow = told(tmp_path, "slow_rank")
    assert [event["rank"] for event in slow] == [1]
    assert slow[0]["times"] > 1.5


def test_the_process_that_bears_the_ranks_may_die_too(tmp_path: Path) -> None:
    assert run(tmp_path, 40, "1:15:nursery") == End("finished", 0)
    assert len(told(tmp_path, "restart")) == 1


@contextmanager
def started(folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], list[int]]]:
    """A supervisor of its own with endless work, and the processes below it once they train."""
    command = [sys.executable, "-c", SUPERVISOR, str(folder), "100000"]
    with subprocess.Popen(
        command, cwd=Path(__file__).parents[2], env={**os.environ, **paths()}
    ) as supervisor:
        try:
            until(lambda: len(told(folder, "step")) > 2)
            nursery = children(supervisor.pid)
            yield supervisor, [*nursery, *(rank for pid in nursery for rank in children(pid))]
        finally:
            supervisor.kill()


def paths() -> dict[str, str]:
    root = Path(__file__).parents[2]
    return {"PYTHONPATH": f"{root / 'src'}{os.pathsep}{root}"}


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_killed_supervisor_leaves_nobody_behind(tmp_path: Path) -> None:
    with started(tmp_path) as (supervisor, below):
        assert len(below) == 3
        os.kill(below[1], signal.SIGSTOP)  # also one that does not run
        supervisor.kill()
        supervisor.wait()
        until(lambda: not any(alive(pid) for pid in below))
