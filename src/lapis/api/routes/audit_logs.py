"""GET /v1/organization/audit_logs: who did what in an organization."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query

from lapis.api.auth import OrganizationReader, ServicesOf
from lapis.api.protocol.audit import AuditEvent, audit_event
from lapis.api.protocol.lists import After, Limit, ListPage, list_page
from lapis.errors import InputError
from lapis.gateway.audit_events import Wanted, read_events

router = APIRouter(prefix="/v1/organization/audit_logs")


def _names(name: str) -> Any:
    return Query(alias=f"{name}[]", max_length=200)


def _bound(name: str) -> Any:
    return Query(alias=f"effective_at[{name}]", ge=0, le=10**12)


@router.get("")
def list_audit_logs(
    services: ServicesOf,
    caller: OrganizationReader,
    after: After = None,
    before: Annotated[str | None, Query()] = None,
    limit: Limit = 20,
    event_types: Annotated[list[str] | None, _names("event_types")] = None,
    actor_ids: Annotated[list[str] | None, _names("actor_ids")] = None,
    actor_emails: Annotated[list[str] | None, _names("actor_emails")] = None,
    project_ids: Annotated[list[str] | None, _names("project_ids")] = None,
    resource_ids: Annotated[list[str] | None, _names("resource_ids")] = None,
    gt: Annotated[int | None, _bound("gt")] = None,
    gte: Annotated[int | None, _bound("gte")] = None,
    lt: Annotated[int | None, _bound("lt")] = None,
    lte: Annotated[int | None, _bound("lte")] = None,
    tenant_only: bool = False,
    everything: bool = False,
) -> ListPage[AuditEvent]:
    """Events, the newest first. With `everything` (not OpenAI's) also acts that OpenAI has no type for."""
    if after is not None and before is not None:
        raise InputError("Either after or before, not both.", param="before")
    if tenant_only:  # OpenAI's tenants span organizations; here nothing does
        return list_page([], False)
    bounds = {"gt": gt, "gte": gte, "lt": lt, "lte": lte}
    wanted = Wanted(
        event_types or (), actor_ids or (), actor_emails or (), project_ids or (), resource_ids or (),
        {name: moment for name, moment in bounds.items() if moment is not None}, everything,
    )  # fmt: skip
    found, more = read_events(
        services.db, caller.organization_id, wanted, after=after, before=before, limit=limit
    )
    return list_page([audit_event(event) for event in found], more)
