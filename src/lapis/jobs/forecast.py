"""Why each waiting job waits, and when it will likely start: what a decision means for those that it passed over.

The start of a job that room is kept for is exact as far as time limits are. That of the others is a flow: they start
in the order in which shares would be given out, as the nodes' free time fills with the work before them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lapis.jobs.columns import Matrix
from lapis.jobs.tenant import Tenant
from lapis.jobs.turn import Turn


class Wait(NamedTuple):
    """Why a job waits, and when it will likely start (None: nobody can say)."""

    reason: str
    likely_start: float | None = None


def explain(turn: Turn) -> dict[str, Wait]:
    """A reason and a likely start for every job that was neither started nor refused."""
    order = _order(turn)
    if not order:
        return {}
    starts = _starts(turn, order)
    standing = {name: _standing(tenant) for name, tenant in turn.tenants.items()}
    jobs = turn.waiting.jobs
    waits = {
        jobs[index].id: Wait(f"{before} waiting jobs go first; {standing[jobs[index].project_id]}", at)
        for before, (index, at) in enumerate(zip(order, starts, strict=True))
    }
    for index in (*turn.kept_public, *turn.would_delay):
        waits[jobs[index].id] = Wait(_refusal(turn, index), waits[jobs[index].id].likely_start)
    for index, hold in turn.holds.items():
        waits[jobs[index].id] = Wait(_kept(turn, index), hold.at)
    return waits


def _kept(turn: Turn, index: int) -> str:
    asked = turn.waiting.jobs[index].spec.total
    if turn.holds[index].by_stopping:
        return f"other jobs are being stopped for it; it asks for {asked}"
    return f"it goes next, as soon as {asked} are free"


def _refusal(turn: Turn, index: int) -> str:
    """Why a job for which there is room does not start."""
    if index in turn.kept_public:
        return (
            f"{turn.policy.public:.0%} of the nodes are kept for small projects and for jobs that may be stopped "
            "(--preemptible)"
        )
    head = turn.head
    assert head is not None
    first, job = turn.waiting.jobs[head.index], turn.waiting.jobs[index]
    known = first.project_id == job.project_id  # nobody learns of another project's jobs
    text = f"it would delay {first.id if known else 'a job of another project'}, which goes first"
    left = int((head.at - turn.now) // 60)
    return f"{text}; with a time limit of {left} min it could start now" if left else text


def _standing(tenant: Tenant) -> str:
    return f"its project holds {tenant.part():.0%} and is due {tenant.due:.0%}"


def _order(turn: Turn) -> list[int]:
    """Those that wait, in the order in which they would start if each found room: by their project's score then."""
    indices: list[int] = []
    keys: list[Matrix] = []
    for tenant in turn.tenants.values():
        mine = [index for index in tenant.jobs if index not in turn.starts]
        if not mine:
            continue
        totals = turn.waiting.totals[mine]
        before = np.cumsum(totals, axis=0) - totals + np.add(tenant.held, tenant.past)
        indices += mine
        keys.append((before * turn.per).max(axis=1) / tenant.weight)
    if not indices:
        return []
    found = np.array(indices)
    kept = np.ones(len(found))
    kept[np.isin(found, list(turn.holds))] = 0
    created = turn.waiting.created[found]
    ordered: list[int] = found[np.lexsort((found, created, np.concatenate(keys), kept))].tolist()
    return ordered


def _starts(turn: Turn, order: list[int]) -> list[float | None]:
    """When the free time of the nodes will have been filled by the work before each job, and it fits."""
    totals = turn.waiting.totals[order]
    work = totals * turn.expected[order][:, None]
    before = (
        np.cumsum(work, axis=0) - work + totals
    )  # a second of its own: it must not start at a full moment
    times, given = turn.releases.profile()
    whole = np.array(turn.whole)
    now_free = whole - given[-1] if len(times) else whole
    times = np.concatenate(([turn.now], times))
    free = np.vstack((now_free, now_free + given)) if len(given) else now_free[None, :]
    spans = np.diff(times)[:, None]
    filled = np.vstack((np.zeros(3), np.cumsum(free[:-1] * spans, axis=0)))
    latest = np.full(len(order), turn.now)
    for resource in range(3):
        if not whole[resource]:
            continue
        asked = totals[:, resource] > 0
        at = np.interp(before[asked, resource], filled[:, resource], times)
        beyond = before[asked, resource] - filled[-1, resource]
        at = np.where(beyond > 0, times[-1] + beyond / whole[resource], at)
        fits = np.searchsorted(free[:, resource], totals[asked, resource] - 1e-6)
        at = np.maximum(at, times[np.minimum(fits, len(times) - 1)])
        latest[asked] = np.maximum(latest[asked], at)
    starts: list[float | None] = latest.tolist()
    return starts
