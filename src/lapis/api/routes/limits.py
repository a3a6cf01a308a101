"""/v1/organization: rate limits and model permissions of projects, spend limits of projects and the organization."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated

from fastapi import APIRouter, Depends, Query

from lapis.api.auth import OrganizationOwner, OrganizationReader, ServicesOf
from lapis.api.body import json_body, json_schema
from lapis.api.protocol.limits import (
    PREFIX,
    Enforcement,
    PolicyFields,
    PolicyObject,
    RateLimitFields,
    RateLimitObject,
    Removed,
    SpendLimitFields,
    SpendLimitObject,
    policy_object,
    rate_limit_object,
)
from lapis.api.protocol.lists import After, ListPage, list_page
from lapis.errors import InputError, NotFoundError
from lapis.gateway.organization import Directory
from lapis.gateway.services import Services
from lapis.tenants.admin_keys import Administrator
from lapis.tenants.keys import Identity
from lapis.tenants.limits import Limits
from lapis.tenants.policy import EVERY_MODEL, ModelPolicy, family
from lapis.tenants.prices import Prices
from lapis.tenants.quota import CENT, Quota
from lapis.tenants.tenant import Role, Tenants
from lapis.tenants.usage import UsageLedger

router = APIRouter(prefix="/v1/organization")
project = "/projects/{project_id}"
RatesLimit = Annotated[int, Query(ge=1, le=1000)]
Before = Annotated[str | None, Query()]
RateBody = Annotated[RateLimitFields, Depends(json_body(RateLimitFields))]
PolicyBody = Annotated[PolicyFields, Depends(json_body(PolicyFields))]
SpendBody = Annotated[SpendLimitFields, Depends(json_body(SpendLimitFields))]


@router.get(f"{project}/rate_limits")
async def list_rate_limits(
    project_id: str,
    services: ServicesOf,
    caller: OrganizationReader,
    after: After = None,
    before: Before = None,
    limit: RatesLimit = 100,
) -> ListPage[RateLimitObject]:
    """The limits of every model that the project may use, and of those that had limits before, by name."""
    found = await _rates(services, caller, project_id)
    shown = [rate_limit_object(model, quota) for model, quota in sorted(found.items())]
    ids = [one.id for one in shown]
    for name, id in (("after", after), ("before", before)):
        if id is not None and id not in ids:
            raise InputError(f"There is no {id[:80]!r} in this list to go on {name}.", param=name)
    begin = 0 if after is None else ids.index(after) + 1
    end = len(ids) if before is None else ids.index(before)
    if before is not None and after is None:
        return list_page(shown[max(end - limit, 0) : end], end > limit)
    return list_page(shown[begin : min(begin + limit, end)], begin + limit < end)


@router.post(f"{project}/rate_limits/{{rate_limit_id:path}}", openapi_extra=json_schema(RateLimitFields))
async def update_rate_limit(
    project_id: str, rate_limit_id: str, services: ServicesOf, caller: OrganizationOwner, body: RateBody
) -> RateLimitObject:
    """Other limits for one model in a project; they hold from the next request on."""
    found = await _rates(services, caller, project_id)
    model = rate_limit_id.removeprefix(PREFIX)
    if not rate_limit_id.startswith(PREFIX) or model not in found:
        raise NotFoundError(f"There is no rate limit {rate_limit_id[:80]!r}.")
    quota = body.applied(found[model])
    limits = Limits(services.db)
    await asyncio.to_thread(limits.set_model, project_id, model, quota, caller.actor, caller.organization_id)
    return rate_limit_object(model, quota)


@router.get(f"{project}/model_permissions")
def retrieve_policy(project_id: str, services: ServicesOf, caller: OrganizationReader) -> PolicyObject:
    """Which models the project may use."""
    return policy_object(Limits(services.db).policy(project_id, caller.organization_id))


@router.post(f"{project}/model_permissions", openapi_extra=json_schema(PolicyFields))
def update_policy(
    project_id: str, services: ServicesOf, caller: OrganizationOwner, body: PolicyBody
) -> PolicyObject:
    """Let the project use only some models, or all but some, from the next request on."""
    policy = ModelPolicy(body.mode, frozenset(body.model_ids))
    Limits(services.db).set_policy(project_id, policy, caller.actor, caller.organization_id)
    return policy_object(policy)


@router.delete(f"{project}/model_permissions")
def delete_policy(project_id: str, services: ServicesOf, caller: OrganizationOwner) -> Removed:
    """Let the project use every model."""
    Limits(services.db).set_policy(project_id, EVERY_MODEL, caller.actor, caller.organization_id)
    return Removed(object="project.model_permissions.deleted")


@router.get(f"{project}/spend_limit")
def retrieve_project_spend(
    project_id: str, services: ServicesOf, caller: OrganizationReader
) -> SpendLimitObject:
    """What the project may spend in a month."""
    cents = Directory(services.db, caller.organization_id).project(project_id).quota.spend_per_month
    spent = UsageLedger(services.db).month_cost(project_id=project_id)
    return _spend_object(services, "project", cents, spent)


@router.post(f"{project}/spend_limit", openapi_extra=json_schema(SpendLimitFields))
def update_project_spend(
    project_id: str, services: ServicesOf, caller: OrganizationOwner, body: SpendBody
) -> SpendLimitObject:
    """Limit what the project may spend in a month."""
    _check_currency(services, body.currency)
    _set_project_spend(services, caller, project_id, body.threshold_amount)
    return retrieve_project_spend(project_id, services, caller)


@router.delete(f"{project}/spend_limit")
def delete_project_spend(project_id: str, services: ServicesOf, caller: OrganizationOwner) -> Removed:
    """Take the limit on the project's spending away."""
    _set_project_spend(services, caller, project_id, None)
    return Removed(object="project.spend_limit.deleted")


