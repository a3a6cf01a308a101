"""How long a decision of the fair queue takes: 10,000 waiting jobs and 1,000 nodes of 8 GPUs, one core.

Three moments: nodes that are full (the usual one, every second), full ones of which most jobs may be stopped for
others, and empty ones, where thousands of jobs start at once. Beside them two policies that decide far less: first come
first served, and priority alone.

    python benchmarks/fairshare.py [--waiting 10000] [--nodes 1000] [--runs 7]
"""

from __future__ import annotations

import argparse
import pickle
import random
import statistics
import time
from collections.abc import Callable

from harness.queues import first_come, highest_priority

from lapis.jobs.fairshare import schedule
from lapis.jobs.job import Job, JobSpec, Node, Place, Priority, Resources, State
from lapis.jobs.shares import Share

PROJECTS = 100
GIB = 2**30
NOW = 1e6


def draw_spec(rng: random.Random, preemptible: float) -> JobSpec:
    """Mostly small jobs, some gangs of whole nodes: the kinds of shape that clusters report."""
    gpus, ranks = rng.choice(
        [(0, 1)] * 3 + [(1, 1)] * 10 + [(2, 1)] * 2 + [(4, 1), (8, 1), (8, 2), (8, 4), (1, 16)]
    )
    each = Resources(
        rng.choice([4, 8, 10, 12]) * max(1, gpus), gpus, rng.choice([16, 32, 48]) * max(1, gpus) * GIB
    )
    limit = rng.choice([None, 600.0, 3600.0, 3 * 3600.0, 86_400.0])
    priority = rng.choice(list(Priority))
    return JobSpec("job", ("run",), each, {}, 1, ranks, priority, limit, rng.random() < preemptible)


def draw_job(rng: random.Random, number: int, state: State, preemptible: float = 0.5) -> Job:
    created = NOW - rng.uniform(0, 40_000)
    project = f"project-{min(int(rng.expovariate(0.06)), PROJECTS - 1)}"
    spec = draw_spec(rng, preemptible)
    started = created + rng.uniform(0, NOW - created) if state is State.RUNNING else None
    return Job(
        f"job_{number:06}", project, spec, state, "", 0, 0, None, None, None, None, created, "os:ana", started, None
    )  # fmt: skip


def fill(rng: random.Random, nodes: list[Node], preemptible: float) -> list[Job]:
    """Running jobs until nearly nothing more fits."""
    from dataclasses import replace

    room = {node.name: [node.resources.cpus, node.resources.gpus, node.resources.memory] for node in nodes}
    running: list[Job] = []
    for node in nodes:
        for _ in range(24):
            job = draw_job(rng, 10**5 + len(running), State.RUNNING, preemptible)
            each = job.spec.resources
            row = room[node.name]
            if job.spec.ranks > 1 or each.cpus > row[0] or each.gpus > row[1] or each.memory > row[2]:
                continue
            room[node.name] = [row[0] - each.cpus, row[1] - each.gpus, row[2] - each.memory]
            running.append(replace(job, places=(Place(node.name, 1),)))
    return running


def milliseconds(decide: Callable[[], object], runs: int) -> tuple[float, float]:
    """Median and least processor time of a decision."""
    taken = []
    for _ in range(runs):
        begun = time.process_time()
        decide()
        taken.append(1e3 * (time.process_time() - begun))
    return statistics.median(taken), min(taken)


def main() -> None:
    """Print a table: median and least milliseconds for each moment and policy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--waiting", type=int, default=10_000)
    parser.add_argument("--nodes", type=int, default=1_000)
    parser.add_argument("--runs", type=int, default=7)
    options = parser.parse_args()
    rng = random.Random(1)
    nodes = [Node(f"node-{n}", Resources(96, 8, 768 * GIB)) for n in range(options.nodes)]
    waiting = [draw_job(rng, n, State.QUEUED) for n in range(options.waiting)]
    waiting.sort(key=lambda job: job.created_at)
    waiting = pickle.loads(
        pickle.dumps(waiting)
    )  # so they lie in memory as the queue reads them: in its order
    shares = {
        f"project-{n}": Share(rng.choice([1.0, 2.0, 4.0]), (rng.uniform(0, 1e9), rng.uniform(0, 1e8), 0))
        for n in range(PROJECTS)
    }
    full, soft = fill(rng, nodes, 0.0), fill(rng, nodes, 1.0)
    moments: list[tuple[str, list[Job]]] = [("full", full), ("full, preemptible", soft), ("empty", [])]
    print(
        f"{len(waiting):,} waiting jobs, {len(nodes):,} nodes; milliseconds of processor time, median (least)"
    )
    columns = ("running", "started", "stopped")
    policies = ("fair queue", "first come", "priority")
    print(f"{'moment':20}", *(f"{name:>8}" for name in columns), *(f"{name:>16}" for name in policies))
    for name, running in moments:
        decided = schedule(waiting, running, nodes, shares, NOW)
        cells = [
            "{:.1f} ({:.1f})".format(*milliseconds(decide, options.runs))
            for decide in (
                lambda running=running: schedule(waiting, running, nodes, shares, NOW),
                lambda running=running: first_come(waiting, running, nodes),
                lambda running=running: highest_priority(waiting, running, nodes),
            )
        ]
        counts = (len(running), len(decided.starts), len(decided.preemptions))
        print(
            f"{name:20} {counts[0]:8,} {counts[1]:8,} {counts[2]:8,} {cells[0]:>16} {cells[1]:>16} {cells[2]:>16}",
            flush=True,
        )


if __name__ == "__main__":
    main()
