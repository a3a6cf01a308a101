"""Responses that are kept for their project, for a month and within a size, and the conversations they make."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from lapis.db import write
from lapis.errors import InputError, NotFoundError
from lapis.tables.responses import stored_responses

Item = dict[str, Any]

LIFETIME = 30 * 86_400.0  # seconds after the last response that continues it
PROJECT_BYTES = 256 << 20  # JSON of one project; beyond it, those that would expire first go first
TRIM_BYTES = 4 << 20  # written between two looks at the sum
MAX_TURNS = 1000  # responses of one conversation


@dataclass(frozen=True)
class StoredResponse:
    """A response: the items that it was given beyond those of `previous_id`, and its JSON object."""

    id: str
    previous_id: str | None
    items: Sequence[Item]
    body: Item


class StoredResponses:
    """The table of kept responses. Nobody sees those of another project."""

    def __init__(
        self, db: Engine, clock: Callable[[], float] = time.time, project_bytes: int = PROJECT_BYTES
    ) -> None:
        self._db = db
        self._clock = clock
        self._project_bytes = project_bytes
        self._lock = threading.Lock()
        self._written: dict[str, int] = {}  # bytes since the last look at a project's sum

    def put(self, project_id: str, response: StoredResponse) -> None:
        """Keep a response; the conversation that it continues lives on with it."""
        items, body = json.dumps(response.items), json.dumps(response.body)
        now = self._clock()
        size = len(items) + len(body)
        row = {
            "id": response.id, "project_id": project_id, "previous_id": response.previous_id,
            "created_at": now, "expires_at": now + LIFETIME, "size": size, "input": items, "body": body,
        }  # fmt: skip
        with write(self._db, lock=f"responses:{project_id}") as connection:
            if self._is_time_to_trim(project_id, size):
                self._trim(connection, project_id, now, size)
            connection.execute(stored_responses.insert().values(**row))
            if response.previous_id is not None:
                chain = [found.id for found in _chain(connection, project_id, response.previous_id)]
                later = stored_responses.update().where(stored_responses.c.id.in_(chain))
                connection.execute(later.values(expires_at=now + LIFETIME))

    def get(self, project_id: str, id: str) -> StoredResponse:
        """A kept response. Raises NotFoundError."""
        columns = stored_responses.c
        query = sa.select(stored_responses).where(
            columns.id == id, columns.project_id == project_id, columns.expires_at > self._clock()
        )
        with self._db.connect() as connection:
            row = connection.execute(query).one_or_none()
        if row is None:
            raise _missing(id, "response_id")
        return StoredResponse(row.id, row.previous_id, json.loads(row.input), json.loads(row.body))

    def delete(self, project_id: str, id: str) -> None:
        """Forget a response. Raises NotFoundError."""
        columns = stored_responses.c
        gone = stored_responses.delete().where(
            columns.id == id, columns.project_id == project_id, columns.expires_at > self._clock()
        )
        with write(self._db, lock=f"responses:{project_id}") as connection:
            if not connection.execute(gone).rowcount:
                raise _missing(id, "response_id")

    def conversation(self, project_id: str, id: str) -> list[Item]:
        """What was said up to a response and in it, as items. Raises NotFoundError, InputError (too long)."""
        with self._db.connect() as connection:
            chain = _chain(connection, project_id, id)
        if not chain or chain[-1].previous_id is not None:
            if len(chain) >= MAX_TURNS:
                raise InputError(
                    f"The conversation has more than {MAX_TURNS} responses.", param="previous_response_id"
                )
            raise _missing(chain[-1].previous_id if chain else id, "previous_response_id")
        items: list[Item] = []
        for row in reversed(chain):
            items += json.loads(row.input)
            items += json.loads(row.body)["output"]
        return items

    def _is_time_to_trim(self, project_id: str, size: int) -> bool:
        with self._lock:
            written = self._written.get(project_id, TRIM_BYTES) + size
            self._written[project_id] = 0 if written >= TRIM_BYTES else written
            return written >= TRIM_BYTES

    def _trim(self, connection: Connection, project_id: str, now: float, room: int) -> None:
        columns = stored_responses.c
        mine = columns.project_id == project_id
        connection.execute(stored_responses.delete().where(mine, columns.expires_at <= now))
        total = connection.execute(sa.select(sa.func.sum(columns.size)).where(mine)).scalar() or 0
        excess = int(total) + room - self._project_bytes
        if excess <= 0:
            return
        gone = []
        first = sa.select(columns.id, columns.size).where(mine).order_by(columns.expires_at, columns.id)
        for row in connection.execute(first):
            if excess <= 0:
                break
            gone.append(row.id)
            excess -= row.size
        for start in range(0, len(gone), 500):  # a statement takes a bounded number of values
            some = gone[start : start + 500]
            connection.execute(stored_responses.delete().where(columns.id.in_(some)))


def _chain(connection: Connection, project_id: str, id: str) -> Sequence[sa.Row[Any]]:
    """The rows of a conversation, the newest first, as far as they are still there."""
    columns = stored_responses.c
    mine = columns.project_id == project_id
    last = sa.select(columns.id, columns.previous_id, columns.input, columns.body, sa.literal(0).label("n"))
    chain = last.where(columns.id == id, mine).cte("chain", recursive=True)
    before = sa.select(columns.id, columns.previous_id, columns.input, columns.body, chain.c.n + 1)
    chain = chain.union_all(before.where(columns.id == chain.c.previous_id, mine, chain.c.n < MAX_TURNS - 1))
    return connection.execute(sa.select(chain).order_by(chain.c.n)).all()


def _missing(id: str, param: str) -> NotFoundError:
    return NotFoundError(
        f"There is no response {id!r} here.",
        hint="It was deleted, has expired, was made with store=false, or belongs to another project.",
        param=param,
    )
