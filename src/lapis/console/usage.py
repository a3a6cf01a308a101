"""Usage: tokens by model, project and key, a chart by day, and all of it as CSV."""

from __future__ import annotations

import asyncio
import csv
import io
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Literal

from nicegui import ui

from lapis.console.chart import Chart
from lapis.console.field import Field
from lapis.console.parts import button, panel
from lapis.console.table import Cell, Column, Row, Table
from lapis.console.view import View
from lapis.gateway.services import Services
from lapis.tenants.keys import ApiKeys
from lapis.tenants.quota import NANO
from lapis.tenants.tenant import Tenants
from lapis.tenants.usage import UsageLedger, UsageSum

DAY = 86_400
RANGES = {"7": "last 7 days", "30": "last 30 days", "90": "last 90 days"}
GROUPS: dict[Literal["model", "project_id", "key_id"], str] = {
    "model": "By model",
    "project_id": "By project",
    "key_id": "By key",
}
NUMBERS = (
    Column("requests", "Requests", "number"),
    Column("prompt", "Prompt tokens", "number"),
    Column("cached", "of them cached", "number"),
    Column("completion", "Completion tokens", "number"),
    Column("total", "Tokens", "number"),
    Column("cost", "Cost", "number"),
)
MODELS_SHOWN = 5  # in the chart; the rest is one colour


async def show(view: View) -> None:
    """Draw the page."""
    with ui.element("div").classes("row"):
        days = Field("Days", "select", "30", options=RANGES, silent=True, on_change=lambda: look())
        button("Export CSV", lambda: _export(view, int(days.value)))
    with panel("Tokens by day", silent=True):
        chart = Chart("Tokens by day and model (UTC)", bars=True)
    empty = "Nothing was used in these days. Ask something with"
    tables = {
        by: Table(
            title, (Column("group", title.removeprefix("By ").capitalize()), *NUMBERS), empty, "lapis chat"
        )
        for by, title in GROUPS.items()
    }

    async def look() -> None:
        count = int(days.value)
        chart.put(await asyncio.to_thread(by_day, view.services, view.only, count))
        names = await asyncio.to_thread(_names, view.services)
        for by, table in tables.items():
            ledger = UsageLedger(view.services.db)
            sums = await asyncio.to_thread(ledger.summary, by, project_id=view.only, since=first_day(count))
            table.fill(_rows(sums, names))

    await view.repeat(look, every=10.0)


def first_day(count: int) -> float:
    """Midnight UTC that begins the last `count` days, today among them."""
    return time.time() // DAY * DAY - (count - 1) * DAY


def by_day(services: Services, only: str | None, count: int) -> dict[str, list[tuple[float | str, float]]]:
    """Tokens per day of the models used most, and of all others together."""
    ledger, start = UsageLedger(services.db), first_day(count)
    sums = ledger.summary("model", project_id=only, since=start)
    if not sums:
        return {}
    shown = [str(item.group) for item in sums[:MODELS_SHOWN]]
    series: dict[str, list[tuple[float | str, float]]] = {name: [] for name in shown}
    if len(sums) > MODELS_SHOWN:
        series["others"] = []
    for day in range(count):
        since = start + day * DAY
        found = ledger.summary("model", project_id=only, since=since, until=since + DAY)
        tokens = {str(item.group): item.usage.total_tokens for item in found}
        label = datetime.fromtimestamp(since, UTC).strftime("%d %b")
        for name in shown:
            series[name].append((label, tokens.pop(name, 0)))
        if "others" in series:
            series["others"].append((label, sum(tokens.values())))
    return series


def as_csv(services: Services, only: str | None, count: int) -> str:
    """Usage per day (UTC), project, key and model, with a line of titles."""
    ledger, start = UsageLedger(services.db), first_day(count)
    text = io.StringIO()
    write = csv.writer(text, lineterminator="\n").writerow
    write(("day", "by", "group", "requests", "prompt_tokens", "cached_tokens", "completion_tokens", "cost"))
    for day in range(count):
        since = start + day * DAY
        label = datetime.fromtimestamp(since, UTC).date().isoformat()
        for by in GROUPS:
            for item in ledger.summary(by, project_id=only, since=since, until=since + DAY):
                used = item.usage
                numbers = (item.requests, used.prompt_tokens, used.cached_tokens, used.completion_tokens)
                cost = f"{item.cost / NANO:.9f}"
                write((label, by, _safe(item.group or "without a key"), *numbers, cost))
    return text.getvalue()


def _safe(text: str) -> str:
    """A text that no spreadsheet takes for a formula."""
    return f"'{text}" if text[:1] in "=+-@\t\r" else text


async def _export(view: View, count: int) -> None:
    text = await asyncio.to_thread(as_csv, view.services, view.only, count)
    ui.download.content(text, f"lapis-usage-{count}-days.csv", "text/csv")


def _names(services: Services) -> dict[str, str]:
    keys = {key.id: f"{key.name} ({key.prefix})" for key in ApiKeys(services.db).list()}
    return keys | {project.id: project.name for project in Tenants(services.db).projects()}


def _rows(sums: Sequence[UsageSum], names: dict[str, str]) -> list[Row]:
    most = max((item.usage.total_tokens for item in sums), default=0) or 1
    return [
        Row(
            item.group or "-",
            {
                "group": Cell(names.get(item.group or "", item.group or "without a key"), hint=item.group),
                "requests": item.requests,
                "prompt": item.usage.prompt_tokens,
                "cached": item.usage.cached_tokens,
                "completion": item.usage.completion_tokens,
                "total": Cell(
                    f"{item.usage.total_tokens:,}",
                    share=item.usage.total_tokens / most,
                    value=item.usage.total_tokens,
                ),
                "cost": Cell(f"{item.cost / NANO:,.2f}", value=item.cost),
            },
        )
        for item in sums
    ]
