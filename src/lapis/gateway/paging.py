"""Lists in pages, as OpenAI's clients walk them: `after` is the last id that was seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from lapis.errors import InputError

Order = Literal["asc", "desc"]


@dataclass(frozen=True)
class Page:
    """Rows of a list, and whether more follow."""

    rows: Sequence[Row[Any]]
    has_more: bool


def page(
    connection: Connection,
    query: sa.Select[Any],
    table: sa.Table,
    *,
    after: str | None = None,
    limit: int = 20,
    order: Order = "desc",
    by: str = "created_at",
) -> Page:
    """One page of a query over a table with an `id` and a time, by time and then id.

    `query` says whose rows there are; `after` must be one of them. Raises InputError for another.
    """
    at, id = table.c[by], table.c.id
    if after is not None:
        seen = connection.execute(query.where(id == after)).one_or_none()
        if seen is None:
            raise InputError(f"There is no {after!r} in this list to go on after.", param="after")
        then = sa.tuple_(at, id)
        last = sa.tuple_(sa.literal(seen._mapping[by]), sa.literal(after))
        query = query.where(then > last if order == "asc" else then < last)
    ends = (at.asc(), id.asc()) if order == "asc" else (at.desc(), id.desc())
    rows = connection.execute(query.order_by(*ends).limit(limit + 1)).all()
    return Page(rows[:limit], len(rows) > limit)
