"""The ledger in time buckets: what an organization used and what it cost, in groups, a page at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine, Row

from lapis.errors import InputError
from lapis.tables.tenants import projects
from lapis.tables.usage import usage_entries

_entries = usage_entries.c
GROUPS: Mapping[str, sa.ColumnElement[Any]] = {
    "project_id": _entries.project_id,
    "user_id": _entries.user_id,
    "api_key_id": _entries.key_id,
    "model": _entries.model,
    "batch": _entries.batch,
    "line_item": sa.case((_entries.operation == "compute", "compute"), else_=_entries.model + ", tokens"),
}
SUMS = ("prompt_tokens", "completion_tokens", "cached_tokens", "tokens", "cost")


@dataclass(frozen=True)
class Span:
    """Buckets from `start` on: `width` seconds each, whole UTC minutes, hours or days but for the two ends."""

    start: int
    end: int
    width: int
    limit: int
    page: str | None = None

    def buckets(self) -> tuple[list[tuple[int, int]], str | None]:
        """The buckets of this page as (start, end), and the next page, if there is one. Raises InputError."""
        at = self.start if self.page is None else self._read_page(self.page)
        found: list[tuple[int, int]] = []
        while at < self.end and len(found) < self.limit:
            then = min((at // self.width + 1) * self.width, self.end)
            found.append((at, then))
            at = then
        return found, None if at >= self.end else f"page_{at}"

    def _read_page(self, page: str) -> int:
        text = page.removeprefix("page_")
        if text == page or not text.isascii() or not text.isdigit() or len(text) > 15:
            raise InputError("page is not one that an answer named as next_page.", param="page")
        at = int(text)
        if not self.start < at < self.end:
            raise InputError("page belongs to another question.", param="page")
        return at


@dataclass(frozen=True)
class Filter:
    """Which entries count: of these operations (empty: all), projects, keys, users, models; batches or not."""

    organization_id: str
    operations: Sequence[str] = ()
    values: Mapping[str, Sequence[str]] = field(default_factory=dict)  # by the names of GROUPS
    batch: bool | None = None

    def clause(self) -> sa.ColumnElement[bool]:
        """As a condition on entries. Another organization's projects are never among them."""
        mine = sa.select(projects.c.id).where(projects.c.organization_id == self.organization_id)
        clause = (_entries.kind == "use") & _entries.project_id.in_(mine)
        if self.operations:
            clause &= _entries.operation.in_(self.operations)
        for name, values in self.values.items():
            if values:
                clause &= GROUPS[name].in_(values)
        if self.batch is not None:
            clause &= _entries.batch == int(self.batch)
        return clause


@dataclass(frozen=True)
class Group:
    """What one group used in one bucket; `names` has the values that it was grouped by. `cost` is in NANO."""

    names: Mapping[str, Any]
    requests: int
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    tokens: int
    cost: int


@dataclass(frozen=True)
class Bucket:
    """The groups of one span of time; none where nothing was used."""

    start: int
    end: int
    groups: tuple[Group, ...]


def read_buckets(
    db: Engine, which: Filter, span: Span, group_by: Sequence[str]
) -> tuple[list[Bucket], str | None]:
    """The buckets of a page, empty ones too, and the next page. Raises InputError for the page."""
    times, following = span.buckets()
    if not times:
        return [], None
    with db.connect() as connection:
        rows = _sums(connection, which, span.width, times[0][0], times[-1][1], group_by)
    found: dict[int, list[Group]] = {}
    for row in rows:
        names = {name: row[1 + index] for index, name in enumerate(group_by)}
        sums = {name: int(row._mapping[name] or 0) for name in SUMS}
        found.setdefault(int(row[0]), []).append(Group(names, int(row.requests), **sums))
    return [Bucket(start, end, tuple(found.get(start // span.width, ()))) for start, end in times], following


def _sums(
    connection: Connection, which: Filter, width: int, start: int, end: int, group_by: Sequence[str]
) -> Sequence[Row[Any]]:
    quotient = _entries.at / float(width)
    # A cast cuts off in SQLite and rounds in PostgreSQL.
    number = (
        sa.func.floor(quotient) if connection.dialect.name == "postgresql" else sa.cast(quotient, sa.Integer)
    )
    keys = [number.label("bucket"), *(GROUPS[name].label(f"by_{name}") for name in group_by)]
    sums = [sa.func.sum(_entries[name]).label(name) for name in SUMS]
    query = (
        sa.select(*keys, sa.func.count().label("requests"), *sums)
        .where(which.clause(), _entries.at >= start, _entries.at < end)
        .group_by(*(sa.text(str(number + 1)) for number in range(len(keys))))
        .order_by(*(sa.text(str(number + 1)) for number in range(len(keys))))
    )
    return list(connection.execute(query))
