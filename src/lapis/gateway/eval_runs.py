"""Runs of evals: who works on one (a lease), what came of each item, and how they count together.

An item counts once it is in the database: its row and the run's counts change in one transaction, which only the
holder of the lease can make. A server that is killed loses the items that it had not recorded, nothing else.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine, Row

from lapis.db import write
from lapis.errors import ConflictError, NotFoundError
from lapis.gateway.evals import Eval
from lapis.gateway.on_behalf import kept
from lapis.gateway.paging import Order, page
from lapis.tables.evals import eval_items, eval_runs, evals
from lapis.tenants.keys import Identity

LEASE_SECONDS = 30.0
OPEN = ("queued", "in_progress")
RunStatus = Literal["queued", "in_progress", "completed", "canceled", "failed"]
ItemStatus = Literal["pass", "fail", "error"]


@dataclass(frozen=True)
class Used:
    """What one model has read and written in a run."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    invocation_count: int = 0

    def __add__(self, other: Used) -> Used:
        """Both together."""
        mine, others = vars(self), vars(other)
        return Used(**{name: mine[name] + others[name] for name in mine})


@dataclass(frozen=True)
class Counts:
    """How the items of a run came out; `criteria` has passed and failed for each testing criterion."""

    passed: int = 0
    failed: int = 0
    errored: int = 0
    criteria: Sequence[Sequence[int]] = ()
    usage: Mapping[str, Used] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Items that were executed."""
        return self.passed + self.failed + self.errored

    def plus(self, item: ItemResult) -> Counts:
        """With one item more."""
        criteria = [list(pair) for pair in self.criteria]
        for pair, result in zip(criteria, item.results, strict=False):
            pair[0 if result["passed"] else 1] += 1
        usage = dict(self.usage)
        for model, used in item.usage.items():
            usage[model] = usage.get(model, Used()) + used
        return Counts(
            self.passed + (item.status == "pass"),
            self.failed + (item.status == "fail"),
            self.errored + (item.status == "error"),
            criteria,
            usage,
        )

    def to_json(self) -> str:
        """As text, for `read_counts`."""
        return json.dumps({**vars(self), "usage": {model: vars(used) for model, used in self.usage.items()}})


def read_counts(text: str) -> Counts:
    """Counts from their text."""
    facts = json.loads(text)
    return Counts(**{**facts, "usage": {model: Used(**used) for model, used in facts["usage"].items()}})


@dataclass(frozen=True)
class EvalRun:
    """A run; `total` items are to be executed, `counts` says how many were."""

    id: str
    project_id: str
    eval_id: str
    name: str
    status: RunStatus
    created_at: float
    total: int
    identity: str
    counts: Counts
    data_source: Mapping[str, Any]
    metadata: Mapping[str, str]
    error: Mapping[str, str] | None = None
    lease: str | None = None


@dataclass(frozen=True)
class ItemResult:
    """One item: the data, what the model made of it, what each testing criterion says, and the tokens of it."""

    number: int
    status: ItemStatus
    item: Mapping[str, Any]
    sample: Mapping[str, Any]
    results: Sequence[Mapping[str, Any]]
    usage: Mapping[str, Used] = field(default_factory=dict)


@dataclass(frozen=True)
class OutputItem:
    """An item that was recorded."""

    id: str
    run_id: str
    number: int
    status: ItemStatus
    created_at: float
    body: Mapping[str, Any]


class EvalRuns:
    """The eval runs of an installation. All methods block."""

    def __init__(self, db: Engine, clock: Callable[[], float] = time.time) -> None:
        self.db = db
        self.clock = clock

    def create(
        self,
        identity: Identity,
        made_of: Eval,
        name: str | None,
        metadata: Mapping[str, str],
        data_source: Mapping[str, Any],
        total: int,
    ) -> EvalRun:
        """Queue a run. Raises NotFoundError if the eval was deleted meanwhile."""
        id = f"evalrun_{secrets.token_hex(12)}"
        counts = Counts(criteria=[(0, 0)] * len(made_of.testing_criteria))
        row = {
            "id": id, "project_id": made_of.project_id, "eval_id": made_of.id, "name": name or id,
            "status": "queued", "created_at": self.clock(), "total": total, "identity": json.dumps(kept(identity)),
            "body": json.dumps({"data_source": data_source, "metadata": metadata}), "counts": counts.to_json(),
        }  # fmt: skip
        with write(self.db, lock=f"eval:{made_of.id}") as connection:
            if connection.execute(sa.select(evals.c.id).where(evals.c.id == made_of.id)).first() is None:
                raise NotFoundError(f"There is no eval {made_of.id!r} here.", param="eval_id")
            connection.execute(eval_runs.insert().values(**row))
            return _found(connection, made_of.project_id, made_of.id, id)

    def get(self, project_id: str, eval_id: str, id: str) -> EvalRun:
        """A run. Raises NotFoundError."""
        with self.db.connect() as connection:
            return _found(connection, project_id, eval_id, id)

    def list(
        self,
        project_id: str,
        eval_id: str,
        *,
        status: str | None,
        after: str | None,
        limit: int,
        order: Order,
    ) -> tuple[list[EvalRun], bool]:
        """A page of an eval's runs, and whether more follow. Raises InputError for an unknown `after`."""
        mine = _mine(project_id, eval_id)
        if status is not None:
            mine = mine.where(eval_runs.c.status == status)
        with self.db.connect() as connection:
            found = page(connection, mine, eval_runs, after=after, limit=limit, order=order)
        return [_run(row) for row in found.rows], found.has_more

    def recent(self, project_id: str, limit: int) -> Sequence[tuple[EvalRun, str]]:
        """The last runs of all of a project's evals, the newest first, each with its eval's name."""
        mine = sa.select(eval_runs, evals.c.name.label("eval_name")).join(evals)
        newest = (eval_runs.c.created_at.desc(), eval_runs.c.id.desc())
        query = mine.where(evals.c.project_id == project_id).order_by(*newest).limit(limit)
        with self.db.connect() as connection:
            return [(_run(row), row.eval_name) for row in connection.execute(query)]

    def cancel(self, project_id: str, eval_id: str, id: str) -> EvalRun:
        """End a run; what it has recorded stays. Raises NotFoundError, ConflictError if it has ended already."""
        with write(self.db, lock=f"evalrun:{id}") as connection:
            run = _found(connection, project_id, eval_id, id)
            if run.status not in (*OPEN, "canceled"):
                raise ConflictError(f"The run {id} is {run.status}; only one that goes on can be canceled.")
            _set(connection, id, status="canceled", lease=None, lease_until=None)
            return _found(connection, project_id, eval_id, id)

    def delete(self, project_id: str, eval_id: str, id: str) -> None:
        """Remove a run with its items; one under way ends. Raises NotFoundError."""
        with write(self.db, lock=f"evalrun:{id}") as connection:
            _found(connection, project_id, eval_id, id)
            connection.execute(eval_items.delete().where(eval_items.c.run_id == id))
            connection.execute(eval_runs.delete().where(eval_runs.c.id == id))

    def items(
        self, run: EvalRun, *, status: str | None, after: str | None, limit: int, order: Order
    ) -> tuple[Sequence[OutputItem], bool]:
        """A page of a run's items, and whether more follow. Raises InputError for an unknown `after`."""
        mine = sa.select(eval_items).where(eval_items.c.run_id == run.id)
        if status is not None:
            mine = mine.where(eval_items.c.status == status)
        with self.db.connect() as connection:
            found = page(connection, mine, eval_items, after=after, limit=limit, order=order, by="number")
        return [_item(row) for row in found.rows], found.has_more

    def item(self, run: EvalRun, id: str) -> OutputItem:
        """An item of a run. Raises NotFoundError."""
        mine = sa.select(eval_items).where(eval_items.c.run_id == run.id, eval_items.c.id == id)
        with self.db.connect() as connection:
            row = connection.execute(mine).one_or_none()
        if row is None:
            raise NotFoundError(f"There is no output item {id!r} in this run.", param="output_item_id")
        return _item(row)

    def claim(self) -> EvalRun | None:
        """A run that nobody works on, with a lease of its own; None where there is none.

        It is the oldest one of the project that has the fewest under way.
        """
        now, columns = self.clock(), eval_runs.c
        free = columns.lease_until.is_(None) | (columns.lease_until < now)
        others = eval_runs.alias()
        theirs = others.c.project_id == columns.project_id
        busy = sa.select(sa.func.count()).where(theirs, others.c.lease_until >= now).scalar_subquery()
        waiting = (
            sa.select(columns.id).where(columns.status.in_(OPEN), free).order_by(busy, columns.created_at)
        )
        with self.db.connect() as connection:  # nothing is locked while there is nothing to do
            if connection.execute(waiting.limit(1)).first() is None:
                return None
        with write(self.db, lock="evalruns") as connection:
            row = connection.execute(waiting.limit(1)).first()
            if row is None:
                return None
            lease = secrets.token_hex(8)
            _set(connection, row.id, status="in_progress", lease=lease, lease_until=now + LEASE_SECONDS)
            found = connection.execute(sa.select(eval_runs).where(columns.id == row.id)).one()
        return _run(found)

    def is_mine(self, run: EvalRun) -> bool:
        """Whether a run is still this lease's: it was not canceled, deleted or taken over."""
        mine = sa.select(eval_runs.c.id).where(_leased(run))
        with self.db.connect() as connection:
            return connection.execute(mine).first() is not None

    def renew(self, run: EvalRun) -> bool:
        """Keep a lease for as long again; False where it was lost."""
        with write(self.db, lock=f"evalrun:{run.id}") as connection:
            until = self.clock() + LEASE_SECONDS
            return bool(
                connection.execute(eval_runs.update().where(_leased(run)).values(lease_until=until)).rowcount
            )

    def release(self, run: EvalRun, seconds: float = 0.0) -> None:
        """Give a lease back: any server may go on with the run, at once or after so many seconds."""
        until = self.clock() + seconds if seconds else None
        with write(self.db, lock=f"evalrun:{run.id}") as connection:
            connection.execute(eval_runs.update().where(_leased(run)).values(lease=None, lease_until=until))

    def recorded(self, run: EvalRun) -> set[int]:
        """The numbers of the items that are done."""
        numbers = sa.select(eval_items.c.number).where(eval_items.c.run_id == run.id)
        with self.db.connect() as connection:
            return set(connection.execute(numbers).scalars())

    def record(self, run: EvalRun, item: ItemResult) -> None:
        """Write an item down and count it. Raises ConflictError where the lease was lost."""
        body = {"item": item.item, "sample": item.sample, "results": item.results}
        with write(self.db, lock=f"evalrun:{run.id}") as connection:
            mine = sa.select(eval_runs.c.counts).where(_leased(run)).with_for_update()
            row = connection.execute(mine).one_or_none()
            if row is None:
                raise ConflictError(f"The run {run.id} is no longer ours.")
            connection.execute(
                eval_items.insert().values(
                    id=f"outputitem_{secrets.token_hex(12)}",
                    run_id=run.id,
                    number=item.number,
                    status=item.status,
                    created_at=self.clock(),
                    body=json.dumps(body),
                )
            )
            _set(connection, run.id, counts=read_counts(row.counts).plus(item).to_json())

    def finish(self, run: EvalRun, status: RunStatus, error: Mapping[str, str] | None = None) -> None:
        """End a run, if the lease is still ours."""
        told = None if error is None else json.dumps(error)
        with write(self.db, lock=f"evalrun:{run.id}") as connection:
            ended = eval_runs.update().where(_leased(run))
            connection.execute(ended.values(status=status, error=told, lease=None, lease_until=None))