@router.get("/spend_limit")
def retrieve_spend(services: ServicesOf, caller: OrganizationReader) -> SpendLimitObject:
    """What the organization may spend in a month."""
    cents = Limits(services.db).spend(caller.organization_id)
    spent = UsageLedger(services.db).month_cost(organization_id=caller.organization_id)
    return _spend_object(services, "organization", cents, spent)


@router.post("/spend_limit", openapi_extra=json_schema(SpendLimitFields))
def update_spend(services: ServicesOf, caller: OrganizationOwner, body: SpendBody) -> SpendLimitObject:
    """Limit what the organization may spend in a month."""
    _check_currency(services, body.currency)
    Limits(services.db).set_spend(caller.organization_id, body.threshold_amount, caller.actor)
    return retrieve_spend(services, caller)


@router.delete("/spend_limit")
def delete_spend(services: ServicesOf, caller: OrganizationOwner) -> Removed:
    """Take the limit on the organization's spending away."""
    Limits(services.db).set_spend(caller.organization_id, None, caller.actor)
    return Removed(object="organization.spend_limit.deleted")


async def _rates(services: Services, caller: Administrator, project_id: str) -> Mapping[str, Quota]:
    """The limits of a project's models, by name. Raises NotFoundError for the project."""
    limits, organization = Limits(services.db), caller.organization_id
    known = await asyncio.to_thread(limits.models, project_id, organization)
    policy = await asyncio.to_thread(limits.policy, project_id, organization)
    viewer = Identity(organization, project_id, None, Role.READER.scopes, models=policy)
    served = services.router.models(viewer)
    return {**{family(servable.name): Quota() for servable, _ in served}, **known}


def _set_project_spend(services: Services, caller: Administrator, project_id: str, cents: int | None) -> None:
    found = Directory(services.db, caller.organization_id).project(project_id)
    quota = replace(found.quota, spend_per_month=cents)
    Tenants(services.db).set_quota(found.id, quota, caller.actor, caller.organization_id)


def _spend_object(services: Services, of: str, cents: int | None, spent: int) -> SpendLimitObject:
    if cents is None:
        raise NotFoundError(f"The {of} has no limit on what it spends.")
    return SpendLimitObject(
        object="project.spend_limit" if of == "project" else "organization.spend_limit",
        currency=_currency(services),
        threshold_amount=cents,
        enforcement=Enforcement(status="enforcing" if spent >= cents * CENT else "inactive"),
    )


def _check_currency(services: Services, currency: str) -> None:
    if currency != _currency(services):
        raise InputError(f"Prices are in {_currency(services)}, not in {currency}.", param="currency")


def _currency(services: Services) -> str:
    return Prices(services.home.prices).current().currency.upper()
