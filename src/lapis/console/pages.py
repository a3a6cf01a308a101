"""The console's pages: what is served and used now, and the training runs with their curves."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple

from fastapi import FastAPI
from nicegui import ui
from starlette.requests import Request

from lapis.console import facts
from lapis.console.session import Session
from lapis.errors import AuthError, NotFoundError
from lapis.gateway.services import Services
from lapis.train.run import Run

PATH = "/console"
EVERY = 2.0  # seconds between two looks
LINE = "#0d9488"  # readable on light and on dark


class Column(NamedTuple):
    """A column of a table: the row's field, its title, and whether it holds numbers."""

    field: str
    title: str
    numeric: bool = False


MODELS = (
    Column("name", "Model"),
    Column("state", "State"),
    Column("running", "Running", True),
    Column("waiting", "Waiting", True),
    Column("cache", "Cache in use", True),
    Column("answered", "Answered", True),
    Column("kind", "Kind"),
    Column("licence", "Licence"),
    Column("digest", "Digest"),
)
USAGE = (
    Column("model", "Model"),
    Column("requests", "Requests", True),
    Column("prompt", "Prompt tokens", True),
    Column("cached", "of them cached", True),
    Column("completion", "Completion tokens", True),
)
RUNS = (
    Column("id", "Run"),
    Column("status", "Status"),
    Column("step", "Step", True),
    Column("loss", "Loss", True),
    Column("bits_per_byte", "Bits per byte", True),
    Column("tokens", "Tokens", True),
    Column("parameters", "Parameters", True),
    Column("seconds", "Seconds", True),
)
CURVES = {"loss": "Loss (nats per token)", "tokens_per_s": "Tokens per second", "lr": "Learning rate"}


def create_pages(services: Services) -> FastAPI:
    """The app of all pages, to be mounted at PATH. NiceGUI keeps one set of pages in a process."""

    @ui.page("/", title="Lapis")
    async def overview(request: Request) -> None:
        await _overview(services, request.scope["lapis.session"])

    @ui.page("/runs", title="Lapis: runs")
    async def runs(request: Request) -> None:
        await _runs(services, request.scope["lapis.session"])

    @ui.page("/runs/{run_id}", title="Lapis: run")
    async def one_run(run_id: str, request: Request) -> None:
        await _run(services, request.scope["lapis.session"], run_id)

    app = FastAPI(openapi_url=None)
    ui.run_with(app, mount_path="/", title="Lapis", dark=None, show_welcome_message=False)
    return app


async def _overview(services: Services, session: Session) -> None:
    _header("Overview")
    with _body():
        with ui.row().classes("w-full gap-4"):
            speed, running, waiting = (_figure(name) for name in ("Tokens per second", "Running", "Waiting"))
        models = _table("Models", MODELS, "name", "Nothing is served.")
        usage = _table("Usage today (UTC)", USAGE, "model", "Nothing was asked yet today.")
    before = (time.monotonic(), facts.completion_tokens(services))

    async def look() -> None:
        nonlocal before
        identity = session.identity()
        now = (time.monotonic(), facts.completion_tokens(services))
        speed.text = f"{max(0, now[1] - before[1]) / max(now[0] - before[0], 1e-3):,.0f}"
        before = now
        rows = facts.models(services)
        running.text = f"{sum(row['running'] or 0 for row in rows):,}"
        waiting.text = f"{sum(row['waiting'] or 0 for row in rows):,}"
        _fill(models, MODELS, rows)
        _fill(usage, USAGE, await asyncio.to_thread(facts.usage_today, services, identity))

    await _repeat(session, look)


async def _runs(services: Services, session: Session) -> None:
    _header("Runs")
    with _body():
        table = _table("Training runs", RUNS, "id", "No run yet: lapis train RECIPE.toml starts one.")
    table.add_slot(
        "body-cell-id",
        f'<q-td :props="props"><a class="underline" :href="`{PATH}/runs/${{props.value}}`">'
        "{{ props.value }}</a></q-td>",
    )

    async def look() -> None:
        _fill(table, RUNS, await asyncio.to_thread(facts.recent_runs, services))

    await _repeat(session, look)


async def _run(services: Services, session: Session, run_id: str) -> None:
    _header("Runs")
    try:
        run = Run.open(services.home, run_id)
    except NotFoundError as error:
        with _body():
            ui.label(error.message)
        return
    with _body():
        title = ui.label(run.id).classes("text-xl font-semibold break-all")
        charts = {field: _chart(text, field != "loss") for field, text in CURVES.items()}
        with ui.expansion("Recipe").classes("w-full"):
            ui.label(run.recipe_text).classes("whitespace-pre font-mono text-sm overflow-x-auto")

    async def look() -> None:
        title.text = f"{run.id}: {await asyncio.to_thread(run.status)}"
        for field, chart in charts.items():
            points = await asyncio.to_thread(facts.curve, run, field)
            chart.options["series"][0]["data"] = points
            chart.update()

    await _repeat(session, look)


async def _repeat(session: Session, look: Callable[[], Awaitable[None]]) -> None:
    """Look now and every EVERY seconds, as long as the session's key is valid."""

    async def checked() -> None:
        try:
            await asyncio.to_thread(session.identity)
        except AuthError:
            ui.navigate.to(PATH)  # which asks for a key
            return
        await look()

    await checked()
    ui.timer(EVERY, checked, immediate=False)


def _header(here: str) -> None:
    with ui.header(elevated=False).classes("items-center gap-6 bg-slate-800"):
        ui.label("Lapis").classes("text-lg font-semibold text-white")
        for name, path in {"Overview": "/", "Runs": "/runs"}.items():
            link = ui.link(name, f"{PATH}{path}").classes("text-white no-underline")
            link.classes("font-semibold" if name == here else "opacity-70")


def _body() -> ui.column:
    return ui.column().classes("w-full max-w-6xl mx-auto p-2 sm:p-4 gap-6")


def _figure(name: str) -> ui.label:
    with ui.card().classes("grow").props("flat bordered"):
        value = ui.label("-").classes("text-2xl font-semibold tabular-nums")
        ui.label(name).classes("text-sm opacity-70")
    return value


def _table(title: str, columns: Sequence[Column], key: str, empty: str) -> ui.table:
    described = [
        {"name": field, "label": text, "field": field, "align": "right" if numeric else "left"}
        for field, text, numeric in columns
    ]
    table = ui.table(columns=described, rows=[], row_key=key, title=title).classes("w-full")
    return table.props(f'flat bordered dense hide-pagination no-data-label="{empty}"')


def _fill(table: ui.table, columns: Sequence[Column], rows: Sequence[facts.Row]) -> None:
    table.rows = [{column.field: _text(row[column.field]) for column in columns} for row in rows]
    table.update()


def _text(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int | float) else str(value)


def _chart(title: str, from_zero: bool) -> ui.echart:
    return ui.echart(
        {
            "title": {"text": title, "textStyle": {"fontSize": 14, "color": "#888"}},
            "grid": {"left": 64, "right": 16, "top": 40, "bottom": 28},
            "xAxis": {"type": "value", "min": "dataMin", "max": "dataMax", "name": "step"},
            "yAxis": {"type": "value", "scale": not from_zero},
            "tooltip": {"trigger": "axis"},
            "animation": False,
            "series": [{"type": "line", "showSymbol": False, "data": [], "color": LINE}],
        }
    ).classes("w-full h-64")
