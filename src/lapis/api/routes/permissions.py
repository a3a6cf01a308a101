"""/v1/fine_tuning/checkpoints/{model}/permissions: a model lent to other projects of the organization."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Query

from lapis.api.auth import Admin, ServicesOf, Viewer
from lapis.api.body import json_body, json_schema
from lapis.api.protocol.fine_tuning import PermissionObject, PermissionRequest, permission_object
from lapis.api.protocol.lists import After, Deleted, Limit, ListPage, list_page

router = APIRouter(prefix="/v1/fine_tuning/checkpoints")
Body = Annotated[PermissionRequest, Depends(json_body(PermissionRequest))]
Order = Annotated[Literal["ascending", "descending"], Query()]


@router.post("/{model:path}/permissions", openapi_extra=json_schema(PermissionRequest))
def create_permissions(
    model: str, services: ServicesOf, caller: Admin, body: Body
) -> ListPage[PermissionObject]:
    """Let other projects of the organization use a model of this one."""
    rows = services.fine_tuned.permit(caller.project_id, model, body.project_ids, caller.actor)
    return list_page([permission_object(row) for row in rows], has_more=False)


@router.get("/{model:path}/permissions")
def list_permissions(
    model: str,
    services: ServicesOf,
    caller: Viewer,
    after: After = None,
    limit: Limit = 10,
    order: Order = "descending",
    project_id: Annotated[str | None, Query()] = None,
) -> ListPage[PermissionObject]:
    """Who else may use a model of this project, the newest permission first."""
    direction: Literal["asc", "desc"] = "asc" if order == "ascending" else "desc"
    page = services.fine_tuned.permissions(
        caller.project_id, model, after=after, limit=limit, order=direction, of=project_id
    )
    return list_page([permission_object(row) for row in page.rows], page.has_more)


@router.delete("/{model:path}/permissions/{permission_id}")
def delete_permission(model: str, permission_id: str, services: ServicesOf, caller: Admin) -> Deleted:
    """Let a project use a model no more."""
    services.fine_tuned.withdraw(caller.project_id, model, permission_id, caller.actor)
    return Deleted(id=permission_id, object="checkpoint.permission")
