"""The sums that limits are decided by: what a project, and each model in it, used in a UTC minute or day.

A model is named by its family here: its versions and checkpoints are counted together (policy.family).
All functions work in the ledger's transactions; only the ledger writes.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from lapis.errors import ConflictError, NotFoundError
from lapis.prepared import Prepared
from lapis.tables.tenants import model_limits, organizations, projects
from lapis.tables.usage import open_reservations, usage_windows
from lapis.tenants.quota import CENT, DAY, MINUTE, Consumption, Quota, month_start

KEEP = {MINUTE: 2 * DAY, DAY: 62 * DAY}  # seconds; older sums decide nothing any more
NO_WINDOW = -1  # no window begins there
ONGOING = 2**31 - 1  # the day of what running jobs have reserved: it belongs to every month until they end
PER_MODEL = (
    "requests_per_minute", "tokens_per_minute", "tokens_per_day", "requests_per_day", "concurrent_requests",
    "batch_tokens_per_day",
)  # fmt: skip

_windows, _opened = usage_windows.c, open_reservations.c


def _current(project: sa.ColumnElement[str]) -> sa.ColumnElement[bool]:
    """The four windows of a request, each by its whole key: so SQLite looks them up, and reads no others."""
    models: tuple[Any, Any] = ("", sa.bindparam("of_model"))
    return sa.or_(
        *(
            (_windows.project_id == project)
            & (_windows.model == model)
            & (_windows.seconds == seconds)
            & (_windows.start == sa.bindparam(name))
            for model in models
            for seconds, name in ((MINUTE, "minute"), (DAY, "day"))
        )
    )


_STANDING = Prepared(  # a project's limits and the model's, and what was used in the current windows of both
    sa.select(
        projects,
        organizations.c.spend_per_month.label("organization_spend"),
        model_limits.c.model.label("limited_model"),
        *(model_limits.c[name].label(f"model_{name}") for name in PER_MODEL),
        _windows.model, _windows.seconds, _windows.requests, _windows.tokens, _windows.batch_tokens,
    )
    .join_from(projects, organizations)
    .outerjoin(
        model_limits,
        (model_limits.c.project_id == projects.c.id) & (model_limits.c.model == sa.bindparam("of_model")),
    )
    .outerjoin(usage_windows, _current(projects.c.id))
    .where(projects.c.id == sa.bindparam("project"))
)  # fmt: skip
_COUNT = Prepared(
    usage_windows.update()
    .where(_current(sa.bindparam("project")))
    .values(
        requests=_windows.requests + sa.bindparam("more_requests"),
        tokens=_windows.tokens + sa.bindparam("more_tokens"),
        batch_tokens=_windows.batch_tokens + sa.bindparam("more_batch_tokens"),
        cost=_windows.cost + sa.bindparam("more_cost"),
        gpu_ms=_windows.gpu_ms + sa.bindparam("more_gpu_ms"),
    )
)


@dataclass(frozen=True)
class Change:
    """What is added to the windows of one project and model that lie around a moment."""

    project_id: str
    model: str  # empty: to the project's only
    at: float
    requests: int = 0
    tokens: int = 0
    batch_tokens: int = 0
    cost: int = 0
    gpu_ms: int = 0
    minute: bool = True  # a batch's requests do not count for the minute


@dataclass(frozen=True)
class Standing:
    """The limits that a request of a project to a model meets, and what is used of each."""

    quota: Quota
    used: Consumption
    model_quota: Quota | None
    model_used: Consumption
    organization_quota: Quota | None
    organization_used: Consumption


@dataclass(frozen=True)
class WorkLeft:
    """What the jobs of a project may still use this month; None: no limit. Money is in NANO, below 0 if overdrawn."""

    organization_id: str
    gpu_seconds: float | None
    cost: int | None
    organization_cost: int | None


def standing(connection: Connection, project_id: str, model: str, now: float) -> Standing:
    """Read by one query, and one more for each limit on what runs or on money that is set.

    Raises NotFoundError for the project, ConflictError for one that is archived.
    """
    where = {"project": project_id, "of_model": model, "minute": start(now, MINUTE), "day": start(now, DAY)}
    rows = _STANDING.rows(connection, where)
    if not rows:
        raise NotFoundError(f"There is no project {project_id!r}.")
    first = rows[0]
    if first.archived_at is not None:
        raise ConflictError(f"The project {project_id} is archived.")
    found = {(row.model, row.seconds): row for row in rows if row.seconds is not None}
    quota, model_quota, organization_quota = quota_of(first), None, None
    used, model_used, organization_used = _used(found, ""), Consumption(), Consumption()
    if quota.concurrent_requests is not None or quota.spend_per_month is not None:
        used = _extended(connection, project_id, quota, used, now)
    model_used = _used(found, model) if model else model_used
    if first.limited_model is not None:
        model_quota = Quota(**{name: getattr(first, f"model_{name}") for name in PER_MODEL})
        if model_quota.concurrent_requests is not None:
            model_used = _replaced(model_used, running=running(connection, project_id, now, model))
    if first.organization_spend is not None:
        organization_quota = Quota(spend_per_month=first.organization_spend)
        spent = month_sums(connection, now, organization_id=first.organization_id)[0]
        organization_used = Consumption(spend_month=spent)
    return Standing(quota, used, model_quota, model_used, organization_quota, organization_used)


def count(connection: Connection, change: Change) -> None:
    """Add to the windows around `change.at`; those that are not there yet are made if a request is counted."""
    where = {
        "project": change.project_id,
        "of_model": change.model,
        "minute": start(change.at, MINUTE) if change.minute else NO_WINDOW,
        "day": start(change.at, DAY),
    }
    more = {
        "more_requests": change.requests,
        "more_tokens": change.tokens,
        "more_batch_tokens": change.batch_tokens,
        "more_cost": change.cost,
        "more_gpu_ms": change.gpu_ms,
    }
    there = _COUNT.run(connection, {**where, **more})
    wanted = (1 if not change.model else 2) * (2 if change.minute else 1)
    if there < wanted and (change.requests or change.gpu_ms or change.cost > 0):
        _begin(connection, change)


def hold(connection: Connection, project_id: str, cost: int) -> None:
    """Add to what a project's running jobs have reserved; below 0 to give it back."""
    key = {"project_id": project_id, "model": "", "seconds": DAY, "start": ONGOING}
    mine = sa.and_(*(_windows[name] == value for name, value in key.items()))
    if not connection.execute(usage_windows.update().where(mine).values(cost=_windows.cost + cost)).rowcount:
        nothing = dict.fromkeys(("requests", "tokens", "batch_tokens", "gpu_ms"), 0)
        connection.execute(usage_windows.insert().values(**key, **nothing, cost=cost))


