"""/v1/organization/projects/{project}: members, service accounts and API keys."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Query

from lapis.api.auth import OrganizationOwner, OrganizationReader, ServicesOf
from lapis.api.body import json_body, json_schema
from lapis.api.protocol.lists import After, Deleted, Limit, ListPage, list_page
from lapis.api.protocol.organization import (
    MemberFields,
    MemberObject,
    MemberRole,
    expiry,
    member_object,
)
from lapis.api.protocol.project_keys import (
    KeyFields,
    KeyObject,
    NewKeyFields,
    NewKeyObject,
    NewServiceAccountFields,
    NewServiceAccountObject,
    ServiceAccountFields,
    ServiceAccountObject,
    key_object,
    new_key_object,
    read_scopes,
    service_account_object,
)
from lapis.errors import InputError, NotFoundError
from lapis.gateway.organization import Access, Directory
from lapis.tenants.keys import ApiKeys
from lapis.tenants.service_accounts import ServiceAccounts
from lapis.tenants.tenant import Role
from lapis.tenants.users import Users

router = APIRouter(prefix="/v1/organization/projects/{project_id}")
MemberBody = Annotated[MemberFields, Depends(json_body(MemberFields))]
MemberRoleBody = Annotated[MemberRole, Depends(json_body(MemberRole))]
NewAccountBody = Annotated[NewServiceAccountFields, Depends(json_body(NewServiceAccountFields))]
AccountBody = Annotated[ServiceAccountFields, Depends(json_body(ServiceAccountFields))]
NewKeyBody = Annotated[NewKeyFields, Depends(json_body(NewKeyFields))]
KeyBody = Annotated[KeyFields, Depends(json_body(KeyFields))]
AccessQuery = Annotated[Access, Query()]


@router.get("/users")
def list_members(
    project_id: str, services: ServicesOf, caller: OrganizationReader, after: After = None, limit: Limit = 20
) -> ListPage[MemberObject]:
    """The users of a project."""
    found, more = Directory(services.db, caller.organization_id).members(project_id, after, limit)
    return list_page([member_object(member) for member in found], more)


@router.post("/users", openapi_extra=json_schema(MemberFields))
def create_member(
    project_id: str, services: ServicesOf, caller: OrganizationOwner, body: MemberBody
) -> MemberObject:
    """Give a user of the organization a place in a project."""
    users = Users(services.db)
    if (body.user_id is None) == (body.email is None):
        raise InputError("Exactly one of user_id and email says who it is.", param="user_id")
    user_id = body.user_id
    if body.email is not None:
        found = users.find(body.email, caller.organization_id)
        if found is None:
            raise NotFoundError(f"There is no user {body.email[:60]!r}.")
        user_id = found.id
    assert user_id is not None
    return member_object(
        users.join(project_id, user_id, Role(body.role), caller.actor, caller.organization_id)
    )


@router.get("/users/{user_id}")
def retrieve_member(
    project_id: str, user_id: str, services: ServicesOf, caller: OrganizationReader
) -> MemberObject:
    """One user of a project."""
    return member_object(Users(services.db).member(project_id, user_id, caller.organization_id))


@router.post("/users/{user_id}", openapi_extra=json_schema(MemberRole))
def update_member(
    project_id: str, user_id: str, services: ServicesOf, caller: OrganizationOwner, body: MemberRoleBody
) -> MemberObject:
    """Another role for a user in a project."""
    users = Users(services.db)
    found = users.member(project_id, user_id, caller.organization_id)
    if body.role is not None:
        found = users.join(project_id, user_id, Role(body.role), caller.actor, caller.organization_id)
    return member_object(found)


@router.delete("/users/{user_id}")
def delete_member(project_id: str, user_id: str, services: ServicesOf, caller: OrganizationOwner) -> Deleted:
    """Take a user's place in a project away: the user's keys open it no more."""
    Users(services.db).leave(project_id, user_id, caller.actor, caller.organization_id)
    return Deleted(id=user_id, object="organization.project.user.deleted")


@router.get("/service_accounts")
def list_service_accounts(
    project_id: str, services: ServicesOf, caller: OrganizationReader, after: After = None, limit: Limit = 20
) -> ListPage[ServiceAccountObject]:
    """The service accounts of a project."""
    directory = Directory(services.db, caller.organization_id)
    found, more = directory.service_accounts(project_id, after, limit)
    return list_page([service_account_object(account) for account in found], more)


@router.post("/service_accounts", openapi_extra=json_schema(NewServiceAccountFields))
def create_service_account(
    project_id: str, services: ServicesOf, caller: OrganizationOwner, body: NewAccountBody
) -> NewServiceAccountObject:
    """A service account with a key, whose text is shown this once."""
    account, key = ServiceAccounts(services.db).create(
        body.name,
        project_id,
        caller.actor,
        organization_id=caller.organization_id,
        with_key=not body.create_service_account_only,
        expires_at=expiry(body.expires_in_seconds),
    )
    shown = service_account_object(account)
    return NewServiceAccountObject(**dict(shown), api_key=None if key is None else new_key_object(*key))


@router.get("/service_accounts/{account_id}")
def retrieve_service_account(
    project_id: str, account_id: str, services: ServicesOf, caller: OrganizationReader
) -> ServiceAccountObject:
    """One service account."""
    found = ServiceAccounts(services.db).get(account_id, project_id, caller.organization_id)
    return service_account_object(found)


@router.post("/service_accounts/{account_id}", openapi_extra=json_schema(ServiceAccountFields))
def update_service_account(
    project_id: str, account_id: str, services: ServicesOf, caller: OrganizationOwner, body: AccountBody
) -> ServiceAccountObject:
    """Another name or role for a service account."""
    changed = ServiceAccounts(services.db).update(
        account_id, project_id, caller.actor,
        organization_id=caller.organization_id, name=body.name, role=body.role,
    )  # fmt: skip
    return service_account_object(changed)


@router.delete("/service_accounts/{account_id}")
def delete_service_account(
    project_id: str, account_id: str, services: ServicesOf, caller: OrganizationOwner
) -> Deleted:
    """Remove a service account; its keys are revoked with it."""
    ServiceAccounts(services.db).delete(account_id, project_id, caller.actor, caller.organization_id)
    return Deleted(id=account_id, object="organization.project.service_account.deleted")


@router.post("/service_accounts/{account_id}/api_keys", openapi_extra=json_schema(NewKeyFields))
def create_service_account_key(
    project_id: str, account_id: str, services: ServicesOf, caller: OrganizationOwner, body: NewKeyBody
) -> NewKeyObject:
    """Another key of a service account, whose text is shown this once."""
    key, text = ServiceAccounts(services.db).create_key(
        account_id,
        project_id,
        caller.actor,
        organization_id=caller.organization_id,
        name=body.name,
        scopes=read_scopes(body.scopes),
        expires_at=expiry(body.expires_in_seconds),
    )
    return new_key_object(key, text)


@router.get("/api_keys")
def list_keys(
    project_id: str,
    services: ServicesOf,
    caller: OrganizationReader,
    owner_project_access: AccessQuery = "any",
    after: After = None,
    limit: Limit = 20,
) -> ListPage[KeyObject]:
    """The keys of a project that are not revoked, without their secrets."""
    directory = Directory(services.db, caller.organization_id)
    found, more = directory.keys(project_id, owner_project_access, after, limit)
    return list_page([key_object(key) for key in found], more)


@router.get("/api_keys/{key_id}")
def retrieve_key(project_id: str, key_id: str, services: ServicesOf, caller: OrganizationReader) -> KeyObject:
    """One key of a project, without its secret."""
    return key_object(Directory(services.db, caller.organization_id).key(project_id, key_id))


@router.post("/api_keys/{key_id}", openapi_extra=json_schema(KeyFields))
def update_key(
    project_id: str, key_id: str, services: ServicesOf, caller: OrganizationOwner, body: KeyBody
) -> KeyObject:
    """Other scopes or another end for a key."""
    directory = Directory(services.db, caller.organization_id)
    directory.key(project_id, key_id)
    scopes = None if body.scopes is None else read_scopes(body.scopes)
    ApiKeys(services.db).update(
        key_id, project_id, caller.actor, scopes=scopes, expires_at=expiry(body.expires_in_seconds)
    )
    return key_object(directory.key(project_id, key_id))


@router.delete("/api_keys/{key_id}")
def delete_key(project_id: str, key_id: str, services: ServicesOf, caller: OrganizationOwner) -> Deleted:
    """Revoke a key of a project, at once."""
    Directory(services.db, caller.organization_id).key(project_id, key_id)
    ApiKeys(services.db).revoke(key_id, caller.actor, project_id)
    return Deleted(id=key_id, object="organization.project.api_key.deleted")
