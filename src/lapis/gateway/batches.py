"""Batches of projects: what is asked for, how far it is, and who runs it.

A server runs a batch under a lease. Every write of its own carries the lease's token: whoever lost it changes nothing.
"""

from __future__ import annotations

import json
import secrets
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from lapis.db import write
from lapis.errors import ConflictError, InputError, NotFoundError
from lapis.gateway.batch_input import MAX_BYTES
from lapis.gateway.files import FileStore, StoredFile
from lapis.gateway.on_behalf import kept
from lapis.gateway.paging import Order, page
from lapis.tables.batches import batch_lines, batches
from lapis.tenants.keys import Identity
from lapis.tenants.usage import Usage

WINDOW_SECONDS = 86_400.0
LEASE_SECONDS = 10.0
ACTIVE = ("validating", "in_progress", "finalizing", "cancelling")
CANCELLABLE = ("validating", "in_progress", "cancelling")
_columns = batches.c


@dataclass(frozen=True)
class Batch:
    """A batch. `facts` holds whose it is and what is only shown: metadata, errors, files, a time for each status."""

    id: str
    project_id: str
    status: str
    endpoint: str
    input_file_id: str
    created_at: float
    expires_at: float
    total: int
    completed: int
    failed: int
    usage: Usage
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class LineResult:
    """A finished request: the JSON that stands in the output or the error file."""

    line: int
    succeeded: bool
    result: str
    usage: Usage = field(default=Usage(0, 0))


