"""/v1/uploads: files that come in parts."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter, Depends, Request

from lapis.api.auth import ServicesOf, Worker
from lapis.api.body import json_body, json_schema
from lapis.api.form import read_form
from lapis.api.protocol.uploads import (
    PART_SCHEMA,
    CompletionOfUpload,
    PartObject,
    UploadObject,
    UploadRequest,
    part_object,
    upload_object,
)
from lapis.errors import InputError

PART_LIMIT = 64 << 20  # bytes of one part

router = APIRouter(prefix="/v1/uploads")
NewUpload = Annotated[UploadRequest, Depends(json_body(UploadRequest))]
Completion = Annotated[CompletionOfUpload, Depends(json_body(CompletionOfUpload))]


@router.post("", openapi_extra=json_schema(UploadRequest))
def create_upload(services: ServicesOf, caller: Worker, body: NewUpload) -> UploadObject:
    """Begin an upload of up to 8 GiB. It must be completed within an hour."""
    made = services.uploads.create(
        caller.project_id, body.filename, body.purpose, body.bytes, body.file_seconds
    )
    return upload_object(made)


@router.post("/{upload_id}/parts", openapi_extra=PART_SCHEMA)
async def add_part(upload_id: str, request: Request, services: ServicesOf, caller: Worker) -> PartObject:
    """Add up to 64 MiB. Parts may come in any order, side by side."""
    store = services.uploads
    with await asyncio.to_thread(store.receive, caller.project_id, upload_id) as incoming:
        form = await read_form(request, incoming.write, "data", PART_LIMIT)
        if form.filename is None:
            raise InputError("The field 'data' is required and missing.", param="data")
        unknown = next(iter(form.fields), None)
        if unknown is not None:
            raise InputError(f"Unknown field {unknown[:80]!r}.", param=unknown[:80])
        return part_object(await asyncio.to_thread(store.add, caller.project_id, upload_id, incoming))


@router.post("/{upload_id}/complete", openapi_extra=json_schema(CompletionOfUpload))
def complete_upload(upload_id: str, services: ServicesOf, caller: Worker, body: Completion) -> UploadObject:
    """Make a file of the parts, in the order in which they are named."""
    return upload_object(*services.uploads.complete(caller, upload_id, body.part_ids, body.md5))


@router.post("/{upload_id}/cancel")
def cancel_upload(upload_id: str, services: ServicesOf, caller: Worker) -> UploadObject:
    """Give an upload up; its parts are removed."""
    return upload_object(services.uploads.cancel(caller.project_id, upload_id))
