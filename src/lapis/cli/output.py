"""How commands print: plain lines, aligned tables, or JSON for machines."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])

json_option: Callable[[Command], Command] = click.option(
    "--json", "as_json", is_flag=True, help="Print facts as JSON, for machines."
)


def say(text: str = "") -> None:
    """One plain line on standard output, at once."""
    print(text, flush=True)


def print_json(value: Any) -> None:
    """A value as indented JSON on standard output."""
    print(json.dumps(value, indent=2, ensure_ascii=False, default=str), flush=True)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]], empty: str = "") -> None:
    """Rows under column names, numbers to the right, text to the left; `empty` is said where there are none."""
    if empty and not rows:
        say(empty)
        return
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(len(name), *(len(row[i]) for row in cells), 0) for i, name in enumerate(columns)]
    right = [_numeric([row[i] for row in rows]) for i in range(len(columns))]
    for line in [list(columns), *cells]:
        text = "  ".join(
            value.rjust(width) if to_right else value.ljust(width)
            for value, width, to_right in zip(line, widths, right, strict=True)
        )
        say(_bold(text.rstrip()) if line == list(columns) else text.rstrip())


def fact(value: object) -> str:
    """One value of a list of facts: in words, a number with its digits, a list with commas between."""
    if isinstance(value, list | tuple):
        return ", ".join(map(fact, value)) or "-"
    return f"{value:,.7g}" if isinstance(value, float) else _cell(value)


def amount(number: int, one: str, more: str = "") -> str:
    """A number of things: `1 attempt`, `2 attempts`; `more` is the plural that is not made with an s."""
    return f"{number:,} {one if number == 1 else more or one + 's'}"


def _numeric(values: list[object]) -> bool:
    known = [value for value in values if value is not None]
    return bool(known) and all(isinstance(value, int | float) for value in known)


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.3f}"
    return "-" if value is None else str(value)


def _bold(text: str) -> str:
    return f"\033[1m{text}\033[0m" if sys.stdout.isatty() else text
