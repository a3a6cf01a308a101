"""Tables of plain rows: sorted at a click, with one button for each act on a row; on a phone each row is a sheet."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

from nicegui.element import Element
from nicegui.events import GenericEventArguments
from nicegui.slot import Slot

Tone = Literal["good", "warn", "bad", "busy", "idle"]


class Column(NamedTuple):
    """A column: the cell's name, its title, and what it holds, by which it is aligned and broken."""

    field: str
    title: str
    kind: Literal["text", "number", "time", "id", "code"] = "text"


@dataclass(frozen=True)
class Cell:
    """What stands in one place: a text that may link, have a tone, a bar of `share` 0 to 1, and sort by `value`.

    `links` stand behind the text, each with a text of its own and where it goes.
    """

    text: str = ""
    href: str | None = None
    tone: Tone | None = None
    hint: str | None = None
    share: float | None = None
    value: float | str | None = None
    links: Sequence[tuple[str, str]] | None = None

    def props(self) -> dict[str, Any]:
        """For the browser: what is set."""
        return {name: value for name, value in asdict(self).items() if value is not None}


class Act(NamedTuple):
    """A button on a row."""

    name: str
    label: str
    danger: bool = False


@dataclass(frozen=True)
class Row:
    """A row: what names it, its cells by column, and what can be done with it."""

    key: str
    cells: Mapping[str, object]
    acts: Sequence[Act] = field(default_factory=tuple)


Acted = Callable[[str, str], Any]  # the act's name, the row's key


class Table(Element, component="assets/table.js"):
    """A table under a title. Where there are no rows it says so, with the command that makes one."""

    def __init__(
        self,
        title: str,
        columns: Sequence[Column],
        empty: str,
        command: str = "",
        *,
        on_act: Acted | None = None,
        choosing: str = "",
        on_choose: Callable[[list[str]], Any] | None = None,
    ) -> None:
        super().__init__()
        self._columns = columns
        self.props["title"] = title
        self.props["columns"] = [column._asdict() for column in columns]
        self.props["rows"] = []
        self.props["empty"] = empty
        self.props["command"] = command
        self.props["choosing"] = choosing
        if on_act is not None:
            act = on_act

            def acted(event: GenericEventArguments) -> Any:
                return act(str(event.args["act"]), str(event.args["key"]))

            self.on("act", acted)
        if on_choose is not None:
            choose = on_choose
            self.on("choose", lambda event: choose([str(key) for key in event.args]))

    def beside(self) -> Slot:
        """The place beside the title, for a button: `with table.beside(): …`."""
        return self.add_slot("beside")

    def fill(self, rows: Sequence[Row]) -> None:
        """Show these rows. Values that are no Cell are written out: numbers with separators, None as nothing."""
        shown = [
            {
                "key": row.key,
                "cells": {
                    column.field: _cell(row.cells.get(column.field)).props() for column in self._columns
                },
                "acts": [act._asdict() for act in row.acts],
            }
            for row in rows
        ]
        if shown != self.props["rows"]:  # an unchanged table is not sent again
            self.props["rows"] = shown


def _cell(value: object) -> Cell:
    if isinstance(value, Cell):
        return value
    if value is None:
        return Cell("", value="")
    if isinstance(value, int | float) and not isinstance(value, bool):
        return Cell(f"{value:,}", value=value)
    return Cell(str(value))
