"""Files: what fine-tuning, batches and evals read, and what they leave; upload, download, delete."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from typing import IO
from urllib.parse import quote

from fastapi import FastAPI
from nicegui import ui
from nicegui.events import GenericEventArguments
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from lapis.api.form import read_form
from lapis.api.protocol.files import read_fields
from lapis.console.parts import confirm, panel
from lapis.console.session import Session
from lapis.console.table import Act, Cell, Column, Row, Table
from lapis.console.view import PATH, View, size, when
from lapis.errors import LapisError
from lapis.gateway.files import BLOCK, Incoming, StoredFile
from lapis.gateway.services import Services
from lapis.tenants.keys import Identity
from lapis.tenants.tenant import Scope

FILE_LIMIT = 512 << 20  # bytes, as in the API
SHOWN = 500
PURPOSES = {
    "fine-tune": "fine-tune: examples, JSON lines",
    "batch": "batch: requests, JSON lines",
    "evals": "evals: items to grade",
    "user_data": "user_data: anything else",
}
FILES = (
    Column("name", "File"),
    Column("purpose", "Purpose"),
    Column("size", "Size", "number"),
    Column("created", "Created (UTC)", "time"),
    Column("expires", "Expires (UTC)", "time"),
    Column("id", "Id", "id"),
)
TUNE, DELETE = Act("tune", "Fine-tune"), Act("delete", "Delete", danger=True)


class Upload(ui.element, component="assets/upload.js"):
    """A form that uploads a file."""

    def __init__(self, csrf: str) -> None:
        super().__init__()
        self.props["url"] = f"{PATH}/files/upload"
        self.props["csrf"] = csrf
        self.props["purposes"] = PURPOSES


async def show(view: View) -> None:
    """Draw the page."""
    if view.may(Scope.WORK_WRITE):
        with panel("Upload a file"):
            upload = Upload(view.session.csrf)
    empty = "No file yet. Upload one here, or with"
    table = Table("Files", FILES, empty, "client.files.create", on_act=lambda act, key: _act(view, act, key))

    async def look() -> None:
        found, _ = await asyncio.to_thread(view.services.files.list, view.identity.project_id, limit=SHOWN)
        table.fill([_row(file, view.may(Scope.WORK_WRITE)) for file in found])

    async def sent(event: GenericEventArguments) -> None:
        view.say(f"{event.args['filename']} is there as {event.args['id']}.")
        await look()

    if view.may(Scope.WORK_WRITE):
        upload.on("sent", sent)
        upload.on("failed", lambda event: view.say(str(event.args), "bad"))
    await view.repeat(look)


def add_routes(app: FastAPI, services: Services) -> None:
    """The requests that carry bytes: upload and download. The door has checked session and form token."""

    @app.post("/files/upload")
    async def upload(request: Request) -> Response:
        try:
            identity = await _allowed(request, Scope.WORK_WRITE)
            with await asyncio.to_thread(services.files.receive, identity.project_id) as incoming:
                form = await read_form(request, incoming.write, "file", FILE_LIMIT)
                purpose, lifetime = read_fields(form)
                keep = partial(_keep, services, incoming, identity, form.filename or "", purpose, lifetime)
                made = await asyncio.to_thread(keep)
        except LapisError as error:
            return JSONResponse({"message": str(error)}, error.http_status)
        except HTTPException as error:
            return JSONResponse({"message": error.detail}, error.status_code)
        return JSONResponse({"id": made.id, "filename": made.filename})

    @app.get("/files/{file_id}/content")
    async def content(request: Request, file_id: str) -> Response:
        try:
            identity = await _allowed(request, Scope.WORK_READ)
            file = await asyncio.to_thread(services.files.get, identity.project_id, file_id)
            opened = await asyncio.to_thread(services.files.open, identity.project_id, file_id)
        except LapisError as error:
            return JSONResponse({"message": str(error)}, error.http_status)
        name = quote(file.filename, safe="")
        headers = {
            "content-disposition": f"attachment; filename*=utf-8''{name}",
            "content-length": str(file.bytes),
        }
        return StreamingResponse(_blocks(opened), media_type="application/octet-stream", headers=headers)


async def _allowed(request: Request, scope: Scope) -> Identity:
    session: Session = request.scope["lapis.session"]
    identity = await asyncio.to_thread(session.identity)
    identity.require(scope)
    return identity


def _keep(
    services: Services,
    incoming: Incoming,
    identity: Identity,
    filename: str,
    purpose: str,
    lifetime: float | None,
) -> StoredFile:
    store = services.files
    expires_at = None if lifetime is None else store.clock() + lifetime
    return store.keep(incoming, identity, filename, purpose, expires_at)


async def _blocks(file: IO[bytes]) -> AsyncIterator[bytes]:
    with file:
        while data := await asyncio.to_thread(file.read, BLOCK):
            yield data


def _row(file: StoredFile, may_write: bool) -> Row:
    cells = {
        "name": Cell(file.filename, href=f"{PATH}/files/{file.id}/content", hint="Download"),
        "purpose": file.purpose,
        "size": Cell(size(file.bytes), value=file.bytes),
        "created": when(file.created_at),
        "expires": when(file.expires_at),
        "id": file.id,
    }
    acts = ((TUNE, DELETE) if file.purpose == "fine-tune" else (DELETE,)) if may_write else ()
    return Row(file.id, cells, acts)


def _act(view: View, act: str, file_id: str) -> None:
    if act == "tune":
        ui.navigate.to(f"/training/fine-tune?file={file_id}")
        return

    def work(identity: Identity) -> bool:
        view.services.files.delete(identity.project_id, file_id)
        return True

    confirm(
        "Delete this file?",
        "Its bytes are gone then. What was trained on it stays.",
        "Delete it",
        lambda: view.act(Scope.WORK_WRITE, work, "The file is deleted."),
    )
