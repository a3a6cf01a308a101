"""The supervisor: watches the ranks of a run and starts the whole group again from its last good checkpoint.

`decide` is pure: state and facts in, state and actions out. `supervise` looks, decides, acts, twenty times a
second. No torch, and no clock but that of its own looks: a supervisor that was stopped for an hour, or a machine
that slept, does not take its ranks for hung.

    running ─ a rank fails ─> settling ─ cause known ─> clearing ─ all ended ─> running again, or ended
    running ─ SIGINT, SIGTERM ─> stopping ─ all ended ─> ended
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from lapis.checkpoint.manifest import parse_name
from lapis.errors import TrainingError
from lapis.log import EventLog, logger
from lapis.train import health
from lapis.train.health import Health
from lapis.train.heartbeat import Beat
from lapis.train.launch import Ranks
from lapis.train.recipe import SupervisorSection
from lapis.train.run import WATCH, Run
from lapis.train.stopping import on_stop

LOOK_S = 0.05  # between two looks
SETTLE_S = 1.0  # after the first failure, for the rank to blame to be seen: others fail because it is gone
CLEAR_S = 5.0  # for killed ranks to be gone, before their nursery is killed too
ONE_STOP_S = 1.0  # a cluster that stops a job signals each of its processes, and its script passes that on
WORDS = 8  # lines of a rank's output that are looked at for why it ended
INTERRUPTED = 130  # a rank that ended on request, its state in a checkpoint
FAILED = TrainingError.exit_status
NO_PLACE = 75  # EX_TEMPFAIL of sysexits.h: started again on other nodes, it goes on
FATAL = (2, 3, 4, 5, 7, 9)  # a recipe, data or disk that is no better the next time; see lapis.errors

Phase = Literal["running", "settling", "clearing", "stopping", "ended"]


@dataclass(frozen=True)
class Facts:
    """What is seen at one look."""

    now: float  # seconds, of the supervisor's own clock
    exits: tuple[int | None, ...]  # by rank: None while it lives, its exit status, or minus a signal's number
    beats: tuple[Beat | None, ...]
    order: tuple[int, ...] = ()  # the ranks that ended, the first one first
    frozen: tuple[int, ...] = ()  # the ranks that the kernel does not let run
    checkpoint: int = -1  # the newest one's step; -1 without any
    stops: int = 0  # how often the supervisor was asked to stop
    gone: tuple[int, ...] = ()  # the slots whose node is lost


@dataclass(frozen=True)
class Cause:
    """Why an attempt ended. `exit` is that of the rank to blame; None where it was hung."""

    rank: int
    text: str
    exit: int | None
    step: int  # that all ranks had done

    def __str__(self) -> str:
        return f"rank {self.rank} {self.text}" + (f" after step {self.step}" if self.step >= 0 else "")


@dataclass(frozen=True)
class End:
    """How it all ended: with which exit status, and for a run that was given up, why."""

    outcome: Literal["finished", "stopped", "gave_up"]
    status: int
    reason: str = ""


@dataclass(frozen=True)
class Start:
    """Start all ranks, on these slots."""

    slots: tuple[int, ...]


@dataclass(frozen=True)
class Signal:
    """Send this to every living rank."""

    number: int


@dataclass(frozen=True)
class Renew:
    """Kill the process that the ranks come from, and them with it."""


@dataclass(frozen=True)
class Report:
    """Write an event, and say it in the terminal where there is a text."""

    event: str
    facts: dict[str, Any]
    text: str = ""


Action = Start | Signal | Renew | Report


@dataclass(frozen=True)
class State:
    """All that the supervisor remembers. The first `ranks` slots are in use, the others are spare."""

    ranks: int
    slots: tuple[int, ...]
    health: Health
    phase: Phase = "running"
    since: float = 0.0  # when this phase began
    attempt: int = 1
    checkpoint: int = -1  # the newest one's step when the attempt began
    causes: tuple[Cause, ...] = ()  # of the attempts that brought no new checkpoint, the last one included
    slow: frozenset[int] = frozenset()
    end: End | None = None  # how it ends once all ranks have ended; None: it starts again
    block: int = 1  # slots of one node, which are taken and left together

    @property
    def used(self) -> tuple[int, ...]:
        """The slots in use, by rank."""
        return self.slots[: self.ranks]


Step = tuple[State, tuple[Action, ...]]


def begin(ranks: int, spares: int, now: float, checkpoint: int = -1, block: int = 1) -> Step:
    """The first state, and the actions that lead to it."""
    slots = tuple(range(ranks + spares))
    state = State(ranks, slots, health.newborn(ranks, now), since=now, checkpoint=checkpoint, block=block)
    return state, (Start(state.used),)


def decide(state: State, facts: Facts, section: SupervisorSection) -> Step:
    """What to do now. In the phase `ended` nothing is done any more, and `state.end` says how it ended."""
    state = replace(state, health=health.observe(state.health, facts.beats, facts.now))
    if state.phase in ("running", "settling"):
        return _watch(state, facts, section)
    if state.phase == "stopping":
        return _stopping(state, facts, section)
    if state.phase == "clearing":
        return _clearing(state, facts, section)
    return state, ()


def _watch(state: State, facts: Facts, section: SupervisorSection) -> Step:
    if set(facts.exits) <= {0, INTERRUPTED}:
        stopped = INTERRUPTED in facts.exits
        return _ended(state, End("stopped", INTERRUPTED) if stopped else End("finished", 0)), ()
    if facts.stops:
        return replace(state, phase="stopping", since=facts.now), (Signal(signal.SIGTERM),)
    failures = [rank for rank, code in enumerate(facts.exits) if code not in (None, 0, INTERRUPTED)]
    if failures:
        order = [*facts.order, *failures]  # who ends in consequence ends later
        rank = min(failures, key=lambda rank: (_weight(facts.exits[rank]), order.index(rank)))
        if _weight(facts.exits[rank]) < 2 or None not in facts.exits:
            return _lose(state, facts, _failure(state, facts, rank), section)
        if state.phase == "running":
            return replace(state, phase="settling", since=facts.now), ()
        if facts.now - state.since >= SETTLE_S:
            return _lose(state, facts, _failure(state, facts, rank), section)
        return state, ()
    return _watch_beats(state, facts, section)


def _watch_beats(state: State, facts: Facts, section: SupervisorSection) -> Step:
    alive = [code is None for code in facts.exits]
    hung = health.silent(state.health, alive, facts.now, section, facts.frozen)
    if hung:
        rank, seconds = hung
        text = f"gave no sign for {seconds:,.1f} s"
        return _lose(state, facts, Cause(rank, text, None, state.health.step), section)
    slow = health.slow(state.health, state.slow, section)
    reports = tuple(
        Report(
            "slow_rank",
            {"rank": rank, "times": round(times, 2), "step": state.health.step, "attempt": state.attempt},
            f"rank {rank} is slow: its own work takes {times:.1f} times that of the other ranks",
        )
        for rank, times in slow.items()
        if rank not in state.slow
    )
    return replace(state, slow=frozenset(slow)), reports


def _lose(state: State, facts: Facts, cause: Cause, section: SupervisorSection) -> Step:
    """An attempt is over: kill what is left of it, and make up the mind about the next one."""
    # After a fallback the new checkpoints are of earlier steps than the damaged one, which they replace.
    progress = facts.checkpoint not in (-1, state.checkpoint)
    causes = (cause,) if progress else (*state.causes, cause)
    checkpoint = facts.checkpoint if progress else state.checkpoint
    reason = _hopeless(causes, section)
    end = End("gave_up", _status(cause), reason) if reason else None
    slots = state.slots
    if (
        cause.exit is None or cause.exit < 0
    ):  # the place may be to blame: another one is taken if there is one
        slots = _without(state, (*facts.gone, state.used[cause.rank]), facts.gone)
    state = replace(state, phase="clearing", since=facts.now, causes=causes, checkpoint=checkpoint, end=end)
    facts_ = {"rank": cause.rank, "cause": cause.text, "exit": cause.exit, "step": cause.step}
    report = Report("rank_lost", {**facts_, "attempt": state.attempt}, str(cause))
    return replace(state, slots=slots), (report, Signal(signal.SIGKILL))


def _without(state: State, bad: Sequence[int], gone: Sequence[int]) -> tuple[int, ...]:
    """The slots in a new order: each node in use that has a bad one changes place with a spare one that is not gone."""
    starts = range(0, len(state.slots), state.block)
    nodes = [state.slots[start : start + state.block] for start in starts]
    count = state.ranks // state.block
    used, spared = nodes[:count], nodes[count:]
    for place, node in enumerate(used):
        fresh = next((spare for spare in spared if not set(spare) & set(gone)), None)
        if set(node) & set(bad) and fresh is not None:
            spared.remove(fresh)
            spared.append(node)
            used[place] = fresh
    return tuple(slot for node in (*used, *spared) for slot in node)


def _clearing(state: State, facts: Facts, section: SupervisorSection) -> Step:
    if facts.stops and state.end is None:
        state = replace(state, end=End("stopped", INTERRUPTED))
    if None in facts.exits:
        if facts.now - state.since < CLEAR_S:
            return state, ()
        return replace(state, since=facts.now), (Renew(),)
    slots = _without(state, facts.gone, facts.gone)
    state = replace(state, slots=slots)
    if state.end is None and set(state.used) & set(facts.gone):
        state = replace(state, end=End("gave_up", NO_PLACE, "no node is left in place of one that was lost"))
    if state.end is not None:
        return _ended(state, state.end), _farewell(state)
    state = replace(
        state,
        phase="running",
        since=facts.now,
        attempt=state.attempt + 1,
        health=health.newborn(state.ranks, facts.now),
        slow=frozenset(),
    )
    told = {"attempt": state.attempt, "step": max(0, state.checkpoint), "cause": str(state.causes[-1])}
    text = f"starting again from step {max(0, state.checkpoint)} ({len(state.causes)} of {section.restarts})"
    report = Report(
        "restart", {**told, "slots": list(state.used), "without_progress": len(state.causes)}, text
    )
    return state, (report, Start(state.used))


def _stopping(state: State, facts: Facts, section: SupervisorSection) -> Step:
    if None not in facts.exits:
        finished = set(facts.exits) == {0}
        return _ended(state, End("finished", 0) if finished else End("stopped", INTERRUPTED)), ()
    alive = [code is None for code in facts.exits]
    failed = any(code not in (None, 0, INTERRUPTED) for code in facts.exits)
    overdue = failed and facts.now - state.since >= SETTLE_S
    if facts.stops > 1 or overdue or health.silent(state.health, alive, facts.now, section):
        stopped = End("stopped", INTERRUPTED)
        return replace(state, phase="clearing", since=facts.now, end=stopped), (Signal(signal.SIGKILL),)
    return state, ()


def _ended(state: State, end: End) -> State:
    return replace(state, phase="ended", end=end)


def _farewell(state: State) -> tuple[Action, ...]:
    if state.end is None or state.end.outcome != "gave_up":
        return ()
    causes = [str(cause) for cause in state.causes]
    return (Report("gave_up", {"reason": state.end.reason, "causes": causes, "attempt": state.attempt}),)


def _hopeless(causes: Sequence[Cause], section: SupervisorSection) -> str:
    """Why it makes no sense to go on after these attempts without a new checkpoint; empty if it does."""
    last = causes[-1]
    if last.exit in FATAL:
        return "a restart cannot mend this"
    if last.exit == FAILED and any(cause.exit == FAILED for cause in causes[:-1]):
        return "it failed the same way twice"
    if len(causes) > section.restarts:
        return f"{len(causes)} attempts in a row brought no new checkpoint"
    return ""


def _status(cause: Cause) -> int:
    """The exit status of a run that is given up: that of the rank where it has a meaning."""
    return cause.exit if cause.exit in (*FATAL, FAILED) else FAILED


def _failure(state: State, facts: Facts, rank: int) -> Cause:
    code = facts.exits[rank]
    assert code is not None
    if state.used[rank] in facts.gone:
        return Cause(rank, "was lost with its node", code, state.health.step)
    text = f"ended with status {code}" if code >= 0 else f"was killed by {_signal_name(-code)}"
    return Cause(rank, text, code, state.health.step)


def _weight(code: int | None) -> int:
    """How surely a rank that ended so is the one to blame, the surest first; from 2 on it may be a consequence."""
    assert code is not None
    if code in FATAL:
        return 0
    if code < 0 and code != -signal.SIGABRT:  # gloo aborts where its peer is gone
        return 1
    return 2 if code == FAILED else 3


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def train_ranks(
    run: Run, launch: Callable[[Path], AbstractContextManager[Ranks]], section: SupervisorSection
) -> None:
    """Train a run by the ranks that `launch` makes for a folder, to its end; a finished run is left as it is.

    Raises KeyboardInterrupt after SIGINT or SIGTERM, when the ranks have saved; ConflictError if another process
    trains this run; TrainingError, with the exit status of the rank to blame, when it is given up.
    """
    if run.status() == "finished":
        return
    with run.hold(WATCH), launch(run.folder / "ranks") as ranks:
        end = supervise(ranks, section, run.events, lambda: newest_step(run.checkpoints))
        if end.outcome == "stopped":
            raise KeyboardInterrupt
        if end.outcome == "gave_up":
            raise given_up(run, ranks, end)


def newest_step(checkpoints: Path) -> int:
    """The step of the newest checkpoint in a folder, by its name alone; -1 without any."""
    paths = checkpoints.iterdir() if checkpoints.is_dir() else ()
    return max((name.step for path in paths if (name := parse_name(path.name))), default=-1)


def given_up(run: Run, group: Ranks, end: End) -> TrainingError:
    """The error for a run that was given up: the causes, what the rank to blame said last, and what to do now."""
    causes = run.events.read("gave_up")[-1]["causes"]
    told = "".join(f"\n  {cause}" for cause in causes)
    blamed = run.events.read("rank_lost")[-1]["rank"]
    words = last_words(group.log(blamed))
    told += f"\nThe last words of rank {blamed}: {words}" if words else ""
    step = newest_step(run.checkpoints)
    kept = f"The checkpoint of step {step:,} is kept: the same command goes on from it. " if step >= 0 else ""
    if run.status() == "failed":  # the ranks said so, after a bad step
        kept = "It stays failed: the same command begins a new run. "
    error = TrainingError(
        f"The run {run.id} was given up: {end.reason}.{told}",
        hint=f"{kept}All that the ranks said: {run.folder}/ranks/rank-*.log",
    )
    error.exit_status = end.status
    return error


def last_words(log: Path) -> str:
    """The error at the end of a rank's output: from where it says so, else the last line; empty without any."""
    lines = log.read_text(errors="replace").splitlines()[-WORDS:] if log.is_file() else []
    lines = [line for line in lines if line.strip()]
    errors = [at for at, line in enumerate(lines) if line.startswith("error: ")]
    return "\n".join(lines[errors[-1] if errors else -1 :])


