"""One training run: curves, where its time went, checkpoints, what happened, its recipe; stop and resume."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from nicegui import ui

from lapis.audit import AuditLog
from lapis.console.chart import Chart
from lapis.console.parts import Facts, Text, button, confirm, panel
from lapis.console.samples import Samples
from lapis.console.table import Cell, Column, Row, Table
from lapis.console.training import curve, rounded, visible_runs
from lapis.console.view import PATH, View, duration, require_operator, when
from lapis.errors import NotFoundError
from lapis.jobs.job import JobSpec
from lapis.jobs.queue import JobQueue
from lapis.tenants.keys import Identity
from lapis.tenants.tenant import Scope
from lapis.train.goodput import NAMES, account
from lapis.train.run import Run, effective

CURVES = {
    "loss": "Loss (nats per token)",
    "reward": "Reward (mean)",
    "tokens_per_s": "Tokens per second",
    "lr": "Learning rate",
}
GOODPUT = (
    Column("cause", "Where the time went"),
    Column("seconds", "Seconds", "number"),
    Column("share", "Share", "number"),
)
CHECKPOINTS = (
    Column("step", "Step", "number"),
    Column("score", "Held-out loss", "number"),
    Column("at", "Written (UTC)", "time"),
    Column("digest", "Digest", "id"),
)
HAPPENED = (Column("at", "At (UTC)", "time"), Column("event", "Event"), Column("what", "What"))
TOLD = ("start", "resume", "restart", "bad_step", "slow_rank", "fallback", "checkpoint_failed", "end")
EVENTS = 20


async def show(view: View, run_id: str) -> None:
    """Draw the page."""
    run = next((run for run in await asyncio.to_thread(visible_runs, view) if run.id == run_id), None)
    if run is None:
        raise NotFoundError(f"There is no run {run_id!r}.", hint=f"All runs are at {PATH}/training.")
    with ui.element("div").classes("head"):
        Text(run.id, "h2")
        with ui.element("div").classes("row"):
            status = Text("", "span").classes("tone")
            stop = button("Stop", lambda: _ask_to_stop(view, run), "danger")
            resume = button("Resume", lambda: _resume(view, run))
    facts = Facts()
    with panel("Curves", silent=True), ui.element("div").classes("split"):
        charts = {field: Chart(title, from_zero=field != "loss") for field, title in CURVES.items()}
    samples = Samples()
    goodput = Table("Goodput", GOODPUT, "No step was done yet.")
    checkpoints = Table("Checkpoints", CHECKPOINTS, "No checkpoint was written yet.")
    happened = Table("What happened", HAPPENED, "Nothing yet.")
    with panel("Recipe"):
        Text(run.recipe_text, "pre").classes("log").props('tabindex="0"')

    async def look() -> None:
        events = await asyncio.to_thread(run.events.read)
        state = await asyncio.to_thread(run.status)
        status.text = state
        stop.set_visibility(state == "running" and view.operates)
        resume.set_visibility(state == "stopped" and view.operates)
        facts.fill(await asyncio.to_thread(run_facts, run, events))
        samples.fill(effective(events, "samples"))
        goodput.fill(goodput_rows(events))
        checkpoints.fill(checkpoint_rows(events))
        happened.fill(event_rows(events))
        for field, chart in charts.items():
            points = await asyncio.to_thread(curve, run, field)
            chart.set_visibility(bool(points) or field in ("loss", "tokens_per_s"))
            chart.put({field: points} if points else {})

    await view.repeat(look)


def run_facts(run: Run, events: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What is known of a run, as text."""
    summary = run.summary()
    start: Mapping[str, Any] = next((event for event in reversed(events) if event["event"] == "start"), {})
    goodput = account(events)
    exact = "training and serving give the same bits" if start.get("bit_exact") else "not bit-exact"
    evaluation = run.evaluation() or {}
    return {
        "Begun": when(summary.created) + " UTC",
        "Trained for": duration(summary.seconds),
        "Model": _some("{:,} parameters", summary.parameters),
        "Data": _some("{:,} training tokens", start.get("tokens")),
        "Dataset": str(start.get("dataset") or summary.dataset_digest or ""),
        "Kernels": f"{start['kernels']}: {exact}" if "kernels" in start else "",
        "Step": _some("{:,}", summary.step),
        "Tokens seen": _some("{:,}", summary.tokens),
        "Loss": _some("{:.4f}", summary.loss),
        "Evaluation": _some("{:.3f} bits per byte of held-out text", evaluation.get("bits_per_byte")),
        "Goodput": _some("{:.1%} of the time was productive", goodput.ratio if goodput else None),
    }