def _mine(project_id: str, eval_id: str) -> sa.Select[Any]:
    columns = eval_runs.c
    return sa.select(eval_runs).where(columns.project_id == project_id, columns.eval_id == eval_id)


def _leased(run: EvalRun) -> sa.ColumnElement[bool]:
    columns = eval_runs.c
    return sa.and_(columns.id == run.id, columns.lease == run.lease, columns.status == "in_progress")


def _set(connection: Connection, id: str, **values: Any) -> None:
    connection.execute(eval_runs.update().where(eval_runs.c.id == id).values(**values))


def _found(connection: Connection, project_id: str, eval_id: str, id: str) -> EvalRun:
    row = connection.execute(_mine(project_id, eval_id).where(eval_runs.c.id == id)).one_or_none()
    if row is None:
        raise NotFoundError(f"There is no run {id!r} of an eval {eval_id!r} here.", param="run_id")
    return _run(row)


def _run(row: Row[Any]) -> EvalRun:
    body = json.loads(row.body)
    return EvalRun(
        row.id, row.project_id, row.eval_id, row.name, row.status, row.created_at, row.total, row.identity,
        read_counts(row.counts), body["data_source"], body["metadata"],
        None if row.error is None else json.loads(row.error), row.lease,
    )  # fmt: skip


def _item(row: Row[Any]) -> OutputItem:
    return OutputItem(row.id, row.run_id, row.number, row.status, row.created_at, json.loads(row.body))
