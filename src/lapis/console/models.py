"""Models and releases: what is served, how releases were measured, where they come from; approve and retire."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

from nicegui import ui

from lapis.console.field import Field
from lapis.console.overview import MODELS, model_rows
from lapis.console.parts import Facts, Text, button, confirm, dialog, link, panel
from lapis.console.table import Act, Cell, Column, Row, Table, Tone
from lapis.console.training import rounded
from lapis.console.view import PATH, View, require_operator, when
from lapis.release.gates import Gate
from lapis.release.registry import Registry
from lapis.release.release import MOVES, SERVABLE, Release, State
from lapis.tenants.keys import Identity
from lapis.tenants.tenant import Scope

RELEASES = (
    Column("id", "Release"),
    Column("state", "State"),
    Column("bits", "Bits per byte", "number"),
    Column("yardstick", "5-gram", "number"),
    Column("licence", "Licence"),
    Column("run", "From"),
    Column("created", "Created (UTC)", "time"),
    Column("by", "By"),
)
GATES = (Column("name", "Gate"), Column("verdict", "Verdict"), Column("text", "Why"))
TONES: dict[State, Tone] = {
    State.DRAFT: "idle",
    State.EVALUATED: "busy",
    State.APPROVED: "good",
    State.LIVE: "good",
    State.RETIRED: "idle",
}
VERDICTS: dict[str, Tone] = {"pass": "good", "warn": "warn", "refuse": "bad"}
APPROVE, RETIRE = Act("approve", "Approve"), Act("retire", "Retire", danger=True)


async def show(view: View) -> None:
    """Draw the page of all models."""
    served = Table("Served", MODELS, "Nothing is served. Fetch a model with", "lapis pull NAME")
    releases = None
    if view.operates:
        releases = Table(
            "Releases",
            RELEASES,
            "No release yet. Make one with",
            "lapis release create NAME --run last",
            on_act=lambda act, key: _act(view, act, key),
        )

    async def look() -> None:
        served.fill(model_rows(view))
        if releases is not None:
            releases.fill([_row(release) for release in await asyncio.to_thread(_releases, view)])

    await view.repeat(look)


async def show_release(view: View, reference: str) -> None:
    """Draw the page of one release."""
    registry = Registry(view.services.home, view.services.db)
    release = await asyncio.to_thread(registry.show, reference)
    with ui.element("div").classes("head"):
        Text(release.id, "h2")
        with ui.element("div").classes("row"):
            Text(release.state).classes(f"tone {TONES[release.state]}")
            for act in _acts(release):
                button(
                    act.label, partial(_act, view, act.name, release.id), "danger" if act.danger else "main"
                )
            if release.state in SERVABLE:
                link("Chat with it", f"{PATH}/playground?model={release.id}", "button")
    Facts().fill(_facts(release))
    gates = Table("Gates", GATES, "Nothing is checked.")
    gates.fill([_gate_row(gate) for gate in await asyncio.to_thread(registry.judge, release)])
    with panel("Lineage"):
        Facts().fill(_lineage(release))
    if release.lineage.licences:
        licences = Table(
            "Licences of the training data",
            (Column("licence", "Licence"), Column("documents", "Documents", "number")),
            "",
        )
        counted = sorted(release.lineage.licences.items(), key=lambda item: -item[1])
        licences.fill([Row(name, {"licence": name, "documents": count}) for name, count in counted])


def _releases(view: View) -> list[Release]:
    found = Registry(view.services.home, view.services.db).list()
    return sorted(found, key=lambda release: -release.created_at)


def _row(release: Release) -> Row:
    report = release.report or {}
    cells = {
        "id": Cell(release.id, href=f"{PATH}/models/{release.id}"),
        "state": Cell(release.state, tone=TONES[release.state]),
        "bits": rounded(report.get("bits_per_byte"), 3),
        "yardstick": rounded((report.get("yardsticks") or {}).get("5-gram"), 3),
        "licence": release.lineage.licence,
        "run": _origin(release),
        "created": when(release.created_at),
        "by": release.created_by,
    }
    return Row(release.id, cells, _acts(release))


def _acts(release: Release) -> list[Act]:
    moves = MOVES[release.state]
    return [act for act, to in ((APPROVE, State.APPROVED), (RETIRE, State.RETIRED)) if to in moves]


def _origin(release: Release) -> Cell:
    if release.run_id is None:
        return Cell(release.lineage.source)
    return Cell(release.run_id, href=f"{PATH}/training/runs/{release.run_id}")


def _facts(release: Release) -> dict[str, str]:
    report = release.report or {}
    return {
        "Weights": release.digest,
        "Created": f"{when(release.created_at)} UTC by {release.created_by}",
        "Approved by": release.approved_by or "",
        "Reason": release.reason,
        "Evaluation": f"{report['bits_per_byte']:.3f} bits per byte ({report['low']:.3f} to {report['high']:.3f})"
        if {"bits_per_byte", "low", "high"} <= report.keys()
        else "none yet: lapis evaluate",
    }


def _lineage(release: Release) -> dict[str, str]:
    way = release.lineage
    step = "" if way.step is None else f" at step {way.step:,}"
    return {
        "Source": way.source,
        "Licence": way.licence,
        "Run": f"{way.run}{step}" if way.run else "",
        "Weights of": ("the average of the run's weights" if way.average else "the last step")
        if way.run
        else "",
        "Checkpoint": way.checkpoint or "",
        "Dataset": way.dataset or "",
        "Tokenizer": way.tokenizer or "",
    }


def _gate_row(gate: Gate) -> Row:
    return Row(
        gate.name + gate.text,
        {"name": gate.name, "verdict": Cell(gate.verdict, tone=VERDICTS[gate.verdict]), "text": gate.text},
    )


async def _act(view: View, act: str, reference: str) -> None:
    if act == "retire":
        confirm(
            f"Retire {reference}?",
            "It is served no more, and that cannot be taken back. Its weights and its record stay.",
            "Retire it",
            lambda: _done(
                view,
                lambda: _registry(view).retire(reference, view.session.actor()),
                f"{reference} is retired.",
            ),
        )
    elif act == "approve":
        await _approve(view, reference)


async def _approve(view: View, reference: str) -> None:
    release = await asyncio.to_thread(_registry(view).show, reference)
    verdicts = await asyncio.to_thread(_registry(view).judge, release)
    refused = [gate for gate in verdicts if gate.verdict == "refuse"]
    with dialog(f"Approve {release.id}?") as opened:
        for gate in verdicts:
            Text(f"{gate.name}: {gate.text}", "p").classes(
                f"said {'bad' if gate.verdict == 'refuse' else ''}"
            )
        reason = Field("Reason (needed, because a gate refuses)" if refused else "Reason", "area")

        async def go() -> None:
            opened.close()
            await _done(
                view,
                lambda: _registry(view).approve(release.id, view.session.actor(), bool(refused), reason.text),
                f"{release.id} is approved: it can be served.",
            )

        with ui.element("div").classes("row"):
            button("Override and approve" if refused else "Approve", go, "danger" if refused else "main")
            button("Not now", opened.close)


async def _done(view: View, work: Callable[[], Release], said: str) -> None:
    def checked(identity: Identity) -> Release:
        require_operator(identity)
        return work()

    if await view.act(Scope.ADMIN, checked, said) is not None:
        ui.navigate.reload()


def _registry(view: View) -> Registry:
    return Registry(view.services.home, view.services.db)
