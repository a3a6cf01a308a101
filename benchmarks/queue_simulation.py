"""The fair queue on a public trace, beside first come first served and plain priority.

The trace is openb of Alibaba's GPU cluster (cluster-trace-gpu-v2023 in github.com/alibaba/clusterdata, Weng et al.,
USENIX ATC 2023): what 8,152 tasks asked for, when, and how long they ran. Used are the busiest days of it, played
several times as fast, on so many nodes of 8 GPUs that the work offered is just less than what they can do. What the
trace does not have is made up, by a fixed seed, and said here: whole GPUs (parts of one are rounded up), a day at most,
projects (runs of about 20 tasks, drawn with a probability of one over the rank), time limits (1.1 to 5 times what was
needed, in steps of 10 minutes; none for one in five), and gangs (one task in a hundred becomes 2 or 3 ranks of 8 GPUs).
Its classes of service are priorities here, and best effort may be stopped for others.

    python benchmarks/queue_simulation.py FOLDER_WITH_CSV_FILES [--days 24] [--speed 8] [--load 0.95]
"""

from __future__ import annotations

import argparse
import csv
import math
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from harness.queues import first_come, highest_priority
from harness.simulation import Decide, Decided, Task, World

from lapis.jobs.fairshare import Schedule, schedule
from lapis.jobs.job import Job, JobSpec, Node, Priority, Resources, State
from lapis.jobs.shares import Share

DAY = 86_400
GIB = 2**30
PRIORITIES = {
    "LS": Priority.HIGH,
    "Guaranteed": Priority.HIGH,
    "Burstable": Priority.NORMAL,
    "BE": Priority.LOW,
}
NODE = Resources(96, 8, 384 * GIB)
LONGEST = 86_400.0  # seconds; what ran longer (some pods ran for months) is cut off there
SMALL = 0.02  # of the work: a project that offers less is called small in the table
SHORT = 60.0  # seconds; shorter jobs count as this long in slowdowns


@dataclass(frozen=True)
class Plain:
    """What a policy without preemption says."""

    starts: Mapping[str, Mapping[str, int]]
    preemptions: Mapping[str, str] = field(default_factory=dict)
    firsts: frozenset[str] = frozenset()


