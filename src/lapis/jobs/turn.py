"""One decision of the fair queue while it is made: whose turn it is, what starts, what is kept for whom."""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from lapis.jobs.columns import Matrix, Running, Shape, Waiting, sums
from lapis.jobs.job import Job, JobSpec, Node
from lapis.jobs.policy import Policy
from lapis.jobs.preemption import Victims
from lapis.jobs.room import Placement, Releases, Room, fits, gather, places
from lapis.jobs.shares import Amounts, Share
from lapis.jobs.tenant import Tenant, add

CLAIMS = 16  # jobs for which a decision looks for others to stop: never a storm


@dataclass(frozen=True)
class Hold:
    """Room kept for a job that waits: from when, and because of what."""

    index: int
    at: float
    by_stopping: bool


class Turn:
    """One decision while it is made."""

    def __init__(
        self,
        waiting: Sequence[Job],
        active: Sequence[Job],
        nodes: Sequence[Node],
        shares: Mapping[str, Share],
        now: float,
        policy: Policy,
    ) -> None:
        self.now, self.policy = now, policy
        self.names = {node.name: index for index, node in enumerate(nodes)}
        self.capacity: Matrix = np.array(
            [(node.resources.cpus, node.resources.gpus, node.resources.memory) for node in nodes], float
        ).reshape(-1, 3)
        whole = self.capacity.sum(axis=0).tolist()
        self.whole: Amounts = (whole[0], whole[1], whole[2])
        per = [1 / amount if amount else 0.0 for amount in whole]
        self.per: Amounts = (per[0], per[1], per[2])
        self._rest = [amount - math.floor(policy.public * amount) for amount in whole]  # not the public share
        self.refused: dict[str, str] = {}
        self.waiting, self.active = self._possible(Waiting(waiting)), Running(active, self.names)
        limits = self.waiting.limits
        self.expected: Matrix = np.where(np.isfinite(limits), limits, policy.assumed)
        # Lists are quicker to read one at a time.
        self._limits: list[float] = limits.tolist()
        self._expected: list[float] = self.expected.tolist()
        self._created: list[float] = self.waiting.created.tolist()
        self._firm: list[bool] = (self.waiting.preemptible == 0).tolist()
        self._shape_of: list[int] = self.waiting.shape_of.tolist()
        self.tenants = self._tenants(shares)
        self.free = self.capacity.copy()
        self.stopping: Matrix = np.zeros_like(self.capacity)  # what jobs that were asked to stop give back
        self.releases = self._occupy()
        self.firm = [0.0, 0.0, 0.0]  # what large projects hold in jobs that cannot be stopped
        for tenant in self.tenants.values():
            if tenant.average > policy.small:  # too large for the public share
                add(self.firm, tenant.firm)
        self.held: Matrix = np.zeros_like(self.capacity)  # what is kept for jobs that wait
        self.short = Room(self.free, self.capacity[:, 1] > 0)  # for what ends before the head's start
        self.long = self.short  # for all else
        self.head: Hold | None = None
        self.holds: dict[int, Hold] = {}
        self.starts: dict[int, Placement] = {}
        self.firsts: set[int] = set()  # of those, the ones that overtake nobody of their project
        self.preemptions: list[tuple[Job, int]] = []
        self.kept_public: set[int] = set()  # jobs that may not have the public share
        self.would_delay: set[int] = set()  # jobs that fit now, but would delay the head's start
        self._hopeless: set[int] = set()  # shapes for which there is no room at all
        self._fresh: list[int] = []  # started, and not yet taken from `free`
        self._tried = 0

    # What there is

    def _possible(self, waiting: Waiting) -> Waiting:
        """The jobs that the nodes can hold at all."""
        kinds = Counter(map(tuple, self.capacity.tolist()))
        possible = [_hold(kinds, each, ranks) for each, ranks, _ in waiting.shapes]
        if all(possible):
            return waiting
        for job, number in zip(waiting.jobs, waiting.shape_of.tolist(), strict=True):
            if not possible[number]:
                self.refused[job.id] = self._refusal(job)
        return Waiting([job for job in waiting.jobs if job.id not in self.refused])

    def _refusal(self, job: Job) -> str:
        cpus, gpus, memory = self.whole
        nodes = "1 node" if len(self.names) == 1 else f"{len(self.names)} nodes"
        there = f"{cpus:g} CPUs, {gpus:g} GPUs and {memory / 2**30:.3g} GiB on {nodes}"
        ranks = f" for each of {job.spec.ranks} ranks" if job.spec.ranks > 1 else ""
        return f"it asks for {job.spec.resources}{ranks}; there are {there}"

    def _tenants(self, shares: Mapping[str, Share]) -> dict[str, Tenant]:
        """The projects, each with what it holds and with its waiting jobs in their order."""
        busy = {*self.waiting.projects, *self.active.projects}
        names = sorted({*shares, *busy})
        active, waiting = self.active.codes(names), self.waiting.codes(names)
        stays = self.active.totals * np.isinf(self.active.asked)[:, None]
        held = sums(active, stays, len(names))
        firmly = sums(active, stays * (1 - self.active.preemptible[:, None]), len(names))
        past = sums(active, self.active.totals * self._ran()[:, None], len(names))
        # A class higher for each two patiences of waiting.
        created = self.waiting.created
        rising = np.maximum(0.0, (self.now - created) // (2 * self.policy.patience)) + self.waiting.levels
        order = np.lexsort((created, -rising, waiting))
        ends = np.searchsorted(waiting[order], np.arange(len(names)), side="right").tolist()
        found, begin = {}, 0
        weights = sum((shares.get(name) or Share()).weight for name in names if name in busy)
        for code, name in enumerate(names):
            share = shares.get(name) or Share()
            unit = math.log(2) / self.policy.half_life
            average = [unit * (done + more) for done, more in zip(share.used, past[code], strict=True)]
            due = max(share.weight / weights, self.policy.small) if name in busy else 0.0
            jobs = order[begin : ends[code]].tolist()
            begin = ends[code]
            found[name] = Tenant(
                name, share.weight, self.per, average, share.first_at, held[code], firmly[code], due, jobs
            )
        return found

    def _ran(self) -> Matrix:
        """Decayed seconds that each active job has run."""
        seconds = np.nan_to_num(np.maximum(self.now - self.active.started, 0.0))
        rate = math.log(2) / self.policy.half_life
        ran: Matrix = -np.expm1(-seconds * rate) / rate
        return ran

    def _occupy(self) -> Releases:
        """Take what the active jobs have, and note when they will give it back.

        That is at their limit; a job without one is expected to take as long again.
        """
        active, now, policy = self.active, self.now, self.policy
        np.subtract.at(self.free, active.node, active.given)
        stops = np.isfinite(active.asked)
        if stops.any():
            there = stops[active.of]
            np.add.at(self.stopping, active.node[there], active.given[there])
        started = np.where(np.isnan(active.started), now, active.started)
        ran = now - started
        without = now + np.maximum(policy.assumed - ran, ran)
        ends = np.where(np.isfinite(active.limits), started + active.limits, without)
        ends = np.maximum(now, np.where(stops, active.asked + policy.grace, ends))
        return Releases(ends[active.of], active.node, active.given, len(self.free))

    # Whose turn it is

    def _key(self, tenant: Tenant) -> tuple[float, float, float, str]:
        """Lower is earlier: who got nothing for too long, then who has the lowest score."""
        created = self._created[tenant.jobs[tenant.at]]
        if tenant.at == 0:
            since = max(created, tenant.first_at or 0.0)
            if self.now - since > self.policy.patience:
                return 0.0, since, created, tenant.name
        return 1.0, tenant.score, created, tenant.name

    def decide(self) -> None:
        """Go through the projects, the lowest score first, until each job has started or found no room."""
        heap = [self._key(tenant) for tenant in self.tenants.values() if tenant.jobs]
        heapq.heapify(heap)
        while heap:
            tenant = self.tenants[heap[0][3]]
            if self._advance(tenant) and tenant.at < len(tenant.jobs):
                heapq.heapreplace(heap, self._key(tenant))
            else:
                heapq.heappop(heap)

    def _advance(self, tenant: Tenant) -> bool:
        """Go on until a job of this project has room or a claim to some; False if none of those left has."""
        jobs, shape_of, hopeless = tenant.jobs, self._shape_of, self._hopeless
        for at in range(tenant.at, len(jobs)):
            index = jobs[at]
            if tenant.blocked is not None and shape_of[index] in hopeless:
                continue
            tenant.at = at + 1
            if self._start(tenant, index):
                return True
            if tenant.blocked is not None:
                continue
            tenant.blocked = index
            if index not in self.kept_public:
                if self._claim(tenant, index):
                    return True
                if self.head is None:
                    self._reserve(index)
        return False

    def _start(self, tenant: Tenant, index: int) -> bool:
        shape = self._shape_of[index]
        each, ranks, total = self.waiting.shapes[shape]
        before = self.head is None or self.now + self._limits[index] <= self.head.at
        placement = (self.short if before else self.long).place(each, ranks)
        if placement is None:
            if before or self.short.place(each, ranks) is None:
                self._hopeless.add(shape)
            else:
                self.would_delay.add(index)
            return False
        firm = self._firm[index]
        if firm and not self._leaves_public(tenant, total):
            self.kept_public.add(index)
            return False
        self.starts[index] = placement
        if tenant.blocked is None:
            self.firsts.add(index)
        self.short.take(placement, each)
        if self.long is not self.short:
            if before:
                for node in placement:
                    self.long.cap(node, self.short.row(node))
            else:
                self.long.take(placement, each)
        if self.holds:
            self._fresh.append(index)
        self.releases.add(self.now + self._expected[index], placement, each)
        self._give(tenant, total, firm)
        return True

    def _give(self, tenant: Tenant, total: Amounts, firm: bool) -> None:
        """Count a job to what its project holds. `firm`: it cannot be stopped."""
        small = self.policy.small
        was_large = tenant.average > small
        tenant.hold(total)
        if firm:
            add(tenant.firm, total)
            if was_large:
                add(self.firm, total)
        if not was_large and tenant.average > small:
            add(self.firm, tenant.firm)

    def _leaves_public(self, tenant: Tenant, total: Amounts) -> bool:
        """Whether the public share stays free of large projects' jobs that cannot be stopped."""
        if len(self.tenants) < 2:
            return True
        small, past = self.policy.small, tenant.past
        is_large = tenant.average > small
        if (
            not is_large
            and tenant.part((past[0] + total[0], past[1] + total[1], past[2] + total[2])) <= small
        ):
            return True
        if self.kept_public:
            return False  # nobody overtakes there
        for asked, firm, its_firm, rest in zip(total, self.firm, tenant.firm, self._rest, strict=True):
            if not is_large:
                firm += its_firm
            # One that is larger than all that is left may run alone.
            if asked and firm and firm + asked > rest:
                return False
        return True

    # Room for those that wait

    def _left(self) -> Matrix:
        """What is free now and not kept for anybody."""
        if not self.holds:
            self.free = self.short.matrix()
        placements = [self.starts[index] for index in self._fresh]
        _, nodes, taken = places(placements, [self._shape(index).each for index in self._fresh])
        np.subtract.at(self.free, nodes, taken)
        self._fresh.clear()
        return self.free - self.held

    def _reserve(self, index: int) -> None:
        """Make a job the head: keep room for it from the moment at which it will be there."""
        each, ranks, _ = self._shape(index)
        found = self.releases.earliest(self._left(), each, ranks)
        if found is None:
            return
        at, then = found
        placement = gather(then, each, ranks)
        assert placement is not None
        _, nodes, taken = places([placement], [each])
        self.head = self.holds[index] = Hold(index, at, by_stopping=False)
        self.held[nodes] += taken
        then[nodes] -= taken
        self.long = Room(np.minimum(self.short.matrix(), then), self.capacity[:, 1] > 0)

    def _claim(self, tenant: Tenant, index: int) -> bool:
        """Keep room for a job that others make by stopping, now or since an earlier decision."""
        if self._tried >= CLAIMS or not (self.victims.runs or self.stopping.any()):
            return False
        self._tried += 1
        each, ranks, total = self._shape(index)
        then = self._left() + self.stopping
        placement = gather(then, each, ranks)
        if placement is None:
            found = self.victims.for_job(tenant, self.waiting.levels[index], each, ranks, then)
            if found is None:
                return False
            victims, then = found
            for victim in victims:
                self._stop(victim, index)
            placement = gather(then, each, ranks)
        assert placement is not None
        _, nodes, taken = places([placement], [each])
        self.held[nodes] += taken
        left = (then[nodes] - taken).tolist()
        for node, row in zip(placement, left, strict=True):
            self.short.cap(node, row)
            if self.long is not self.short:
                self.long.cap(node, row)
        self.holds[index] = Hold(index, self.now + self.policy.grace, by_stopping=True)
        self._give(tenant, total, self._firm[index])
        return True

    def _shape(self, index: int) -> Shape:
        return self.waiting.shapes[self._shape_of[index]]

    @cached_property
    def victims(self) -> Victims:
        """Whom to stop. In the order of what their projects held when the first job asked for it."""
        return Victims(self.active, self.tenants, self.now, self.policy)

    def _stop(self, victim: int, index: int) -> None:
        """Have an active job stopped for a waiting one."""
        job = self.active.jobs[victim]
        self.preemptions.append((job, index))
        self.victims.stop(victim)
        where, given = self.victims.places(victim)
        self.stopping[where] += given
        first, last = self.active.first[victim], self.active.first[victim + 1]
        self.releases.hasten(first, last, self.now + self.policy.grace)
        self.tenants[job.project_id].hold((-self.active.totals[victim]).tolist())


def can_hold(nodes: Sequence[Node], spec: JobSpec) -> bool:
    """Whether these nodes can hold a job when they are empty."""
    each, there = spec.resources, [node.resources for node in nodes]
    kinds: Counter[tuple[float, ...]] = Counter(
        (float(has.cpus), float(has.gpus), float(has.memory)) for has in there
    )
    return _hold(kinds, (each.cpus, each.gpus, each.memory), spec.ranks)


def _hold(kinds: Mapping[tuple[float, ...], int], each: Amounts, ranks: int) -> bool:
    """Whether so many nodes of these kinds can hold all ranks when they are empty."""
    for row, nodes in kinds.items():
        ranks -= fits(row, each) * nodes
        if ranks <= 0:
            return True
    return False
