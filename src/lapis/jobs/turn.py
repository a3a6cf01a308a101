"""One decision of the fair queue while it is made: whose turn it is, what starts, what is kept for whom."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lapis.jobs.columns import Matrix, Numbers, Running, Waiting, sums
from lapis.jobs.job import Job, Node
from lapis.jobs.policy import Policy
from lapis.jobs.room import Placement, Releases, Room, amounts, counts, fits, gather
from lapis.jobs.shares import Amounts, Share

CLAIMS = 16  # jobs for which a decision looks for others to stop: never a storm


@dataclass
class Tenant:
    """A project within one decision: what it is due, what it holds, and which of its jobs wait, in order."""

    name: str
    weight: float
    past: list[float]  # what it held on decayed average
    first_at: float | None  # when its first job of then was started last
    held: list[float]
    firm: list[float]  # held by jobs that cannot be stopped
    due: float  # the part of its dominant resource that it may take from others
    jobs: list[int]
    at: int = 0  # the next of its jobs
    blocked: int | None = None  # its first job that found no room


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
        self.per = [1 / amount if amount else 0.0 for amount in whole]
        self.refused: dict[str, str] = {}
        self.waiting, self.active = self._possible(Waiting(waiting)), Running(active, self.names)
        limits = self.waiting.limits
        self.expected: Matrix = np.where(np.isfinite(limits), limits, policy.assumed)
        self.tenants = self._tenants(shares)
        self.free = self.capacity.copy()
        self.stopping: Matrix = np.zeros_like(self.capacity)  # what jobs that were asked to stop give back
        self.releases = self._occupy()
        self.firm = [0.0, 0.0, 0.0]  # what large projects hold in jobs that cannot be stopped
        for tenant in self.tenants.values():
            if self.large(tenant):
                _add(self.firm, tenant.firm)
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
        self._fresh: list[tuple[Placement, Amounts]] = []  # started, and not yet taken from `free`
        self._victims: Numbers | None = None
        self._tried = 0

    # What there is

    def _possible(self, waiting: Waiting) -> Waiting:
        """The jobs that the nodes can hold at all."""
        kinds, of_kind = np.unique(self.capacity, axis=0, return_counts=True)
        possible = [int((counts(kinds, each) * of_kind).sum()) >= ranks for each, ranks in waiting.shapes]
        if all(possible):
            return waiting
        for job, number in zip(waiting.jobs, waiting.shape_of, strict=True):
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
        self._projects = active  # of the active jobs, as places among the names
        stays = self.active.totals * np.isinf(self.active.asked)[:, None]
        held = sums(active, stays, len(names))
        firmly = sums(active, stays * (1 - self.active.preemptible[:, None]), len(names))
        past = sums(active, self.active.totals * self._ran()[:, None], len(names))
        # A class higher for each two patiences of waiting.
        created = self.waiting.created
        rising = np.maximum(0.0, (self.now - created) // (2 * self.policy.patience)) + self.waiting.levels
        order = np.lexsort((np.arange(len(created)), created, -rising, waiting))
        ends = np.searchsorted(waiting[order], np.arange(len(names)), side="right").tolist()
        found, begin = {}, 0
        weights = sum((shares.get(name) or Share()).weight for name in busy)
        for code, name in enumerate(names):
            share = shares.get(name) or Share()
            unit = math.log(2) / self.policy.half_life
            average = [unit * (done + more) for done, more in zip(share.used, past[code], strict=True)]
            due = max(share.weight / weights, self.policy.small) if name in busy else 0.0
            jobs = order[begin : ends[code]].tolist()
            begin = ends[code]
            found[name] = Tenant(
                name, share.weight, average, share.first_at, held[code], firmly[code], due, jobs
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

    def score(self, tenant: Tenant) -> float:
        """The dominant share: the largest part of any resource, held now and on decayed average, per weight."""
        return self.part(tenant, tenant.past) / tenant.weight

    def part(self, tenant: Tenant, more: Sequence[float] = (0.0, 0.0, 0.0), ranks: int = 1) -> float:
        """The largest part of any resource that the project holds, with some more."""
        held, per = tenant.held, self.per
        return max(
            (held[0] + more[0] * ranks) * per[0],
            (held[1] + more[1] * ranks) * per[1],
            (held[2] + more[2] * ranks) * per[2],
        )

    def large(self, tenant: Tenant) -> bool:
        """Whether the project is too large for the public share."""
        return self.part(tenant, tenant.past) > self.policy.small

    def _key(self, tenant: Tenant) -> tuple[float, float, float, str]:
        """Lower is earlier: who got nothing for too long, then who has the lowest score."""
        created = float(self.waiting.created[tenant.jobs[tenant.at]])
        if tenant.at == 0:
            since = max(created, tenant.first_at or 0.0)
            if self.now - since > self.policy.patience:
                return 0.0, since, created, tenant.name
        return 1.0, self.score(tenant), created, tenant.name

    def decide(self) -> None:
        """Go through the projects, the lowest score first, until each job has started or found no room."""
        line = [(self._key(tenant), tenant) for tenant in self.tenants.values() if tenant.jobs]
        heap = [(key, tenant.name) for key, tenant in line]
        heapq.heapify(heap)
        while heap:
            tenant = self.tenants[heapq.heappop(heap)[1]]
            if self._advance(tenant) and tenant.at < len(tenant.jobs):
                heapq.heappush(heap, (self._key(tenant), tenant.name))

    def _advance(self, tenant: Tenant) -> bool:
        """Go on until a job of this project has room or a claim to some; False if none of those left has."""
        shapes, hopeless = self.waiting.shape_of, self._hopeless
        for index in itertools.islice(tenant.jobs, tenant.at, None):
            tenant.at += 1
            if tenant.blocked is not None and shapes[index] in hopeless:
                continue
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
        each, ranks = self.waiting.shape(index)
        before = self.head is None or self.now + self.waiting.limits[index] <= self.head.at
        placement = (self.short if before else self.long).place(each, ranks)
        if placement is None:
            if before or self.short.place(each, ranks) is None:
                self._hopeless.add(self.waiting.shape_of[index])
            else:
                self.would_delay.add(index)
            return False
        if not self.waiting.preemptible[index] and not self._leaves_public(tenant, each, ranks):
            self.kept_public.add(index)
            return False
        self.starts[index] = placement
        if tenant.blocked is None:
            self.firsts.add(index)
        self.short.take(placement, each)
        if self.long is not self.short:
            if before:
                for node, _ in placement:
                    self.long.cap(node, self.short.rows[node])
            else:
                self.long.take(placement, each)
        if self.holds:
            self._fresh.append((placement, each))
        self.releases.add(self.now + float(self.expected[index]), placement, each)
        self._give(tenant, index)
        return True

    def _give(self, tenant: Tenant, index: int) -> None:
        """Count a job to what its project holds."""
        each, ranks = self.waiting.shape(index)
        was_large = self.large(tenant)
        _add(tenant.held, each, ranks)
        if not self.waiting.preemptible[index]:
            _add(tenant.firm, each, ranks)
            if was_large:
                _add(self.firm, each, ranks)
        if not was_large and self.large(tenant):
            _add(self.firm, tenant.firm)

    def _leaves_public(self, tenant: Tenant, each: Amounts, ranks: int) -> bool:
        """Whether the public share stays free of large projects' jobs that cannot be stopped."""
        if len(self.tenants) < 2:
            return True
        is_large = self.large(tenant)
        if not is_large:
            past = tenant.past
            with_it = [past[0] + each[0] * ranks, past[1] + each[1] * ranks, past[2] + each[2] * ranks]
            if self.part(tenant, with_it) <= self.policy.small:
                return True
        if self.kept_public:
            return False  # nobody overtakes there
        for resource in range(3):
            firm = self.firm[resource] + (0.0 if is_large else tenant.firm[resource])
            asked = each[resource] * ranks
            # One that is larger than all that is left may run alone.
            kept = math.floor(self.policy.public * self.whole[resource])
            if asked and firm and firm + asked > self.whole[resource] - kept:
                return False
        return True

    # Room for those that wait

    def _left(self) -> Matrix:
        """What is free now and not kept for anybody."""
        if not self.holds:
            self.free = self.short.matrix()
        for placement, each in self._fresh:
            for node, ranks in placement:
                self.free[node] -= np.multiply(each, ranks)
        self._fresh.clear()
        return self.free - self.held

    def _reserve(self, index: int) -> None:
        """Make a job the head: keep room for it from the moment at which it will be there."""
        each, ranks = self.waiting.shape(index)
        found = self.releases.earliest(self._left(), each, ranks)
        if found is None:
            return
        at, then = found
        placement = gather(then, each, ranks)
        assert placement is not None
        taken = amounts(placement, each, len(self.free))
        self.head = self.holds[index] = Hold(index, at, by_stopping=False)
        self.held += taken
        self.long = Room(np.minimum(self.short.matrix(), then - taken), self.capacity[:, 1] > 0)

    def _claim(self, tenant: Tenant, index: int) -> bool:
        """Keep room for a job that others make by stopping, now or since an earlier decision."""
        if self._tried >= CLAIMS or not (len(self._may_stop()) or self.stopping.any()):
            return False
        self._tried += 1
        each, ranks = self.waiting.shape(index)
        then = self._left() + self.stopping
        placement = gather(then, each, ranks)
        if placement is None:
            then, placement = self._by_stopping(tenant, index, then)
        if placement is None:
            return False
        taken = amounts(placement, each, len(self.free))
        self.held += taken
        for node, _ in placement:
            left = (then[node] - taken[node]).tolist()
            self.short.cap(node, left)
            if self.long is not self.short:
                self.long.cap(node, left)
        self.holds[index] = Hold(index, self.now + self.policy.grace, by_stopping=True)
        self._give(tenant, index)
        return True

    def _by_stopping(self, tenant: Tenant, index: int, then: Matrix) -> tuple[Matrix, Placement | None]:
        """The fewest jobs that must stop for this one, and its places; marks them."""
        each, ranks = self.waiting.shape(index)
        chosen = self._enough(tenant, index, then)
        if chosen is None:
            return then, None
        gained = {victim: self._gain(victim) for victim in chosen}
        after = then + sum(gained.values())
        placement = gather(after, each, ranks)
        assert placement is not None
        nodes = [node for node, _ in placement]
        kept = [victim for victim in chosen if gained[victim][nodes].any()]
        after = then + sum(gained[victim] for victim in kept)
        for victim in reversed(list(kept)):  # the last ones were the dearest
            without = after - gained[victim]
            if int(counts(without, each).sum()) >= ranks:
                after = without
                kept.remove(victim)
        for victim in kept:
            self._stop(victim, index, gained[victim])
        return after, gather(after, each, ranks)

    def _enough(self, tenant: Tenant, index: int, then: Matrix) -> list[int] | None:
        """Jobs that may be stopped for this one, the cheapest first, until it fits."""
        each, ranks = self.waiting.shape(index)
        level, active = self.waiting.levels[index], self.active
        held = {name: list(other.held) for name, other in self.tenants.items()}  # less those chosen
        over: set[str] = set()  # projects that hold more than they are due
        if self.part(tenant, each, ranks) <= tenant.due:
            over = {name for name, other in self.tenants.items() if self.part(other) > other.due} - {
                tenant.name
            }
        rows, fitting = then.tolist(), counts(then, each).tolist()
        missing = ranks - sum(fitting)
        chosen = []
        victims = self._may_stop()
        projects = self._projects[victims]
        of_others = np.array([name in over for name in self.tenants])[projects]
        own = np.array([name == tenant.name for name in self.tenants])[projects]
        for victim in victims[of_others | (own & (active.levels[victims] < level))].tolist():
            name = active.projects[victim]
            if name not in over and name != tenant.name:
                continue  # by now its project would be within its due
            _add(held[name], *_minus(active.shape(victim)))
            if name in over and _largest(held[name], self.per) <= self.tenants[name].due:
                over.remove(name)
            for place in range(active.first[victim], active.first[victim + 1]):
                node = self._nodes[place]
                _add(rows[node], self._given[place])
                now_fitting = fits(rows[node], each)
                missing -= now_fitting - fitting[node]
                fitting[node] = now_fitting
            chosen.append(victim)
            if missing <= 0:
                return chosen
        return None

    def _may_stop(self) -> Numbers:
        """What may be stopped: the lowest priority of the projects furthest over their due, the youngest."""
        if self._victims is None:
            active = self.active
            over = np.array([tenant.due - self.part(tenant) for tenant in self.tenants.values()])
            oldest = self.now - self.policy.minimum_run
            may = (active.preemptible > 0) & (active.started <= oldest) & np.isinf(active.asked)
            found = np.flatnonzero(may)
            keys = (-active.started[found], over[self._projects[found]], active.levels[found])
            self._victims = found[np.lexsort((found, *keys))]
            self._nodes, self._given = active.node.tolist(), active.given.tolist()  # of each place
        return self._victims

    def _places(self, victim: int) -> tuple[Numbers, Matrix]:
        """The nodes of an active job, and what it would give back on each."""
        there = slice(self.active.first[victim], self.active.first[victim + 1])
        return self.active.node[there], self.active.given[there]

    def _gain(self, victim: int) -> Matrix:
        gain = np.zeros_like(self.capacity)
        nodes, given = self._places(victim)
        gain[nodes] = given
        return gain

    def _stop(self, victim: int, index: int, gain: Matrix) -> None:
        """Have an active job stopped for a waiting one."""
        self.preemptions.append((self.active.jobs[victim], index))
        victims = self._may_stop()
        self._victims = victims[victims != victim]
        self.stopping += gain
        first, last = self.active.first[victim], self.active.first[victim + 1]
        self.releases.hasten(first, last, self.now + self.policy.grace)
        held = self.tenants[self.active.projects[victim]].held
        _add(held, *_minus(self.active.shape(victim)))


def _largest(held: Sequence[float], per: Sequence[float]) -> float:
    return max(held[0] * per[0], held[1] * per[1], held[2] * per[2])


def _minus(shape: tuple[Amounts, int]) -> tuple[Amounts, int]:
    return shape[0], -shape[1]


def _add(to: list[float], each: Sequence[float], ranks: int = 1) -> None:
    to[0] += each[0] * ranks
    to[1] += each[1] * ranks
    to[2] += each[2] * ranks
