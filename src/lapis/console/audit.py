"""Audit: who did what, with filters; a button verifies the whole chain."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Mapping
from typing import Any

from nicegui import ui

from lapis.audit import AuditEntry, AuditLog
from lapis.console.field import Field
from lapis.console.parts import button
from lapis.console.table import Cell, Column, Row, Table
from lapis.console.view import View, when
from lapis.tenants.keys import Identity
from lapis.tenants.tenant import Scope

SHOWN = 200
DIGEST = re.compile(r"[0-9a-f]{64}")
ENTRIES = (
    Column("number", "No.", "number"),
    Column("at", "At (UTC)", "time"),
    Column("actor", "Who"),
    Column("action", "Did"),
    Column("target", "To"),
    Column("facts", "With", "code"),
)


async def show(view: View) -> None:
    """Draw the page."""
    log = AuditLog(view.services.db)
    with ui.element("div").classes("form"):
        fields = [Field(name, on_change=lambda: look(), placeholder="any") for name in ("Who", "Did", "To")]
        button("Verify the chain", lambda: _verify(view, log), "main")
    table = Table(f"The last {SHOWN} entries", ENTRIES, "No entry fits.")

    async def look() -> None:
        who, did, to = (field.text for field in fields)
        found = await asyncio.to_thread(log.newest, SHOWN, actor=who, action=did, target=to)
        table.fill([_row(entry) for entry in found])

    await view.repeat(look)


def _row(entry: AuditEntry) -> Row:
    facts = _short(entry.facts)
    cells = {
        "number": entry.sequence,
        "at": when(entry.at),
        "actor": entry.actor,
        "action": entry.action,
        "target": entry.target,
        "facts": Cell(facts, hint=entry.digest),
    }
    return Row(str(entry.sequence), cells)


def _short(facts: Mapping[str, Any], most: int = 160) -> str:
    kept = {name: value for name, value in facts.items() if value not in (None, "", {})}
    text = ", ".join(f"{name}={_value(value)}" for name, value in kept.items())
    return text if len(text) <= most else text[: most - 1] + "…"


def _value(value: Any) -> str:
    """A value as JSON; of a digest the beginning."""
    return f'"{value[:12]}…"' if DIGEST.fullmatch(str(value)) else json.dumps(value)


async def _verify(view: View, log: AuditLog) -> None:
    def work(_: Identity) -> str:
        found = log.verify()
        return f"All {found.entries:,} entries are there, unchanged and in order; the last digest is {found.head[:16]}…"

    said = await view.act(Scope.ADMIN, work)
    if said is not None:
        view.say(said)
