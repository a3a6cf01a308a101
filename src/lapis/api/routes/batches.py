"""/v1/batches: many requests in a file, run behind live traffic within a day."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends

from lapis.api.auth import ServicesOf, Viewer, Worker, permit
from lapis.api.body import json_body, json_schema
from lapis.api.protocol.batches import BatchObject, BatchRequest, batch_object
from lapis.api.protocol.lists import After, Limit, ListPage, Ordered, list_page
from lapis.tenants.tenant import Scope

router = APIRouter(prefix="/v1/batches")
NewBatch = Annotated[BatchRequest, Depends(json_body(BatchRequest))]


@router.post("", openapi_extra=json_schema(BatchRequest))
def create_batch(services: ServicesOf, caller: Worker, body: NewBatch) -> BatchObject:
    """Begin a batch over an uploaded file."""
    permit(caller, Scope.MODELS_USE)  # its requests are the caller's
    expiry = body.output_expires_after
    made = services.batches.create(
        caller, body.endpoint, body.input_file_id, body.metadata, None if expiry is None else expiry.seconds
    )
    return batch_object(made)


@router.get("")
def list_batches(
    services: ServicesOf, caller: Viewer, after: After = None, limit: Limit = 20, order: Ordered = "desc"
) -> ListPage[BatchObject]:
    """The project's batches."""
    found, more = services.batches.list(caller.project_id, after=after, limit=limit, order=order)
    return list_page([batch_object(batch) for batch in found], more)


@router.get("/{batch_id}")
def retrieve_batch(batch_id: str, services: ServicesOf, caller: Viewer) -> BatchObject:
    """A batch."""
    return batch_object(services.batches.get(caller.project_id, batch_id))


@router.post("/{batch_id}/cancel")
def cancel_batch(batch_id: str, services: ServicesOf, caller: Worker) -> BatchObject:
    """End a batch: requests under way are stopped, finished ones are in the output file."""
    return batch_object(services.batches.cancel(caller.project_id, batch_id))
