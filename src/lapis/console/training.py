"""Training: fine-tuning jobs, and the runs with their live curves, several of them in one chart."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from nicegui import ui

from lapis.console.chart import Chart, Points, thinned
from lapis.console.parts import link, panel
from lapis.console.table import Cell, Column, Row, Table, Tone
from lapis.console.tuning import job_rows, jobs_table
from lapis.console.view import PATH, View, duration, when
from lapis.tenants.tenant import Scope
from lapis.train.run import Run, RunSummary

RECENT = 50
TOGETHER = 6  # runs in one chart: more colours cannot be told apart
RUNS = (
    Column("id", "Run"),
    Column("status", "Status"),
    Column("begun", "Begun (UTC)", "time"),
    Column("step", "Step", "number"),
    Column("loss", "Loss", "number"),
    Column("bits", "Bits per byte", "number"),
    Column("tokens", "Tokens", "number"),
    Column("parameters", "Parameters", "number"),
    Column("time", "Trained for", "number"),
)
TONES: dict[str, Tone] = {"running": "busy", "finished": "good", "stopped": "warn", "failed": "bad"}
CURVES = {"loss": "Loss (nats per token)", "tokens_per_s": "Tokens per second"}


async def show(view: View) -> None:
    """Draw the page."""
    jobs = None
    if view.may(Scope.WORK_READ):
        jobs = jobs_table()
        if view.may(Scope.WORK_WRITE):
            with jobs.beside():
                link("Fine-tune a model", f"{PATH}/training/fine-tune", "button main")
    runs = _Runs(view) if view.operates else None

    async def look() -> None:
        if jobs is not None:
            jobs.fill(await asyncio.to_thread(job_rows, view))
        if runs is not None:
            await runs.look()

    await view.repeat(look)


class _Runs:
    """All training runs of the installation, and the curves of those that are chosen."""

    def __init__(self, view: View) -> None:
        self.view = view
        self.chosen: list[str] = []
        with panel("Curves", silent=True), ui.element("div").classes("split"):
            self.charts = {field: Chart(title, from_zero=field != "loss") for field, title in CURVES.items()}
        empty, command = "No run yet. Start one with", "lapis train RECIPE.toml"
        self.table = Table("Training runs", RUNS, empty, command, choosing="Compare", on_choose=self.choose)

    async def choose(self, keys: list[str]) -> None:
        """Show the curves of these runs together."""
        self.chosen = keys
        await self.look()

    async def look(self) -> None:
        """Show the runs as they are now."""
        runs = await asyncio.to_thread(visible_runs, self.view)
        self.table.fill(await asyncio.to_thread(run_rows, runs))
        drawn = [run for run in runs if run.id in self.chosen][:TOGETHER] or list(runs[:1])
        for field, chart in self.charts.items():
            chart.put({run.id: await asyncio.to_thread(curve, run, field) for run in drawn})


def visible_runs(view: View) -> Sequence[Run]:
    """The last runs that the session's person may see, newest first: all of them for an administrator."""
    if view.only is not None:
        return []
    return list(reversed(Run.list(view.services.home)))[:RECENT]


def run_rows(runs: Sequence[Run]) -> list[Row]:
    """Runs in a line each."""
    return [_row(run.summary()) for run in runs]


def curve(run: Run, field: str) -> Points:
    """(step, value) of a field of a run's step events."""
    return thinned([(step["step"], step[field]) for step in run.steps() if step.get(field) is not None])


def _row(summary: RunSummary) -> Row:
    cells = {
        "id": Cell(summary.id, href=f"{PATH}/training/runs/{summary.id}"),
        "status": Cell(summary.status, tone=TONES[summary.status]),
        "begun": when(summary.created),
        "step": summary.step,
        "loss": rounded(summary.loss, 4),
        "bits": rounded(summary.bits_per_byte, 3),
        "tokens": summary.tokens,
        "parameters": summary.parameters,
        "time": Cell(duration(summary.seconds), value=summary.seconds or 0.0),
    }
    return Row(summary.id, cells)


def rounded(value: float | None, digits: int) -> Cell:
    """A number with so many digits after the point."""
    return Cell(value="") if value is None else Cell(f"{value:,.{digits}f}", value=value)
