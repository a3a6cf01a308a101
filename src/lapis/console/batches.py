"""Batches: what the project has asked for in files, how far each one is, its results, cancel."""

from __future__ import annotations

import asyncio
import time

from lapis.console.parts import confirm
from lapis.console.table import Act, Cell, Column, Row, Table, Tone
from lapis.console.view import PATH, View, duration, when
from lapis.gateway.batches import ACTIVE, Batch
from lapis.tenants.keys import Identity
from lapis.tenants.tenant import Scope

SHOWN = 200
BATCHES = (
    Column("id", "Batch", "code"),
    Column("status", "State"),
    Column("endpoint", "Endpoint"),
    Column("model", "Model"),
    Column("done", "Done", "number"),
    Column("failed", "Failed", "number"),
    Column("age", "Age", "number"),
    Column("files", "Files"),
)
TONES: dict[str, Tone] = {
    "validating": "busy",
    "in_progress": "busy",
    "finalizing": "busy",
    "completed": "good",
    "failed": "bad",
    "expired": "warn",
    "cancelling": "warn",
    "cancelled": "idle",
}
CANCEL = Act("cancel", "Cancel", danger=True)


async def show(view: View) -> None:
    """Draw the page."""

    def act(_: str, batch_id: str) -> None:
        _ask_to_cancel(view, batch_id)

    empty = "No batch yet. Upload a file with the purpose batch, then"
    table = Table("Batches", BATCHES, empty, "client.batches.create", on_act=act)

    async def look() -> None:
        found, _ = await asyncio.to_thread(view.services.batches.list, view.identity.project_id, limit=SHOWN)
        now, may = time.time(), view.may(Scope.WORK_WRITE)
        table.fill([batch_row(batch, now, may) for batch in found])

    await view.repeat(look)


def batch_row(batch: Batch, now: float, may_cancel: bool) -> Row:
    """A batch in a line, at a moment in seconds since 1970."""
    done = batch.completed + batch.failed
    age = now - batch.created_at
    cells = {
        "id": batch.id,
        "status": Cell(batch.status.replace("_", " "), tone=TONES[batch.status]),
        "endpoint": batch.endpoint.removeprefix("/v1/"),
        "model": batch.facts.get("model"),
        "done": Cell(f"{done:,} of {batch.total:,}", share=done / batch.total, value=done)
        if batch.total
        else "",
        "failed": batch.failed,
        "age": Cell(duration(age), hint=f"created at {when(batch.created_at)} UTC", value=age),
        "files": Cell(_refusal(batch), links=_files(batch)),
    }
    cancellable = batch.status in ACTIVE and batch.status not in ("cancelling", "finalizing")
    return Row(batch.id, cells, (CANCEL,) if may_cancel and cancellable else ())


def _files(batch: Batch) -> list[tuple[str, str]]:
    """Those that there are, to download."""
    ids = {
        "input": batch.input_file_id,
        "output": batch.facts.get("output_file_id"),
        "errors": batch.facts.get("error_file_id"),
    }
    return [(name, f"{PATH}/files/{id}/content") for name, id in ids.items() if id is not None]


def _refusal(batch: Batch) -> str:
    """Why a batch was not begun; empty for all others."""
    errors = batch.facts.get("errors")
    if not errors:
        return ""
    line, message = errors[0].get("line"), errors[0]["message"]
    first = message if line is None else f"Line {line}: {message}"
    return first if len(errors) == 1 else f"{first} (and {len(errors) - 1:,} more)"


def _ask_to_cancel(view: View, batch_id: str) -> None:
    def work(identity: Identity) -> Batch:
        return view.services.batches.cancel(identity.project_id, batch_id)

    confirm(
        "Cancel this batch?",
        "Requests under way are stopped. What is finished is in its output file.",
        "Cancel the batch",
        lambda: view.act(Scope.WORK_WRITE, work, "The batch is being cancelled."),
    )
