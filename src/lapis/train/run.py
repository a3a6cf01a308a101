"""One training run's folder: its recipe, its events, its checkpoints, its evaluation. No torch.

runs/laptop-20261124-101500-ab12/     name, start in UTC, first digits of the recipe's digest
  recipe.toml                         every setting, defaults included
  events.jsonl                        one fact per line: create, start, step, checkpoint, resume, end, …
  checkpoints/                        see lapis.checkpoint.manifest
  eval.json                           the EvalReport, once there is one
  ranks/                              of several ranks: their output and their heartbeats
  .lock, .watch                       held by the process that trains, and by its supervisor
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import signal
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lapis.errors import ConflictError, InputError, NotFoundError, nearest
from lapis.home import Home
from lapis.log import EventLog, UntoldEvents
from lapis.storage import HELD, lock, storage_errors, sync_folder, sync_tree, write_text

Status = Literal["running", "finished", "stopped", "failed"]

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
IDENTIFIER = re.compile(r"(?P<name>.+)-(?P<start>\d{8}-\d{6})-(?P<suffix>[0-9a-f]{4})")
RECIPE = "recipe.toml"
LOCK, WATCH = ".lock", ".watch"  # held by the process that trains; by the supervisor of several
PROBES = 5


@dataclass(frozen=True)
class RunSummary:
    """A run in one line. None where the run has not come that far."""

    id: str
    name: str
    status: Status
    created: float  # seconds since 1970
    parameters: int | None
    step: int | None
    tokens: int | None
    loss: float | None  # nats per token, of the last step
    seconds: float | None  # of training, over all resumes
    bits_per_byte: float | None  # on held-out documents
    recipe_digest: str | None
    dataset_digest: str | None


class Run:
    """A run's folder. Made by `create`, found by `open`, `find` and `list`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.id = folder.name
        self.checkpoints = folder / "checkpoints"
        self.events = EventLog(folder / "events.jsonl")

    @staticmethod
    def create(home: Home, name: str, recipe_text: str, digest: str) -> Run:
        """Make a new run's folder, whole or not at all. Raises InputError for a name no folder can have."""
        if not NAME.fullmatch(name):
            raise InputError(
                f"A run cannot be named {name!r}.", hint="Use letters, digits, dots, dashes and underscores."
            )
        temporary = home.runs / f".creating-{uuid.uuid4().hex}"
        try:
            with storage_errors(home.runs):
                temporary.mkdir(parents=True)
                (temporary / RECIPE).write_text(recipe_text)
                EventLog(temporary / "events.jsonl").write("create", name=name, recipe_digest=digest)
                sync_tree(temporary)
            return Run(_place(temporary, name, digest[:4]))
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    @staticmethod
    def open(home: Home, identifier: str) -> Run:
        """The run of that exact id. Raises NotFoundError naming the nearest one."""
        known = {run.id: run for run in Run.list(home)}
        if identifier not in known:
            raise NotFoundError(
                f"There is no run {identifier!r}. {nearest(identifier, known)}".rstrip(),
                hint="`lapis runs list` shows all runs; `lapis train RECIPE.toml` starts one.",
            )
        return known[identifier]

    @staticmethod
    def find(home: Home, text: str) -> Run:
        """The run with this id, a prefix of it, or the `last` one. Raises NotFoundError, InputError."""
        runs = Run.list(home)
        if text == "last" and runs:
            return runs[-1]
        matching = [run for run in runs if run.id.startswith(text)]
        exact = [run for run in matching if run.id == text]
        if len(exact or matching) == 1:
            return (exact or matching)[0]
        if matching:
            names = ", ".join(run.id for run in matching[-5:])
            hint = "Write more of the id, or `last`."
            raise InputError(f"{text!r} fits {len(matching)} runs: {names}.", hint=hint)
        return Run.open(home, text)

    @staticmethod
    def list(home: Home) -> Sequence[Run]:
        """All runs, the oldest first."""
        if not home.runs.is_dir():
            return []
        runs = [Run(path) for path in home.runs.iterdir() if IDENTIFIER.fullmatch(path.name)]
        runs = [run for run in runs if run.events.path.is_file()]  # not a folder that somebody has emptied
        return sorted(runs, key=lambda run: (run.created, run.id))

    @property
    def name(self) -> str:
        match = IDENTIFIER.fullmatch(self.id)
        return match["name"] if match else self.id

    @property
    def created(self) -> float:
        """When the run was created, in seconds since 1970."""
        with self.events.path.open("rb") as file:
            first: dict[str, Any] = json.loads(file.readline())
        return float(first["time"])

    @property
    def recipe_text(self) -> str:
        """The resolved recipe, as TOML."""
        return (self.folder / RECIPE).read_text()

    @contextmanager
    def hold(self, name: str = LOCK) -> Iterator[None]:
        """Hold this run while training it: its status is `running` until the block or the process ends.

        Raises ConflictError if another process trains it. A supervisor holds WATCH, its first rank LOCK.
        """
        if name == LOCK and os.environ.get(HELD):
            yield
            return
        with ExitStack() as stack:
            for attempt in range(PROBES):
                try:
                    stack.enter_context(lock(self.folder / name, f"The run {self.id}"))
                    break
                except ConflictError:
                    if attempt == PROBES - 1:
                        raise
                    time.sleep(0.02)  # a status question holds it for an instant
            yield

    def watched(self) -> Run:
        """The same run as ranks other than the first see it: what they tell is dropped."""
        run = Run(self.folder)
        run.events = UntoldEvents(self.events.path)
        return run

    def status(self) -> Status:
        """Whether a process trains this run now, and if not, how the last one ended."""
        return status_of(self._held(), self.events.read())

    def interrupt(self) -> None:
        """Ask the process of this machine that trains the run to save and stop. Raises ConflictError without one."""
        for name in (WATCH, LOCK):  # the supervisor stops its ranks itself
            path = self.folder / name
            if _is_locked(path):
                try:
                    os.kill(int(path.read_text()), signal.SIGTERM)
                    return
                except (ValueError, ProcessLookupError, PermissionError):
                    continue  # it has just ended, or it is not a process of ours
        raise ConflictError(
            f"No process of this machine trains the run {self.id}.",
            hint="Stop it where it was started: Ctrl-C, or cancel its job.",
        )

    def summary(self) -> RunSummary:
        """The run in one line."""
        events = self.events.read()
        evaluation = self.evaluation()
        facts = dict(
            item for event in events if event["event"] in ("create", "start") for item in event.items()
        )
        taken = effective_steps(events)
        step = taken[-1] if taken else {}
        return RunSummary(
            id=self.id,
            name=self.name,
            status=status_of(self._held(), events),
            created=events[0]["time"],
            parameters=facts.get("parameters"),
            step=step.get("step"),
            tokens=step.get("tokens"),
            loss=step.get("loss"),
            seconds=step.get("seconds"),
            bits_per_byte=evaluation.get("bits_per_byte") if evaluation else None,
            recipe_digest=facts.get("recipe_digest"),
            dataset_digest=facts.get("dataset_digest"),
        )

    def steps(self) -> Sequence[dict[str, Any]]:
        """The step events that count: after a resume, those of the abandoned stretch are left out."""
        return effective_steps(self.events.read())

    def samples(self) -> Sequence[dict[str, Any]]:
        """The samples events that count, one a step; `samples` in each are prompt, text and perhaps reward."""
        return effective(self.events.read(), "samples")

    def evaluation(self) -> dict[str, Any] | None:
        """The evaluation as written to eval.json, or None."""
        path = self.folder / "eval.json"
        return json.loads(path.read_text()) if path.exists() else None

    def write_evaluation(self, report: dict[str, Any]) -> None:
        """Replace eval.json."""
        write_text(self.folder / "eval.json", json.dumps(report, indent=1, allow_nan=False) + "\n")

    def _held(self) -> bool:
        return _is_locked(self.folder / LOCK) or _is_locked(self.folder / WATCH)


