"""Two queue policies that the fair one is measured beside. Both place jobs as it does, and neither knows projects.

Neither looks past a job that finds no room: that is what "first come, first served" means. With `backfill`, jobs behind
it may go ahead if they fit, without a reservation: what many simple queues do, and how large jobs starve.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lapis.jobs.job import Job, Node
from lapis.jobs.room import Room


def first_come(
    waiting: Sequence[Job], active: Sequence[Job], nodes: Sequence[Node], backfill: bool = False
) -> dict[str, dict[str, int]]:
    """Which jobs start, in the order of their submission, with ranks by node."""
    return _in_order(waiting, active, nodes, backfill)


def highest_priority(
    waiting: Sequence[Job], active: Sequence[Job], nodes: Sequence[Node], backfill: bool = False
) -> dict[str, dict[str, int]]:
    """Which jobs start, the highest priority first, then in the order of their submission."""
    return _in_order(sorted(waiting, key=lambda job: -job.spec.priority.level), active, nodes, backfill)


def _in_order(
    waiting: Sequence[Job], active: Sequence[Job], nodes: Sequence[Node], backfill: bool
) -> dict[str, dict[str, int]]:
    room = _free(active, nodes)
    starts: dict[str, Mapping[str, int]] = {}
    for job in waiting:
        each = (job.spec.resources.cpus, job.spec.resources.gpus, job.spec.resources.memory)
        placement = room.place(each, job.spec.ranks)
        if placement is None:
            if backfill:
                continue
            break
        room.take(placement, each)
        starts[job.id] = {nodes[node].name: ranks for node, ranks in placement.items()}
    return starts


def _free(active: Sequence[Job], nodes: Sequence[Node]) -> Room:
    free = np.array([(n.resources.cpus, n.resources.gpus, n.resources.memory) for n in nodes], float)
    has_gpus = free[:, 1] > 0
    known = {node.name: index for index, node in enumerate(nodes)}
    for job in active:
        each = job.spec.resources
        for place in job.places:
            free[known[place.node]] -= np.multiply((each.cpus, each.gpus, each.memory), place.ranks)
    return Room(free, has_gpus)
