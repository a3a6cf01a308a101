"""Who runs next: one pure decision over the waiting jobs, the running ones, the nodes and what projects are due.

Between projects: dominant-resource fairness (Ghodsi et al., NSDI 2011). A project's score is the largest part
that it holds of any resource, now and on decayed average, over its weight; the lowest score goes first.
Within a project: priority, then age. The first job that finds no room gets a reserved start, and others may go
ahead of it only if they do not delay that (EASY back-fill, Lifka 1995). docs/jobs.md states the rules in full.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from lapis.jobs.forecast import Wait, explain
from lapis.jobs.job import Job, Node, Resources
from lapis.jobs.policy import Policy
from lapis.jobs.shares import Share
from lapis.jobs.turn import Turn, can_hold


@dataclass(frozen=True)
class Schedule:
    """What to do now, by the ids of jobs: `starts` with ranks by node, `preemptions` with for whom."""

    starts: Mapping[str, Mapping[str, int]]
    firsts: frozenset[str]  # of the starts, those that overtake nobody of their project
    preemptions: Mapping[str, str]
    refused: Mapping[str, str]  # what these nodes can never hold, and why
    turn: Turn

    @cached_property
    def waits(self) -> Mapping[str, Wait]:
        """Why each of the other jobs waits, and when it will likely start. Put into words when asked for."""
        return explain(self.turn)


def schedule(
    waiting: Sequence[Job],
    active: Sequence[Job],
    nodes: Sequence[Node],
    shares: Mapping[str, Share],
    now: float,
    policy: Policy | None = None,
) -> Schedule:
    """Decide over the jobs that wait and those that start or run on these nodes. Equal input, equal decision."""
    turn = Turn(waiting, active, nodes, shares, now, policy or Policy())
    turn.decide()
    names, jobs = [node.name for node in nodes], turn.waiting.jobs
    return Schedule(
        starts={
            jobs[index].id: {names[node]: ranks for node, ranks in placement.items()}
            for index, placement in turn.starts.items()
        },
        firsts=frozenset(jobs[index].id for index in turn.firsts),
        preemptions={victim.id: jobs[index].id for victim, index in turn.preemptions},
        refused=turn.refused,
        turn=turn,
    )


def elsewhere(jobs: Iterable[Job], executors: Mapping[str, Sequence[Node] | None]) -> dict[str, str]:
    """The jobs that one of these executors can hold when it is empty, by id, with its name.

    One that has a queue of its own (None) is asked when its turn comes.
    """
    known: dict[tuple[Resources, int], str | None] = {}
    found = {}
    for job in jobs:
        shape = job.spec.resources, job.spec.ranks
        if shape not in known:
            able = (name for name, nodes in executors.items() if nodes is None or can_hold(nodes, job.spec))
            known[shape] = next(able, None)
        name = known[shape]
        if name is not None:
            found[job.id] = name
    return found
