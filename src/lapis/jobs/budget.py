"""Which waiting jobs their projects can pay for: in GPU time and money of this month, reserved before they start."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from lapis.jobs.job import Job, State
from lapis.tenants.quota import NANO
from lapis.tenants.usage import UsageLedger

WAITS = "it waits for the next month, or for a higher limit"


@dataclass
class _Left:
    """What is left of a limit, with what is reserved taken off."""

    what: str
    left: float
    unit: str

    def lacks(self, need: float) -> str | None:
        """Why something does not fit in; None if it does. A need that is not known fits while anything is left."""
        if self.left <= 0:
            return f"{self.what} of this month is used up or reserved by what runs: {WAITS}"
        if need > self.left:
            return (
                f"it may use {need:,.6g} {self.unit} until its time limit, of {self.what} of this month "
                f"{self.left:,.6g} are left: {WAITS}, or a shorter time limit"
            )
        return None


def affordable(waiting: Iterable[Job], budget: Budget) -> tuple[list[Job], dict[str, str]]:
    """The waiting jobs of which each could be paid for, and why the others wait, by id.

    Whoever starts one takes it from the budget, and asks again before the next: together they may be too much.
    """
    allowed, held = [], {}
    for job in waiting:
        lack = budget.lack(job)
        if lack is None:
            allowed.append(job)
        else:
            held[job.id] = lack
    return allowed, held


def in_turn(waiting: Sequence[Job]) -> Iterator[Job]:
    """Jobs by age, and of each project those of higher priority first: for whoever has no other order."""
    of: dict[str, list[Job]] = {}
    for job in waiting:
        of.setdefault(job.project_id, []).append(job)
    first = {name: iter(sorted(jobs, key=lambda job: -job.spec.priority.level)) for name, jobs in of.items()}
    return (next(first[job.project_id]) for job in waiting)


class Budget:
    """What is left for the projects that have a limit, or whose organization has one.

    A job's need is that of its time limit; `active` are those of all executors, and reserve theirs. Without a time
    limit a job needs something left, and what it uses is known only as it goes. What runs goes on in any case.
    """

    def __init__(self, ledger: UsageLedger, active: Iterable[Job], now: float) -> None:
        self._now = now
        self._prices = ledger.prices.current()
        organizations: dict[str, _Left] = {}
        self._gpus: dict[str, _Left] = {}
        self._money: dict[str, list[_Left]] = {}
        unit = self._prices.currency.upper()
        for project, left in ledger.work_left().items():
            if left.gpu_seconds is not None:
                self._gpus[project] = _Left("its project's GPU time", left.gpu_seconds, "GPU-seconds")
            money = self._money.setdefault(project, [])
            if left.cost is not None:
                money.append(_Left("its project's money", left.cost / NANO, unit))
            if left.organization_cost is not None:
                whole = _Left("its organization's money", left.organization_cost / NANO, unit)
                money.append(organizations.setdefault(left.organization_id, whole))
        for job in active:
            self.take(job)

    def lack(self, job: Job) -> str | None:
        """Why a job cannot be paid for; None if it can."""
        gpu_seconds, cost = self._need(job)
        lacks: list[str | None] = []
        if job.spec.resources.gpus and job.project_id in self._gpus:
            lacks.append(self._gpus[job.project_id].lacks(gpu_seconds))
        if self._costs(job):
            lacks += [left.lacks(cost) for left in self._money.get(job.project_id, ())]
        return next((lack for lack in lacks if lack is not None), None)

    def take(self, job: Job) -> None:
        """Reserve what a job may use."""
        gpu_seconds, cost = self._need(job)
        if job.project_id in self._gpus:
            self._gpus[job.project_id].left -= gpu_seconds
        for left in self._money.get(job.project_id, ()):
            left.left -= cost

    def _costs(self, job: Job) -> bool:
        price, each = self._prices.compute, job.spec.resources
        return bool((each.gpus and price.gpu_hour) or (each.cpus and price.cpu_hour))

    def _need(self, job: Job) -> tuple[float, float]:
        """GPU-seconds and money of an attempt: until its time limit, or what it has used if that is more."""
        begun = job.started_at if job.state is State.RUNNING else None
        seconds = max(0.0 if begun is None else self._now - begun, job.spec.time_limit or 0.0)
        total = job.spec.total
        cost = self._prices.work(round(1000 * total.cpus * seconds), round(1000 * total.gpus * seconds))
        return total.gpus * seconds, cost / NANO