def supervise(group: Ranks, section: SupervisorSection, events: EventLog, newest: Callable[[], int]) -> End:
    """Run a group to its end. `newest` tells the step of the newest checkpoint, -1 without any.

    SIGINT and SIGTERM are passed on as SIGTERM, so that the ranks save and end; the second one kills them.
    """
    clock, last = 0.0, time.monotonic()
    state, actions = begin(group.ranks, group.spares, clock, newest(), group.block)
    with _stops() as stops:
        while True:
            for action in actions:
                _act(action, group, events)
            if state.phase == "ended" and state.end is not None:
                return state.end
            group.wait(LOOK_S)
            now = time.monotonic()
            clock, last = (
                clock + min(now - last, 10 * LOOK_S),
                now,
            )  # time in which it did not look is not counted
            exits, beats, order = tuple(group.exits), tuple(group.beats()), tuple(group.order)
            seen = Facts(clock, exits, beats, order, group.frozen(), newest(), len(stops), group.gone())
            state, actions = decide(state, seen, section)


def _act(action: Action, group: Ranks, events: EventLog) -> None:
    if isinstance(action, Start):
        group.start(action.slots)
    elif isinstance(action, Signal):
        group.signal(action.number)
    elif isinstance(action, Renew):
        group.renew()
    else:
        events.write(action.event, **action.facts)
        if action.text:
            logger.warning("%s", action.text)


@contextmanager
def _stops() -> Iterator[list[int]]:
    """The stop signals that came so far."""
    stops: list[int] = []
    last = 0.0

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal last
        if not stops or time.monotonic() - last > ONE_STOP_S:
            stops.append(number)
        last = time.monotonic()

    with on_stop(note):
        yield stops
