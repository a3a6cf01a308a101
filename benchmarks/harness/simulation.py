"""Jobs on nodes in simulated time: what a queue policy does to them, decision by decision.

A job that may be stopped keeps what it has done: it takes `CHECKPOINT` seconds to save, and `RESTART` to go on.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from lapis.jobs.job import Job, Node, Place, State
from lapis.jobs.shares import Share, decayed, occupied

CHECKPOINT = 30.0
RESTART = 30.0


class Decided(Protocol):
    """What a policy says."""

    @property
    def starts(self) -> Mapping[str, Mapping[str, int]]: ...
    @property
    def firsts(self) -> frozenset[str]: ...
    @property
    def preemptions(self) -> Mapping[str, str]: ...


Decide = Callable[[Sequence[Job], Sequence[Job], Mapping[str, Share], float], Decided]


@dataclass
class Task:
    """A job and the seconds that it needs; then what became of it."""

    job: Job
    seconds: float
    left: float = 0.0
    first_start: float | None = None
    end: float | None = None
    stops: int = 0
    told: list[tuple[float, float]] = field(default_factory=list)  # when, and when it would likely start


class World:
    """Nodes, and the tasks on them."""

    def __init__(
        self,
        tasks: Sequence[Task],
        nodes: Sequence[Node],
        interval: float,
        shares: Mapping[str, Share] | None = None,
    ) -> None:
        self.tasks = {task.job.id: task for task in tasks}
        self.nodes = nodes
        self.interval = interval
        self.waiting: dict[str, Job] = {}
        self.active: dict[str, Job] = {}
        self.shares: dict[str, Share] = dict(shares or {})
        self.now = 0.0
        self._used_at: dict[str, float] = {}
        self._events: list[tuple[float, int, str, str]] = []  # when, order, what, job
        for task in tasks:
            task.left = task.seconds
            self._push(task.job.created_at, "arrive", task.job.id)

    def run(self, decide: Decide, seen: Callable[[World, Decided], None] | None = None) -> list[Task]:
        """Until all tasks have ended; `seen` is shown every decision before it is carried out."""
        while self._events:
            self.now = self._events[0][0]
            until = self.now + self.interval  # the controller looks once in an interval
            while self._events and self._events[0][0] <= until:
                when, _, what, job_id = heapq.heappop(self._events)
                self.now = max(self.now, when)
                self._happen(what, job_id)
            self.now = until
            waiting = sorted(self.waiting.values(), key=lambda job: (job.created_at, job.id))
            if not waiting:
                continue
            decided = decide(waiting, list(self.active.values()), self._shares(), self.now)
            if seen is not None:
                seen(self, decided)
            self._carry_out(decided)
            if not self._events and self.waiting and decided.starts:
                continue
            if not self._events and self.waiting:
                self._push(self.now + 60.0, "look", "")  # time passes: patience may change the order
        return list(self.tasks.values())

    def _happen(self, what: str, job_id: str) -> None:
        if what == "arrive":
            self.waiting[job_id] = self.tasks[job_id].job
            return
        name, _, attempt = job_id.partition("/")
        job = self.active.get(name)
        if what == "look" or job is None or str(job.attempt) != attempt:
            return
        task = self.tasks[name]
        if what == "end":
            task.end = self.now
            self._leave(job)
        elif what == "stopped":
            assert job.started_at is not None
            task.left -= max(0.0, self.now - CHECKPOINT - job.started_at - (RESTART if task.stops else 0.0))
            task.stops += 1
            self._leave(job)
            self.waiting[name] = replace(
                job, state=State.QUEUED, places=(), preempt_at=None, preempt_for=None, started_at=None
            )

    def _leave(self, job: Job) -> None:
        del self.active[job.id]
        share = self._share(job.project_id)
        more = occupied(job, self.now)
        used = tuple(a + b for a, b in zip(share.used, more, strict=True))
        self.shares[job.project_id] = replace(share, used=used)

    def _carry_out(self, decided: Decided) -> None:
        for job_id in decided.preemptions:
            job = self.active[job_id]
            if job.preempt_at is None:
                self.active[job_id] = replace(
                    job, preempt_at=self.now, preempt_for=decided.preemptions[job_id]
                )
                self._push(self.now + CHECKPOINT, "stopped", f"{job_id}/{job.attempt}")
        for job_id, ranks in decided.starts.items():
            job, task = self.waiting.pop(job_id), self.tasks[job_id]
            places = tuple(Place(node, count) for node, count in ranks.items())
            job = replace(
                job, state=State.RUNNING, places=places, started_at=self.now, attempt=job.attempt + 1
            )
            self.active[job_id] = job
            task.first_start = self.now if task.first_start is None else task.first_start
            needs = task.left + (RESTART if task.stops else 0.0)
            self._push(self.now + needs, "end", f"{job_id}/{job.attempt}")
            if job_id in decided.firsts:
                self.shares[job.project_id] = replace(self._share(job.project_id), first_at=self.now)

    def _share(self, project: str) -> Share:
        """A project's share, decayed until now."""
        share = self.shares.get(project, Share())
        before = self._used_at.get(project, self.now)
        self._used_at[project] = self.now
        return replace(share, used=decayed(share.used, self.now - before))

    def _shares(self) -> dict[str, Share]:
        self.shares = {project: self._share(project) for project in self.shares}
        return self.shares

    def _push(self, when: float, what: str, job_id: str) -> None:
        heapq.heappush(self._events, (when, len(self._events), what, job_id))
