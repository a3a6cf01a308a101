"""/v1/files: what batches, fine-tuning and evals read, and what they leave."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import IO, Annotated
from urllib.parse import quote

from fastapi import APIRouter, Query, Request
from starlette.responses import StreamingResponse

from lapis.api.auth import ServicesOf, Viewer, Worker
from lapis.api.form import read_form
from lapis.api.protocol.files import (
    FORM_SCHEMA,
    FileObject,
    FilesLimit,
    file_object,
    read_fields,
)
from lapis.api.protocol.lists import After, Deleted, ListPage, Ordered, list_page
from lapis.gateway.files import BLOCK, FileStore, Incoming
from lapis.tenants.keys import Identity

FILE_LIMIT = 512 << 20  # bytes of one file
TYPES = {  # what is never run by a browser; everything else is only bytes
    ".jsonl": "application/jsonl",
    ".json": "application/json",
    ".csv": "text/csv",
    ".txt": "text/plain",
    ".md": "text/markdown",
    ".pdf": "application/pdf",
}

router = APIRouter(prefix="/v1/files")


@router.post("", openapi_extra=FORM_SCHEMA)
async def create_file(request: Request, services: ServicesOf, caller: Worker) -> FileObject:
    """Store a file of up to 512 MiB."""
    store = services.files
    with await asyncio.to_thread(store.receive, caller.project_id) as incoming:
        form = await read_form(request, incoming.write, "file", FILE_LIMIT)
        purpose, lifetime = read_fields(form)
        assert form.filename is not None
        return await asyncio.to_thread(_keep, store, incoming, caller, form.filename, purpose, lifetime)


@router.get("")
def list_files(
    services: ServicesOf,
    caller: Viewer,
    purpose: Annotated[str | None, Query()] = None,
    after: After = None,
    limit: FilesLimit = 10_000,
    order: Ordered = "desc",
) -> ListPage[FileObject]:
    """The project's files."""
    found, more = services.files.list(
        caller.project_id, purpose=purpose, after=after, limit=limit, order=order
    )
    return list_page([file_object(file) for file in found], more)


@router.get("/{file_id}")
def retrieve_file(file_id: str, services: ServicesOf, caller: Viewer) -> FileObject:
    """A file's facts."""
    return file_object(services.files.get(caller.project_id, file_id))


@router.delete("/{file_id}")
def delete_file(file_id: str, services: ServicesOf, caller: Worker) -> Deleted:
    """Delete a file for good."""
    services.files.delete(caller.project_id, file_id)
    return Deleted(id=file_id, object="file")


@router.get("/{file_id}/content", response_class=StreamingResponse, responses={200: {"content": {"*/*": {}}}})
def file_content(file_id: str, services: ServicesOf, caller: Viewer) -> StreamingResponse:
    """A file's bytes."""
    file = services.files.get(caller.project_id, file_id)
    ending = file.filename.lower().rpartition(".")[2]
    return StreamingResponse(
        _blocks(services.files.open(caller.project_id, file_id)),
        media_type=TYPES.get(f".{ending}", "application/octet-stream"),
        headers={
            "content-length": str(file.bytes),
            "content-disposition": f"attachment; filename*=utf-8''{quote(file.filename, safe='')}",
            "cache-control": "private, no-store",
        },
    )


async def _blocks(file: IO[bytes]) -> AsyncIterator[bytes]:
    try:
        while data := await asyncio.to_thread(file.read, BLOCK):
            yield data
    finally:
        file.close()


def _keep(
    store: FileStore,
    incoming: Incoming,
    caller: Identity,
    filename: str,
    purpose: str,
    lifetime: float | None,
) -> FileObject:
    expires_at = None if lifetime is None else store.clock() + lifetime
    return file_object(store.keep(incoming, caller, filename, purpose, expires_at))
