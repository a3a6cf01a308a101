"""Evals: which data is measured, and by which graders. Nobody sees those of another project."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine, Row

from lapis.db import write
from lapis.errors import NotFoundError
from lapis.evaluate.graders.grader import Single, read_grader, singles
from lapis.gateway.paging import Order, page
from lapis.tables.evals import eval_items, eval_runs, evals


@dataclass(frozen=True)
class Eval:
    """An eval as it was asked for; `testing_criteria` are graders."""

    id: str
    project_id: str
    name: str
    created_at: float
    updated_at: float
    item_schema: Mapping[str, Any]
    with_sample: bool
    testing_criteria: Sequence[Mapping[str, Any]]
    metadata: Mapping[str, str]

    def graders(self) -> list[Single]:
        """The testing criteria, to grade with."""
        return [grader for criterion in self.testing_criteria for grader in singles(read_grader(criterion))]


class EvalStore:
    """The evals of an installation. All methods block."""

    def __init__(self, db: Engine, clock: Callable[[], float] = time.time) -> None:
        self.db = db
        self.clock = clock

    def create(
        self,
        project_id: str,
        name: str | None,
        item_schema: Mapping[str, Any],
        with_sample: bool,
        testing_criteria: Sequence[Mapping[str, Any]],
        metadata: Mapping[str, str],
    ) -> Eval:
        """Keep an eval; without a name it is called by its id."""
        now, id = self.clock(), f"eval_{secrets.token_hex(12)}"
        made = Eval(
            id, project_id, name or id, now, now, item_schema, with_sample, testing_criteria, metadata
        )
        with write(self.db) as connection:
            connection.execute(evals.insert().values(**_row(made)))
        return made

    def get(self, project_id: str, id: str) -> Eval:
        """An eval. Raises NotFoundError."""
        with self.db.connect() as connection:
            return _found(connection, project_id, id)

    def list(
        self, project_id: str, *, after: str | None, limit: int, order: Order, by: str
    ) -> tuple[list[Eval], bool]:
        """A page of a project's evals, and whether more follow. Raises InputError for an unknown `after`."""
        mine = sa.select(evals).where(evals.c.project_id == project_id)
        with self.db.connect() as connection:
            found = page(connection, mine, evals, after=after, limit=limit, order=order, by=by)
        return [_eval(row) for row in found.rows], found.has_more

    def update(self, project_id: str, id: str, name: str | None, metadata: Mapping[str, str] | None) -> Eval:
        """Change name, metadata or both; None leaves one as it is. Raises NotFoundError."""
        with write(self.db, lock=f"eval:{id}") as connection:
            old = _found(connection, project_id, id)
            new = Eval(
                **{
                    **vars(old),
                    "name": name or old.name,
                    "metadata": old.metadata if metadata is None else metadata,
                    "updated_at": self.clock(),
                }
            )
            connection.execute(evals.update().where(evals.c.id == id).values(**_row(new)))
        return new

    def delete(self, project_id: str, id: str) -> None:
        """Remove an eval with its runs; those under way end. Raises NotFoundError."""
        with write(self.db, lock=f"eval:{id}") as connection:
            _found(connection, project_id, id)
            runs = sa.select(eval_runs.c.id).where(eval_runs.c.eval_id == id)
            connection.execute(runs.with_for_update()).all()  # nobody records an item of them meanwhile
            connection.execute(eval_items.delete().where(eval_items.c.run_id.in_(runs)))
            connection.execute(eval_runs.delete().where(eval_runs.c.eval_id == id))
            connection.execute(evals.delete().where(evals.c.id == id))


def _found(connection: Connection, project_id: str, id: str) -> Eval:
    mine = sa.select(evals).where(evals.c.id == id, evals.c.project_id == project_id)
    row = connection.execute(mine).one_or_none()
    if row is None:
        raise NotFoundError(f"There is no eval {id!r} here.", param="eval_id")
    return _eval(row)


def _row(made: Eval) -> dict[str, Any]:
    columns = ("id", "project_id", "name", "created_at", "updated_at")
    facts = vars(made)
    body = {name: value for name, value in facts.items() if name not in columns}
    return {**{name: facts[name] for name in columns}, "body": json.dumps(body)}


def _eval(row: Row[Any]) -> Eval:
    return Eval(row.id, row.project_id, row.name, row.created_at, row.updated_at, **json.loads(row.body))
