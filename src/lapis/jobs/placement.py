"""Which GPUs a job gets on its nodes. Pure; the queue asks in the transaction that claims the job."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from lapis.jobs.job import Job, JobSpec, Node, Place, Resources

EPSILON = 1e-9  # CPUs are sums of fractions


def assign(
    spec: JobSpec, ranks: Mapping[str, int], nodes: Sequence[Node], active: Iterable[Job]
) -> tuple[Place, ...] | None:
    """Places for so many ranks on each node beside the active jobs; None where they no longer fit."""
    if sum(ranks.values()) != spec.ranks:
        return None
    known = {node.name: node.resources for node in nodes}
    used: dict[str, Resources] = {name: Resources(0, 0, 0) for name in known}
    taken: dict[str, set[int]] = {name: set() for name in known}
    for job in active:
        for place in job.places:
            if place.node in known:
                used[place.node] += job.spec.resources * place.ranks
                taken[place.node].update(place.gpus)
    places = []
    for name, count in ranks.items():
        asked = spec.resources * count
        if name not in known or not fits_beside(asked, used[name], known[name]):
            return None
        free = [number for number in range(known[name].gpus) if number not in taken[name]]
        if len(free) < asked.gpus:
            return None
        places.append(Place(name, count, tuple(free[: asked.gpus])))
    return tuple(places)


def fits_beside(asked: Resources, used: Resources, room: Resources) -> bool:
    """Whether what is asked fits into a room of which some is used; memory counts only where it is named."""
    return (
        asked.cpus + used.cpus <= room.cpus + EPSILON
        and asked.gpus + used.gpus <= room.gpus
        and (not asked.memory or asked.memory + used.memory <= room.memory)
    )