def running(connection: Connection, project_id: str, now: float, model: str | None = None) -> int:
    """How many requests of a project, or to one model and its versions, have begun and not ended."""
    mine = (_opened.project_id == project_id) & (_opened.expires_at > now)
    if model is not None:
        # Each with its version or checkpoint; LIKE would take capitals for small letters on SQLite.
        versions = sa.func.substr(_opened.model, 1, len(model) + 1) == f"{model}:"
        mine &= (_opened.model == model) | versions
    found = connection.execute(sa.select(sa.func.count()).select_from(open_reservations).where(mine)).scalar()
    return int(found or 0)


def month_sums(
    connection: Connection, now: float, *, project_id: str | None = None, organization_id: str | None = None
) -> tuple[int, int]:
    """Cost (in NANO) and GPU milliseconds since the UTC month began, what is reserved among them."""
    query = sa.select(sa.func.sum(_windows.cost), sa.func.sum(_windows.gpu_ms)).where(
        _windows.model == "", _windows.seconds == DAY, _windows.start >= month_start(now)
    )
    if project_id is not None:
        query = query.where(_windows.project_id == project_id)
    if organization_id is not None:
        mine = sa.select(projects.c.id).where(projects.c.organization_id == organization_id)
        query = query.where(_windows.project_id.in_(mine))
    cost, gpu_ms = connection.execute(query).one()
    return int(cost or 0), int(gpu_ms or 0)


