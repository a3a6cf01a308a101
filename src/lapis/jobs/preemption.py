"""Which active jobs stop for one that waits: those that may be stopped, and the fewest of them that are enough."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from lapis.jobs.columns import Matrix, Numbers, Running
from lapis.jobs.policy import Policy
from lapis.jobs.room import counts, fits, gather
from lapis.jobs.shares import Amounts
from lapis.jobs.tenant import Tenant, add, largest


class Victims:
    """Active jobs that may be stopped: the lowest priority of the projects furthest over their due, the youngest."""

    def __init__(self, active: Running, tenants: Mapping[str, Tenant], now: float, policy: Policy) -> None:
        self.active, self.tenants = active, tenants
        names = list(tenants)
        codes = active.codes(names)
        over = np.array([tenant.due - tenant.part() for tenant in tenants.values()])
        may = (active.preemptible > 0) & (active.started <= now - policy.minimum_run) & np.isinf(active.asked)
        found = np.flatnonzero(may)
        found = found[np.lexsort((-active.started[found], over[codes[found]], active.levels[found]))]
        codes, levels = codes[found], active.levels[found]
        begins = np.flatnonzero((np.diff(codes) != 0) | (np.diff(levels) != 0)) + 1
        bounds = itertools.pairwise((0, *begins.tolist(), len(found)))
        victims = found.tolist()
        # In runs of one project and priority each.
        self.runs = [(names[codes[a]], float(levels[a]), victims[a:b]) for a, b in bounds if a < b]
        self._facts: dict[int, tuple[list[float], list[tuple[int, list[float]]]]] = {}

    def for_job(
        self, tenant: Tenant, level: float, each: Amounts, ranks: int, then: Matrix
    ) -> tuple[list[int], Matrix] | None:
        """The fewest jobs that must stop so that this one fits, and what is free then; None: it never will."""
        chosen = self._enough(tenant, level, each, ranks, then)
        if chosen is None:
            return None
        placement = gather(self._without(chosen, then), each, ranks)
        assert placement is not None
        kept = [
            victim
            for victim in chosen
            if any(node in placement and any(row) for node, row in self._known(victim)[1])
        ]
        after = self._without(kept, then)
        fitting = counts(after, each)
        spare = int(fitting.sum()) - ranks
        for victim in reversed(kept.copy()):  # the last ones were the dearest
            where, given = self.places(victim)
            without = after[where] - given
            lost = fitting[where] - counts(without, each)
            if lost.sum() <= spare:
                spare -= int(lost.sum())
                after[where] = without
                fitting[where] -= lost
                kept.remove(victim)
        return kept, after

    def stop(self, victim: int) -> None:
        """It stops: it is nobody else's victim any more."""
        name, level = self.active.jobs[victim].project_id, self.active.levels[victim]
        for other, its_level, run in self.runs:
            if other == name and its_level == level and victim in run:
                run.remove(victim)

    def places(self, victim: int) -> tuple[Numbers, Matrix]:
        """The nodes of an active job, and what it would give back on each."""
        there = slice(self.active.first[victim], self.active.first[victim + 1])
        return self.active.node[there], self.active.given[there]

    def _enough(
        self, tenant: Tenant, level: float, each: Amounts, ranks: int, then: Matrix
    ) -> list[int] | None:
        """Jobs that may be stopped for this one, the cheapest first, until it fits."""
        over: set[str] = set()  # projects that hold more than they are due
        if tenant.part((each[0] * ranks, each[1] * ranks, each[2] * ranks)) <= tenant.due:
            over = {other.name for other in self.tenants.values() if other.part() > other.due}
            over.discard(tenant.name)
        held = {name: list(self.tenants[name].held) for name in (*over, tenant.name)}  # less those chosen
        fitting = counts(then, each).data
        missing = ranks - sum(fitting)
        rows: dict[int, list[float]] = {}
        chosen = []
        for name, its_level, run in self.runs:
            if name not in over and not (name == tenant.name and its_level < level):
                continue
            for victim in run:
                given, places = self._known(victim)
                add(held[name], given)
                for node, of_node in places:
                    row = rows.get(node) or rows.setdefault(node, then[node].tolist())
                    add(row, of_node)
                    now_fitting = fits(row, each)
                    missing -= now_fitting - fitting[node]
                    fitting[node] = now_fitting
                chosen.append(victim)
                if missing <= 0:
                    return chosen
                if name in over and largest(held[name], tenant.per) <= self.tenants[name].due:
                    over.remove(name)
                    break  # by now it is within its due
        return None

    def _known(self, victim: int) -> tuple[list[float], list[tuple[int, list[float]]]]:
        """What a job takes, as less than nothing, and what it would give back on each node."""
        if victim not in self._facts:
            where, given = self.places(victim)
            total = (-self.active.totals[victim]).tolist()
            self._facts[victim] = total, list(zip(where.tolist(), given.tolist(), strict=True))
        return self._facts[victim]

    def _without(self, victims: Sequence[int], then: Matrix) -> Matrix:
        """What is free when these have stopped."""
        gain = np.zeros_like(then)
        for victim in victims:
            where, given = self.places(victim)
            gain[where] += given
        return then + gain
