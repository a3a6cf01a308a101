"""What projects are due of the nodes, and what they used lately: resource-seconds that decay by half in a day.

An exponential decay needs no history: one number per project and resource, and the moment that it stands for.
It is brought up to date in the transaction that ends an attempt, so it is as exact as the jobs themselves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection, Engine

from lapis.audit import AuditLog
from lapis.db import write
from lapis.errors import InputError
from lapis.jobs.job import Job
from lapis.tables.jobs import project_shares

HALF_LIFE = 86_400.0  # seconds in which used resources lose half of their weight

Amounts = tuple[float, float, float]  # of CPUs, GPUs, bytes of memory; or of those times seconds
NOTHING: Amounts = (0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Share:
    """A project's weight against the others', its decayed use, and when its first job of then was last started."""

    weight: float = 1.0
    used: Amounts = NOTHING  # resource-seconds
    first_at: float | None = None


def decayed(used: Amounts, seconds: float, half_life: float = HALF_LIFE) -> Amounts:
    """What is left of a use after so many seconds."""
    left = 0.5 ** (max(0.0, seconds) / half_life)
    return used[0] * left, used[1] * left, used[2] * left


def occupied(job: Job, now: float, half_life: float = HALF_LIFE) -> Amounts:
    """The decayed use of a job that has occupied its resources from its start until now."""
    total = job.spec.total
    seconds = occupied_seconds(0.0 if job.started_at is None else now - job.started_at, half_life)
    return total.cpus * seconds, total.gpus * seconds, total.memory * seconds


def occupied_seconds(seconds: float, half_life: float = HALF_LIFE) -> float:
    """What is left, at their end, of so many seconds of occupying one unit: the integral of the decay."""
    return half_life / math.log(2) * -math.expm1(-max(0.0, seconds) * math.log(2) / half_life)


def shares(db: Engine, now: float) -> dict[str, Share]:
    """The share of every project that has a weight or a use, decayed until now."""
    with db.connect() as connection:
        rows = connection.execute(sa.select(project_shares)).all()
    return {
        row.project_id: Share(
            row.weight,
            decayed((row.cpu_seconds, row.gpu_seconds, row.memory_byte_seconds), now - row.used_at),
            row.started_at,
        )
        for row in rows
    }


def set_weight(db: Engine, project_id: str, weight: float, actor: str, now: float) -> None:
    """Say how much a project is due against the others, which have 1. Audited. Raises InputError."""
    if not 0 < weight <= 1e6:  # NaN fails too
        raise InputError(f"A weight of {weight} cannot be used: more than 0, at most a million.")
    with write(db) as connection:
        _ensure(connection, project_id, now)
        mine = project_shares.c.project_id == project_id
        connection.execute(project_shares.update().where(mine).values(weight=weight))
        facts = {"weight": weight, "project_id": project_id}
        AuditLog(db, lambda: now).append_in(connection, actor, "share.set", project_id, facts)


def note_first_in(connection: Connection, project_id: str, now: float) -> None:
    """Note that the first of a project's waiting jobs starts, in the caller's transaction."""
    _ensure(connection, project_id, now)
    mine = project_shares.c.project_id == project_id
    connection.execute(project_shares.update().where(mine).values(started_at=now))


def add_use_in(connection: Connection, job: Job, now: float) -> None:
    """Add what an attempt that ends now has used, in the caller's transaction."""
    _ensure(connection, job.project_id, now)
    mine = project_shares.c.project_id == job.project_id
    row = connection.execute(sa.select(project_shares).where(mine).with_for_update()).one()
    before = decayed((row.cpu_seconds, row.gpu_seconds, row.memory_byte_seconds), now - row.used_at)
    cpus, gpus, memory = (old + new for old, new in zip(before, occupied(job, now), strict=True))
    values = {"cpu_seconds": cpus, "gpu_seconds": gpus, "memory_byte_seconds": memory, "used_at": now}
    connection.execute(project_shares.update().where(mine).values(**values))


def _ensure(connection: Connection, project_id: str, now: float) -> None:
    """Make the project's row if it has none: as if it had used nothing, with the weight of all others."""
    row = {"project_id": project_id, "weight": 1.0, "used_at": now}
    row |= {"cpu_seconds": 0.0, "gpu_seconds": 0.0, "memory_byte_seconds": 0.0}
    dialect = sqlite if connection.dialect.name == "sqlite" else postgresql
    connection.execute(dialect.insert(project_shares).values(**row).on_conflict_do_nothing())