def work_left(connection: Connection, now: float) -> dict[str, WorkLeft]:
    """What is left this month for the jobs of projects with a limit on GPU time or money, their own or above them.

    What running jobs have reserved is not taken off: who asks knows them, and what they may use by now.
    """
    of_project, of_all = projects.c.spend_per_month, organizations.c.spend_per_month
    limits = (projects.c.gpu_seconds_per_month, of_project, of_all)
    limited = (
        sa.select(projects.c.id, projects.c.organization_id, *limits[:2], of_all.label("organization_spend"))
        .join_from(projects, organizations)
        .where(sa.or_(*(limit.is_not(None) for limit in limits)))
    )
    rows = connection.execute(limited).all()
    if not rows:
        return {}
    used = {
        row.project_id: (int(row.cost), int(row.gpu_ms))
        for row in connection.execute(
            sa.select(
                _windows.project_id,
                sa.func.sum(_windows.cost).label("cost"),
                sa.func.sum(_windows.gpu_ms).label("gpu_ms"),
            )
            .where(_windows.model == "", _windows.seconds == DAY, _windows.start >= month_start(now))
            .where(_windows.start < ONGOING)
            .group_by(_windows.project_id)
        )
    }
    spent: Counter[str] = Counter()
    for row in rows:
        spent[row.organization_id] += used.get(row.id, (0, 0))[0]
    found = {}
    for row in rows:
        cost, gpu_ms = used.get(row.id, (0, 0))
        gpus, mine, whole = row.gpu_seconds_per_month, row.spend_per_month, row.organization_spend
        found[row.id] = WorkLeft(
            row.organization_id,
            None if gpus is None else gpus - gpu_ms / 1000,
            None if mine is None else mine * CENT - cost,
            None if whole is None else whole * CENT - spent[row.organization_id],
        )
    return found


def quota_of(row: Any) -> Quota:
    """The limits in a row of `projects`."""
    return Quota(
        **{name: getattr(row, name) for name in PER_MODEL},
        spend_per_month=row.spend_per_month,
        gpu_seconds_per_month=row.gpu_seconds_per_month,
        storage_bytes=row.storage_bytes,
    )


def start(now: float, seconds: int) -> int:
    """When the window of so many seconds around `now` began."""
    return int(now // seconds) * seconds


def _used(found: dict[tuple[str, int], Any], model: str) -> Consumption:
    minute, day = found.get((model, MINUTE)), found.get((model, DAY))
    return Consumption(
        requests_minute=minute.requests if minute else 0,
        tokens_minute=minute.tokens if minute else 0,
        tokens_day=day.tokens if day else 0,
        requests_day=day.requests if day else 0,
        batch_tokens_day=day.batch_tokens if day else 0,
    )


def _extended(
    connection: Connection, project_id: str, quota: Quota, used: Consumption, now: float
) -> Consumption:
    more: dict[str, int] = {}
    if quota.concurrent_requests is not None:
        more["running"] = running(connection, project_id, now)
    if quota.spend_per_month is not None:
        more["spend_month"] = month_sums(connection, now, project_id=project_id)[0]
    return _replaced(used, **more)


def _replaced(used: Consumption, **more: int) -> Consumption:
    return Consumption(**{**vars(used), **more})


def _begin(connection: Connection, change: Change) -> None:
    """Make the windows that are missing, with the change in them; forget those long past."""
    for model in {"", change.model}:
        for seconds in (MINUTE, DAY) if change.minute else (DAY,):
            begun = start(change.at, seconds)
            mine = (
                (_windows.project_id == change.project_id)
                & (_windows.model == model)
                & (_windows.seconds == seconds)
            )
            if connection.execute(sa.select(_windows.start).where(mine, _windows.start == begun)).first():
                continue
            values = {
                "requests": change.requests, "tokens": change.tokens, "batch_tokens": change.batch_tokens,
                "cost": change.cost, "gpu_ms": change.gpu_ms,
            }  # fmt: skip
            key = {"project_id": change.project_id, "model": model, "seconds": seconds, "start": begun}
            connection.execute(usage_windows.insert().values(**key, **values))
            connection.execute(usage_windows.delete().where(mine, _windows.start < begun - KEEP[seconds]))
