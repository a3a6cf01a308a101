"""`lapis cluster`: what an administrator of a cluster needs: accounts, usage, manifests."""

from __future__ import annotations

import time
from dataclasses import asdict

import click

from lapis.cli.output import json_option, print_json, print_table, say

DAY = 86_400


@click.group()
def group() -> None:
    """Slurm's accounts and usage, Kubernetes' manifests (cluster.toml in the home says which cluster)."""


@group.command()
def accounts() -> None:
    """Print the sacctmgr commands that give every project's account its share; pipe them into sh."""
    import shlex

    from lapis.audit import os_user
    from lapis.db import open_database
    from lapis.errors import ConfigError
    from lapis.home import Home
    from lapis.jobs.cluster import FILE, load_cluster
    from lapis.jobs.shares import Share, shares
    from lapis.jobs.slurm import account_commands
    from lapis.tenants.tenant import Tenants

    home = Home.default()
    db = open_database(home.database_url)
    tenants, known = Tenants(db), shares(db, time.time())
    projects = [project.id for owner in tenants.organizations() for project in tenants.projects(owner.id)]
    weights = {project: known.get(project, Share()).weight for project in projects}
    user = os_user().removeprefix("os:")
    commands = account_commands(load_cluster(home).slurm, weights, user)
    if not commands:
        raise ConfigError(
            f"No account of Slurm is named: [slurm] in {home.root / FILE} needs account or accounts.",
            hint="docs/jobs.md shows one.",
        )
    for command in commands:
        say(shlex.join(command))


@group.command()
@click.option("--days", type=click.FloatRange(min=0, min_open=True), default=30.0, show_default=True)
@json_option
def usage(days: float, as_json: bool) -> None:
    """Show what jobs had of Slurm's cluster, by project, as Slurm accounts it."""
    from lapis.db import open_database
    from lapis.home import Home
    from lapis.jobs.cluster import load_cluster
    from lapis.jobs.executors.slurm import SlurmExecutor
    from lapis.jobs.queue import JobQueue

    home = Home.default()
    uses = SlurmExecutor(home.jobs, load_cluster(home).slurm).usage(time.time() - days * DAY)
    projects = {job.id: job.project_id for job in JobQueue(open_database(home.database_url)).list()}
    if as_json:
        print_json([{**asdict(use), "project_id": projects.get(use.job_id)} for use in uses])
        return
    sums: dict[tuple[str, str], list[float]] = {}
    for use in uses:
        row = sums.setdefault((projects.get(use.job_id, "unknown"), use.account), [0, 0.0, 0.0])
        row[0] += 1
        row[1] += use.cpu_seconds / 3600
        row[2] += use.gpu_seconds / 3600
    rows = [
        (*names, f"{count:,}", f"{cpus:,.2f}", f"{gpus:,.2f}")
        for names, (count, cpus, gpus) in sorted(sums.items())
    ]
    print_table(("project", "account", "attempts", "CPU hours", "GPU hours"), rows, "No job had anything.")


@group.command()
@click.argument("job_id", metavar="JOB")
def manifest(job_id: str) -> None:
    """Print a job as a Kubernetes manifest: a Job, or of several ranks a JobSet, for a queue of Kueue."""
    from lapis.db import open_database
    from lapis.errors import ConfigError
    from lapis.home import Home
    from lapis.jobs.cluster import FILE, load_cluster
    from lapis.jobs.executors import kubernetes
    from lapis.jobs.queue import JobQueue

    home = Home.default()
    section = load_cluster(home).kubernetes
    if section is None:
        raise ConfigError(
            f"{home.root / FILE} has no [kubernetes]: image, queue and volume are needed.",
            hint="docs/jobs.md shows one.",
        )
    job = JobQueue(open_database(home.database_url)).get(job_id)
    print_json(kubernetes.manifest(job, section))