def status_of(held: bool, events: Sequence[dict[str, Any]]) -> Status:
    """How a run stands, from its events and from whether a process holds it.

    An `end` event says it by its reason: `stopped` (it can be resumed), `failed`, all else is finished. A run
    that nobody holds and that never wrote its end was killed: stopped.
    """
    marks = [event for event in events if event["event"] in ("start", "resume", "end")]
    if marks and marks[-1]["event"] == "end":
        reason = str(marks[-1].get("reason", ""))
        return "stopped" if reason == "stopped" else "failed" if reason == "failed" else "finished"
    return "running" if held else "stopped"


def effective_steps(events: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
    """The step events of the run as it went in the end."""
    return effective(events, "step")


def effective(events: Sequence[dict[str, Any]], kind: str) -> Sequence[dict[str, Any]]:
    """The events of a kind, of the run as it went in the end: a resume takes back what came after its step."""
    steps: list[dict[str, Any]] = []
    anew = False
    for event in events:
        if event["event"] == "start":
            anew = True  # unless it says next where it goes on: there was no checkpoint yet
        elif event["event"] == "resume":
            anew = False
            while steps and steps[-1]["step"] > event["step"]:
                steps.pop()
        elif event["event"] == kind:
            if anew:
                steps.clear()
            anew = False
            steps.append(event)
    return steps


def _is_locked(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _place(temporary: Path, name: str, suffix: str) -> Path:
    """Rename a filled folder to a free run id. The suffix changes only if two start in one second."""
    start = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    while True:
        target = temporary.parent / f"{name}-{start}-{suffix}"
        try:
            os.rename(temporary, target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            suffix = secrets.token_hex(2)
            continue
        sync_folder(target.parent)
        return target
