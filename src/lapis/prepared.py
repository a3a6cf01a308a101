"""Statements that every request runs: compiled once for a database, then executed by its driver itself.

SQLAlchemy's own execution of a statement takes several times as long as SQLite takes for a row. What runs seldom goes
that way; both ways work in the same transaction.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Dialect

from lapis.db import driver_execute


@dataclass(frozen=True)
class _Compiled:
    """The text for one kind of database, and its parameters in order."""

    text: str
    constants: Mapping[str, Any]
    order: Sequence[str]
    by_name: bool  # whether the driver takes names

    def parameters(self, values: Mapping[str, Any]) -> Any:
        ordered = [values[name] if name in values else self.constants[name] for name in self.order]
        return dict(zip(self.order, ordered, strict=True)) if self.by_name else ordered


class Prepared:
    """A statement over columns whose values the driver takes and gives as they are: numbers and text."""

    def __init__(self, statement: sa.ClauseElement, columns: Sequence[str] = ()) -> None:
        """`columns` are those that an insert gives values for."""
        self._statement = statement
        self._columns = columns
        self._compiled: dict[str, _Compiled] = {}
        selected = statement.selected_columns.keys() if isinstance(statement, sa.Select) else []
        self._row: Callable[..., Any] = namedtuple("Row", selected)  # type: ignore[misc]

    def run(self, connection: Connection, values: Mapping[str, Any]) -> int:
        """Execute it; how many rows it wrote."""
        rows: int = self._execute(connection, values).rowcount
        return rows

    def rows(self, connection: Connection, values: Mapping[str, Any]) -> list[Any]:
        """What a query finds, each row with its columns' names."""
        return [self._row(*row) for row in self._execute(connection, values).fetchall()]

    def _execute(self, connection: Connection, values: Mapping[str, Any]) -> Any:
        name = connection.dialect.name
        compiled = self._compiled.get(name)
        if compiled is None:
            compiled = self._compiled[name] = self._compile(connection.dialect)
        return driver_execute(connection, compiled.text, compiled.parameters(values))

    def _compile(self, dialect: Dialect) -> _Compiled:
        made: Any = self._statement.compile(dialect=dialect, column_keys=list(self._columns) or None)
        constants = {name: bind.value for name, bind in made.binds.items() if not bind.required}
        return _Compiled(str(made), constants, made.positiontup or list(made.binds), not made.positional)