def goodput_rows(events: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Seconds by cause, the productive ones first, then the largest loss."""
    goodput = account(events)
    if goodput is None or not goodput.wall_s:
        return []
    lost = sorted(goodput.lost_s.items(), key=lambda item: -item[1])
    spent = [
        ("productive steps", goodput.productive_s),
        *((NAMES[cause], seconds) for cause, seconds in lost),
    ]
    return [
        Row(
            name,
            {
                "cause": name,
                "seconds": Cell(f"{seconds:,.1f}", value=seconds),
                "share": Cell(
                    f"{seconds / goodput.wall_s:.1%}", share=seconds / goodput.wall_s, value=seconds
                ),
            },
        )
        for name, seconds in spent
    ]


def checkpoint_rows(events: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Checkpoints as they were written, the newest first."""
    written = [event for event in events if event["event"] == "checkpoint"]
    return [
        Row(
            str(event["step"]),
            {
                "step": event["step"],
                "score": rounded(event.get("score"), 4),
                "at": when(event["time"]),
                "digest": event["digest"][:12],
            },
        )
        for event in {event["step"]: event for event in reversed(written)}.values()
    ][:EVENTS]


def event_rows(events: Sequence[Mapping[str, Any]]) -> list[Row]:
    """What happened beside the steps, the last first."""
    told = [(number, event) for number, event in enumerate(events) if event["event"] in TOLD]
    return [
        Row(
            str(number),
            {"at": when(event["time"]), "event": event["event"].replace("_", " "), "what": _told(event)},
        )
        for number, event in reversed(told)
    ][:EVENTS]


def _told(event: Mapping[str, Any]) -> str:
    shown = ("step", "reason", "cause", "why", "action", "rank", "times", "kernels", "threads")
    return ", ".join(f"{name} {event[name]}" for name in shown if event.get(name) not in (None, ""))


def _ask_to_stop(view: View, run: Run) -> None:
    confirm(
        "Stop this run?",
        "It ends now. It can be resumed later: it goes on from its last checkpoint.",
        "Stop the run",
        lambda: view.act(
            Scope.ADMIN, lambda identity: _stop(view, identity, run), "The run was asked to stop."
        ),
    )


def _stop(view: View, identity: Identity, run: Run) -> None:
    require_operator(identity)
    run.interrupt()
    AuditLog(view.services.db).append(view.session.actor(), "run.stop", run.id)


async def _resume(view: View, run: Run) -> None:
    def submit(identity: Identity) -> str:
        require_operator(identity)
        argv = (sys.executable, "-m", "lapis.cli.main", "train", str(run.folder / "recipe.toml"))
        spec = JobSpec(name=f"resume {run.name}", argv=argv)
        return JobQueue(view.services.db).submit(spec, view.session.actor(), identity.project_id).id

    job_id = await view.act(Scope.ADMIN, submit)
    if job_id is not None:
        view.say(
            f"It waits in the queue as {job_id}.",
            hint=f"{PATH}/jobs/{job_id} shows why it waits, and its log.",
        )


def _some(form: str, value: object) -> str:
    return "" if value is None else form.format(value)