class BatchStore:
    """The batches of an installation. All methods block; call them in a thread."""

    def __init__(self, files: FileStore) -> None:
        self._files = files
        self._db = files.db

    def create(
        self,
        identity: Identity,
        endpoint: str,
        input_file_id: str,
        metadata: Mapping[str, str] | None = None,
        output_seconds: float | None = None,
    ) -> Batch:
        """Begin a batch over a file of the project. Raises NotFoundError, InputError for a file of another kind."""
        file = self._files.get(identity.project_id, input_file_id)
        if file.purpose != "batch":
            raise InputError(
                f"The file {file.id} was uploaded for {file.purpose!r}.",
                hint="Upload it with purpose='batch'.",
                param="input_file_id",
            )
        if file.bytes > MAX_BYTES:
            raise InputError(f"A batch's file has at most {MAX_BYTES:,} bytes.", param="input_file_id")
        now = self._files.clock()
        facts = {
            "identity": kept(identity),
            "metadata": metadata,
            "output_seconds": output_seconds,
        }
        row = {
            "id": f"batch_{secrets.token_hex(12)}", "project_id": identity.project_id, "status": "validating",
            "endpoint": endpoint, "input_file_id": file.id, "created_at": now,
            "expires_at": now + WINDOW_SECONDS, "total": 0, "completed": 0, "failed": 0, "prompt_tokens": 0,
            "completion_tokens": 0, "cached_tokens": 0, "lease_token": None, "lease_until": 0.0,
            "facts": json.dumps(facts),
        }  # fmt: skip
        with write(self._db) as connection:
            connection.execute(batches.insert().values(**row))
            return _find(connection, identity.project_id, str(row["id"]))

    def get(self, project_id: str, id: str) -> Batch:
        """A batch. Raises NotFoundError."""
        with self._db.connect() as connection:
            return _find(connection, project_id, id)

    def list(
        self, project_id: str, *, after: str | None = None, limit: int = 20, order: Order = "desc"
    ) -> tuple[list[Batch], bool]:
        """A page of a project's batches, and whether more follow. Raises InputError for an unknown `after`."""
        query = sa.select(batches).where(_columns.project_id == project_id)
        with self._db.connect() as connection:
            found = page(connection, query, batches, after=after, limit=limit, order=order)
        return [_batch(row) for row in found.rows], found.has_more

    def cancel(self, project_id: str, id: str) -> Batch:
        """Ask for a batch's end. Raises NotFoundError, ConflictError for one that has ended or is about to."""
        with write(self._db, lock=f"batch:{id}") as connection:
            found = _find(connection, project_id, id)
            if found.status not in CANCELLABLE:
                raise ConflictError(f"The batch {id} is {found.status}.", param="batch_id")
            if found.status != "cancelling":
                facts = {**found.facts, "cancelling_at": self._files.clock()}
                row: dict[str, Any] = {"status": "cancelling", "facts": json.dumps(facts)}
                # One that waits for a limit, run by nobody, has not to wait for its end.
                row["lease_until"] = sa.case(
                    (_columns.lease_token.is_(None), 0.0), else_=_columns.lease_until
                )
                connection.execute(batches.update().where(_columns.id == id).values(**row))
            return _find(connection, project_id, id)

    # ---- by the server that runs it

    def claim(self, running: Sequence[str], projects: Counter[str]) -> tuple[Batch, str] | None:
        """Take a batch that nobody runs, of the project that has the fewest running here; with its lease's token."""
        now, token = self._files.clock(), secrets.token_hex(12)
        free = sa.select(_columns.id, _columns.project_id).where(
            _columns.status.in_(ACTIVE), _columns.lease_until <= now, _columns.id.not_in(running)
        )
        with self._db.connect() as connection:
            waiting = connection.execute(free.order_by(_columns.created_at).limit(1000)).all()
        for row in sorted(waiting, key=lambda row: projects[row.project_id]):
            taken = batches.update().where(_columns.id == row.id, _columns.lease_until <= now)
            with write(self._db) as connection:
                lease = {"lease_token": token, "lease_until": now + LEASE_SECONDS}
                if connection.execute(taken.values(**lease)).rowcount:
                    return _find(connection, row.project_id, row.id), token
        return None

    def renew(self, batch: Batch, token: str) -> Batch:
        """Keep the lease; the batch as it is now. Raises ConflictError if the lease was lost."""
        with write(self._db) as connection:
            return self._update(connection, batch, token)

    def release(self, batch: Batch, token: str, seconds: float = 0.0) -> None:
        """Let another server have it, at once or after so many seconds; one that was cancelled meanwhile at once."""
        mine = batches.update().where(_columns.id == batch.id, _columns.lease_token == token)
        until = self._files.clock() + seconds if seconds else 0.0
        free = sa.case((_columns.status == "cancelling", 0.0), else_=until)
        with write(self._db) as connection:
            connection.execute(mine.values(lease_token=None, lease_until=free))

    def begin(self, batch: Batch, token: str, total: int, model: str | None) -> Batch:
        """The input is right: its lines run from now on, unless somebody cancelled meanwhile."""
        with write(self._db, lock=f"batch:{batch.id}") as connection:
            found = self._update(connection, batch, token, total=total)
            status = "in_progress" if found.status == "validating" else found.status
            return self._move(connection, found, token, status, model=model)

    def finalize(self, batch: Batch, token: str, outcome: str) -> Batch:
        """All lines are finished: the files are written next, unless somebody cancelled meanwhile."""
        with write(self._db, lock=f"batch:{batch.id}") as connection:
            found = self._update(connection, batch, token)
            status = "finalizing" if found.status == "in_progress" else found.status
            return self._move(connection, found, token, status, outcome=outcome)

    def record(self, batch: Batch, token: str, results: Sequence[LineResult]) -> Batch:
        """Keep finished lines and count them, in one step. Raises ConflictError if the lease was lost."""
        counts = {
            "completed": _columns.completed + sum(result.succeeded for result in results),
            "failed": _columns.failed + sum(not result.succeeded for result in results),
            "prompt_tokens": _columns.prompt_tokens + sum(result.usage.prompt_tokens for result in results),
            "completion_tokens": _columns.completion_tokens
            + sum(result.usage.completion_tokens for result in results),
            "cached_tokens": _columns.cached_tokens + sum(result.usage.cached_tokens for result in results),
        }
        rows = [
            {"batch_id": batch.id, "line": done.line, "succeeded": int(done.succeeded), "result": done.result}
            for done in results
        ]
        with write(self._db) as connection:
            found = self._update(connection, batch, token, **counts)
            connection.execute(batch_lines.insert(), rows)
            return found

    def recorded(self, batch: Batch) -> set[int]:
        """The numbers of the lines that are finished."""
        query = sa.select(batch_lines.c.line).where(batch_lines.c.batch_id == batch.id)
        with self._db.connect() as connection:
            return set(connection.execute(query).scalars())

    def finish(
        self, batch: Batch, token: str, status: str, errors: Sequence[Mapping[str, Any]] | None = None
    ) -> Batch:
        """Write the result files, then end the batch. Killed on the way, it is done again with the same files."""
        names = {}
        for key, succeeded, name in (
            ("output_file_id", 1, f"{batch.id}_output.jsonl"),
            ("error_file_id", 0, f"{batch.id}_error.jsonl"),
        ):
            file = self._result_file(batch, succeeded, name)
            names[key] = None if file is None else file.id
        facts: dict[str, Any] = {**names} if errors is None else {**names, "errors": errors}
        with write(self._db, lock=f"batch:{batch.id}") as connection:
            done = self._move(connection, self._update(connection, batch, token), token, status, **facts)
            connection.execute(batch_lines.delete().where(batch_lines.c.batch_id == batch.id))
        return done

    def _result_file(self, batch: Batch, succeeded: int, name: str) -> StoredFile | None:
        mine = (batch_lines.c.batch_id == batch.id) & (batch_lines.c.succeeded == succeeded)
        with self._db.connect() as connection:
            if connection.execute(sa.select(batch_lines.c.line).where(mine).limit(1)).first() is None:
                return None
        id = f"file-{batch.id.removeprefix('batch_')}{'out' if succeeded else 'err'}"
        seconds = batch.facts.get("output_seconds")
        expires_at = None if seconds is None else self._files.clock() + seconds
        try:
            return self._files.get(batch.project_id, id)  # written before we were killed
        except NotFoundError:
            lines = self._results(mine)
            return self._files.put(batch.project_id, name, "batch_output", lines, expires_at, id)

    def _results(self, mine: sa.ColumnElement[bool]) -> Iterator[bytes]:
        query = sa.select(batch_lines.c.line, batch_lines.c.result).order_by(batch_lines.c.line).limit(1000)
        last = 0
        while True:
            with self._db.connect() as connection:
                rows = connection.execute(query.where(mine, batch_lines.c.line > last)).all()
            if not rows:
                return
            yield "".join(f"{row.result}\n" for row in rows).encode()
            last = rows[-1].line

    def _move(self, connection: Connection, batch: Batch, token: str, status: str, **facts: Any) -> Batch:
        stamp = {} if status == batch.status else {f"{status}_at": self._files.clock()}
        text = json.dumps({**batch.facts, **stamp, **facts})
        return self._update(connection, batch, token, status=status, facts=text)

    def _update(self, connection: Connection, batch: Batch, token: str, **values: Any) -> Batch:
        """Change a batch that we run, and renew the lease with it."""
        mine = batches.update().where(_columns.id == batch.id, _columns.lease_token == token)
        until = self._files.clock() + LEASE_SECONDS
        if not connection.execute(mine.values(lease_until=until, **values)).rowcount:
            raise ConflictError(f"Another server runs the batch {batch.id} now.")
        return _find(connection, batch.project_id, batch.id)


def _find(connection: Connection, project_id: str, id: str) -> Batch:
    query = sa.select(batches).where(_columns.id == id, _columns.project_id == project_id)
    row = connection.execute(query).one_or_none()
    if row is None:
        raise NotFoundError(
            f"There is no batch {id[:80]!r} here.", hint="Or it belongs to another project.", param="batch_id"
        )
    return _batch(row)


def _batch(row: Row[Any]) -> Batch:
    return Batch(
        row.id, row.project_id, row.status, row.endpoint, row.input_file_id, row.created_at, row.expires_at,
        row.total, row.completed, row.failed,
        Usage(row.prompt_tokens, row.completion_tokens, row.cached_tokens),
        json.loads(row.facts),
    )  # fmt: skip