def read_tasks(folder: Path, days: float, projects: int, speed: float) -> list[Task]:
    """The tasks of the trace's busiest days, as jobs that arrive so many times as fast."""
    with (folder / "openb_pod_list_default.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["scheduled_time"] and row["deletion_time"]]
    rows.sort(key=lambda row: int(row["creation_time"]))
    created = [int(row["creation_time"]) for row in rows]
    starts = range(0, created[-1] - int(days * DAY) + DAY, DAY // 2)
    begin = max(starts, key=lambda at: sum(at <= when < at + days * DAY for when in created))
    rng = random.Random(1)
    weights = [1 / (rank + 1) for rank in range(projects)]
    tasks, project = [], 0
    for row in rows:
        if rng.random() < 1 / 20:
            project = rng.choices(range(projects), weights)[0]
        if begin <= int(row["creation_time"]) < begin + days * DAY:
            at = (int(row["creation_time"]) - begin) / speed
            tasks.append(_task(row, rng, f"project-{project:02}", at))
    return tasks


def _task(row: Mapping[str, str], rng: random.Random, project: str, created: float) -> Task:
    gpus, ranks = int(row["num_gpu"]), 1
    cpus, memory = int(row["cpu_milli"]) / 1000, int(row["memory_mib"]) << 20
    if rng.random() < 0.01:
        gpus, ranks, cpus, memory = 8, rng.choice([2, 3]), 64.0, 256 * GIB
    each = Resources(min(cpus, NODE.cpus), gpus, min(memory, NODE.memory))
    seconds = min(float(max(1, int(row["deletion_time"]) - int(row["scheduled_time"]))), LONGEST)
    limit = None if rng.random() < 0.2 else math.ceil(seconds * rng.uniform(1.1, 5) / 600) * 600.0
    spec = JobSpec("openb", ("run",), each, {}, 1, ranks, PRIORITIES[row["qos"]], limit, row["qos"] == "BE")
    job = Job(
        row["name"], project, spec, State.QUEUED, "", 0, 0, None, None, None, None, created, "", None, None
    )
    return Task(job, seconds)


def gpu_seconds(task: Task) -> float:
    """What a task occupies."""
    return task.job.spec.total.gpus * task.seconds


class Watch:
    """What is measured while the simulation runs."""

    def __init__(self, nodes: Sequence[Node], until: float) -> None:
        self.gpus = sum(node.resources.gpus for node in nodes)
        self.until = until
        self.held: dict[str, float] = defaultdict(float)  # GPU-seconds held while jobs of the project waited
        self.waited: dict[str, float] = defaultdict(float)
        self.busy = 0.0
        self.told: dict[str, tuple[float, float]] = {}
        self.decisions: list[float] = []
        self._last: tuple[float, set[str], dict[str, int]] | None = None

    def see(self, world: World, decided: Decided) -> None:
        """Count what was so since the last decision."""
        if self._last is not None:
            at, waiting, held = self._last
            seconds = max(0.0, min(world.now, self.until) - at)
            self.busy += seconds * sum(held.values())
            for project in waiting:
                self.waited[project] += seconds
                self.held[project] += seconds * held[project]
        left = {job.project_id for job in world.waiting.values() if job.id not in decided.starts}
        held_now: dict[str, int] = defaultdict(int)
        for job in world.active.values():
            held_now[job.project_id] += job.spec.total.gpus
        for job_id in decided.starts:
            job = world.waiting[job_id]
            held_now[job.project_id] += job.spec.total.gpus
        self._last = (world.now, left, held_now)
        if isinstance(decided, Schedule) and any(
            job_id not in self.told for job_id in world.waiting if job_id not in decided.starts
        ):
            for job_id, wait in decided.waits.items():
                if wait.likely_start is not None:
                    self.told.setdefault(job_id, (world.now, wait.likely_start))


def jain(values: Sequence[float]) -> float:
    """Jain's index: 1 when all are equal, one over their number when one has all."""
    return sum(values) ** 2 / (len(values) * sum(value * value for value in values)) if any(values) else 1.0


def quantile(values: Sequence[float], part: float) -> float:
    """The value below which this part of all lies."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))]


def report(name: str, tasks: Sequence[Task], watch: Watch, small: set[str], seconds: float) -> None:
    """A row of the table."""
    waits = {task.job.id: (task.first_start or 0.0) - task.job.created_at for task in tasks}
    of_small = [waits[task.job.id] for task in tasks if task.job.project_id in small]
    slow: dict[str, list[float]] = defaultdict(list)
    for task in tasks:
        assert task.end is not None
        slow[task.job.project_id].append((task.end - task.job.created_at) / max(task.seconds, SHORT))
    worst = max(statistics.mean(of) for of in slow.values())
    shares = [watch.held[project] / waited for project, waited in watch.waited.items() if waited > 3600]
    minutes = [f"{value / 60:,.0f}" for value in (
        quantile(list(waits.values()), 0.5), quantile(list(waits.values()), 0.95),
        quantile(of_small, 0.5), quantile(of_small, 0.95), max(waits.values()),
    )]  # fmt: skip
    used = watch.busy / (watch.gpus * watch.until)
    stops = sum(task.stops for task in tasks)
    cells = [name, f"{used:.3f}", f"{jain(shares):.2f}", f"{worst:,.0f}", *minutes, f"{stops:,}"]
    print("| " + " | ".join(cells) + f" |   ({seconds:.0f} s)", flush=True)
    if watch.told:
        errors = [abs((waits[i] + _created(tasks, i)) - likely) / 60 for i, (_, likely) in watch.told.items()]
        early = [likely - told for told, likely in watch.told.values()]
        print(
            f"  likely start, told when a job first waited: median error {quantile(errors, 0.5):,.0f} min, "
            f"p90 {quantile(errors, 0.9):,.0f} min; median told {quantile(early, 0.5) / 60:,.0f} min ahead"
        )


def _created(tasks: Sequence[Task], job_id: str) -> float:
    return next(task.job.created_at for task in tasks if task.job.id == job_id)


def policies(nodes: Sequence[Node]) -> dict[str, Decide]:
    """The queue policies by name."""

    def fair(
        waiting: Sequence[Job], active: Sequence[Job], shares: Mapping[str, Share], now: float
    ) -> Decided:
        return schedule(waiting, active, nodes, shares, now)

    def plain(order: Callable[..., dict[str, dict[str, int]]], backfill: bool) -> Decide:
        return lambda waiting, active, shares, now: Plain(order(waiting, active, nodes, backfill))

    return {
        "first come, first served": plain(first_come, False),
        "the same, passing over what does not fit": plain(first_come, True),
        "priority": plain(highest_priority, False),
        "priority, passing over": plain(highest_priority, True),
        "**fair queue**": fair,
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--days", type=float, default=24, help="of the trace")
    parser.add_argument("--speed", type=float, default=8, help="how many times as fast they arrive")
    parser.add_argument("--load", type=float, default=0.95)
    parser.add_argument("--projects", type=int, default=20)
    parser.add_argument("--interval", type=float, default=60.0, help="seconds between decisions")
    options = parser.parse_args()
    tasks = read_tasks(options.folder, options.days, options.projects, options.speed)
    until = options.days * DAY / options.speed
    work = sum(gpu_seconds(task) for task in tasks)
    nodes = [Node(f"node-{n}", NODE) for n in range(max(3, math.ceil(work / until / 8 / options.load)))]
    offered: dict[str, float] = defaultdict(float)
    for task in tasks:
        offered[task.job.project_id] += gpu_seconds(task) / work
    small = {project for project, part in offered.items() if part < SMALL}
    of_small = sum(task.job.project_id in small for task in tasks)
    print(
        f"{len(tasks):,} tasks of {len(offered)} projects in {until / DAY:g} days on {len(nodes)} nodes "
        f"({8 * len(nodes)} GPUs); offered {work / until / 8 / len(nodes):.2f}; "
        f"{len(small)} small projects with {of_small} tasks"
    )
    print(
        "| queue | GPUs used | Jain | worst slowdown | wait p50 | p95 | small p50 | p95 | longest | stops |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name, decide in policies(nodes).items():
        fresh = [Task(task.job, task.seconds) for task in tasks]
        watch = Watch(nodes, until)
        begun = time.monotonic()
        done = World(fresh, nodes, options.interval).run(decide, watch.see)
        report(name, done, watch, small, time.monotonic() - begun)


if __name__ == "__main__":
    main()
