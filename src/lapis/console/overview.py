"""Overview: what runs now, on what, and what was used today."""

from __future__ import annotations

import asyncio
import time

from lapis.console import machine
from lapis.console.machine import Machine
from lapis.console.parts import Figures
from lapis.console.table import Cell, Column, Row, Table
from lapis.console.view import PATH, View, size
from lapis.gateway.services import Services
from lapis.jobs.job import ACTIVE, State
from lapis.jobs.queue import JobQueue
from lapis.tenants.quota import NANO
from lapis.tenants.usage import UsageLedger, UsageSum

DAY = 86_400
MODELS = (
    Column("name", "Model"),
    Column("state", "State"),
    Column("running", "Running", "number"),
    Column("waiting", "Waiting", "number"),
    Column("cache", "Cache in use", "number"),
    Column("answered", "Answered", "number"),
    Column("kind", "Kind"),
    Column("licence", "Licence"),
    Column("digest", "Digest", "id"),
)
USAGE = (
    Column("model", "Model"),
    Column("requests", "Requests", "number"),
    Column("prompt", "Prompt tokens", "number"),
    Column("cached", "of them cached", "number"),
    Column("completion", "Completion tokens", "number"),
)


async def show(view: View) -> None:
    """Draw the page."""
    services = view.services
    machine_wide = ("Tokens/s", "Requests", "Processors", "Memory", "GPUs") if view.operates else ()
    figures = Figures(*machine_wide, "Jobs", "Used today", "Spent today")
    models = Table("Models", MODELS, "Nothing is served. Fetch a model with", "lapis pull NAME")
    used = Table("Usage today (UTC)", USAGE, "Nothing was asked yet today. Ask something with", "lapis chat")
    speed = Speed(services)

    async def look() -> None:
        rows = model_rows(view)
        models.fill(rows)
        sums = await asyncio.to_thread(used_today, services, view.only)
        used.fill([usage_row(item) for item in sums])
        running, waiting = await asyncio.to_thread(job_counts, services, view.only)
        figures.put("Jobs", f"{running:,}", f"{waiting:,} waiting")
        tokens, requests = sum(item.usage.total_tokens for item in sums), sum(item.requests for item in sums)
        figures.put("Used today", f"{tokens:,}", f"tokens in {requests:,} requests")
        prices = "" if services.home.prices.exists() else f"no prices: {services.home.prices.name}"
        figures.put("Spent today", f"{sum(item.cost for item in sums) / NANO:,.2f}", prices)
        if view.operates and machine_wide:
            put_requests(figures, speed, services)
            put_machine(figures, await asyncio.to_thread(machine.look))

    await view.repeat(look)


def model_rows(view: View) -> list[Row]:
    """What is served to who looks, and what its engine does now: that only for an administrator."""
    rows = []
    for servable, deployment in view.services.router.models(view.identity):
        stats = deployment.loaded.stats() if deployment.loaded and view.only is None else {}
        loaded = Cell("loaded", tone="good") if deployment.loaded else Cell("loads at first use", tone="idle")
        cells = {
            "name": Cell(servable.name, href=f"{PATH}/playground?model={servable.name}"),
            "state": loaded,
            "running": stats.get("running"),
            "waiting": stats.get("waiting"),
            "cache": share(stats.get("pages_used"), stats.get("pages")),
            "answered": stats.get("finished"),
            "kind": servable.kind if servable.base is None else f"adapter of {servable.base}",
            "licence": servable.licence,
            "digest": Cell(servable.digest[:12], hint=servable.digest),
        }
        rows.append(Row(servable.name, cells))
    return rows


class Speed:
    """Tokens generated per second between two looks, by all loaded engines."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._before = (time.monotonic(), self._generated())

    def look(self) -> float:
        """The speed since the last look."""
        now = (time.monotonic(), self._generated())
        tokens, seconds = now[1] - self._before[1], now[0] - self._before[0]
        self._before = now
        return max(0, tokens) / max(seconds, 1e-3)  # an engine that was unloaded takes its count along

    def _generated(self) -> int:
        return sum(engine.stats()["completion_tokens"] for engine in self._services.router.engines())


def put_requests(figures: Figures, speed: Speed, services: Services) -> None:
    """Show how busy the engines are."""
    stats = [engine.stats() for engine in services.router.engines()]
    running, waiting = (sum(item[name] for item in stats) for name in ("running", "waiting"))
    figures.put("Tokens/s", f"{speed.look():,.0f}")
    figures.put("Requests", f"{running:,}", f"{waiting:,} waiting")


def used_today(services: Services, only: str | None) -> list[UsageSum]:
    """Settled usage by model since midnight UTC, of one project or of all."""
    return UsageLedger(services.db).summary("model", project_id=only, since=time.time() // DAY * DAY)


def usage_row(item: UsageSum) -> Row:
    """A row of usage."""
    cells = {
        "model": item.group,
        "requests": item.requests,
        "prompt": item.usage.prompt_tokens,
        "cached": item.usage.cached_tokens,
        "completion": item.usage.completion_tokens,
    }
    return Row(str(item.group), cells)


def job_counts(services: Services, only: str | None) -> tuple[int, int]:
    """How many jobs run and how many wait."""
    found = JobQueue(services.db).list(*ACTIVE, State.QUEUED, State.PREEMPTED, project_id=only)
    running = sum(job.state in ACTIVE for job in found)
    return running, len(found) - running


def put_machine(figures: Figures, found: Machine) -> None:
    """Show how busy the machine is."""
    figures.put(
        "Processors", f"{min(found.load / found.cpus, 1):.0%}", f"of {found.cpus}, load {found.load:.1f}"
    )
    if found.memory is not None and found.free is not None:
        figures.put("Memory", size(found.memory - found.free), f"of {size(found.memory)}")
    busy = [gpu.busy for gpu in found.gpus if gpu.busy is not None]
    mean = f"{sum(busy) / len(busy):.0%} busy" if busy else ""
    figures.put("GPUs", str(len(found.gpus)), mean or ("" if found.gpus else "none on this machine"))


def share(part: int | None, whole: int | None) -> Cell:
    """A part of a whole in percent, with a bar."""
    if part is None or not whole:
        return Cell()
    return Cell(f"{part / whole:.0%}", share=part / whole, value=part / whole)
