"""/v1/organization: projects, users, invitations and admin keys, for who has an admin key."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Query

from lapis.api.auth import OrganizationOwner, OrganizationReader, ServicesOf
from lapis.api.body import json_body, json_schema
from lapis.api.protocol.lists import After, Deleted, Limit, ListPage, Ordered, list_page
from lapis.api.protocol.organization import (
    AdminKeyFields,
    AdminKeyObject,
    InviteFields,
    InviteObject,
    NewAdminKeyObject,
    ProjectFields,
    ProjectObject,
    UserFields,
    UserObject,
    admin_key_object,
    expiry,
    invite_object,
    project_object,
    user_object,
)
from lapis.errors import InputError, NotFoundError
from lapis.gateway.organization import Directory
from lapis.gateway.services import Services
from lapis.tenants.admin_keys import Administrator, AdminKeys
from lapis.tenants.invites import Invites
from lapis.tenants.tenant import DEFAULT, Role, Tenants
from lapis.tenants.users import User, Users

router = APIRouter(prefix="/v1/organization")
Emails = Annotated[list[str] | None, Query(alias="emails[]", max_length=100)]
ProjectBody = Annotated[ProjectFields, Depends(json_body(ProjectFields))]
UserBody = Annotated[UserFields, Depends(json_body(UserFields))]
InviteBody = Annotated[InviteFields, Depends(json_body(InviteFields))]
AdminKeyBody = Annotated[AdminKeyFields, Depends(json_body(AdminKeyFields))]


@router.post("/projects", openapi_extra=json_schema(ProjectFields))
def create_project(services: ServicesOf, caller: OrganizationOwner, body: ProjectBody) -> ProjectObject:
    """A project without limits, members or keys."""
    if body.name is None:
        raise InputError("The field 'name' is required and missing.", param="name")
    made = Tenants(services.db).create_project(body.name, caller.actor, caller.organization_id)
    return project_object(made)


@router.get("/projects")
def list_projects(
    services: ServicesOf,
    caller: OrganizationReader,
    include_archived: bool = False,
    after: After = None,
    limit: Limit = 20,
) -> ListPage[ProjectObject]:
    """The organization's projects; archived ones only if asked for."""
    found, more = _directory(services, caller).projects(include_archived, after, limit)
    return list_page([project_object(project) for project in found], more)


@router.get("/projects/{project_id}")
def retrieve_project(project_id: str, services: ServicesOf, caller: OrganizationReader) -> ProjectObject:
    """One project."""
    return project_object(_directory(services, caller).project(project_id))


@router.post("/projects/{project_id}", openapi_extra=json_schema(ProjectFields))
def update_project(
    project_id: str, services: ServicesOf, caller: OrganizationOwner, body: ProjectBody
) -> ProjectObject:
    """Another name for a project."""
    found = _directory(services, caller).project(project_id)
    if body.name is None:
        return project_object(found)
    renamed = Tenants(services.db).rename(found.id, body.name, caller.actor, caller.organization_id)
    return project_object(renamed)


@router.post("/projects/{project_id}/archive")
def archive_project(project_id: str, services: ServicesOf, caller: OrganizationOwner) -> ProjectObject:
    """Close a project for good: its keys stop at once."""
    found = _directory(services, caller).project(project_id)
    return project_object(Tenants(services.db).archive(found.id, caller.actor, caller.organization_id))


@router.get("/users")
def list_users(
    services: ServicesOf,
    caller: OrganizationReader,
    emails: Emails = None,
    after: After = None,
    limit: Limit = 20,
) -> ListPage[UserObject]:
    """The organization's users."""
    directory = _directory(services, caller)
    found, more = directory.users(emails or [], after, limit)
    used = directory.last_uses([user.id for user in found])
    return list_page([user_object(user, used.get(user.id)) for user in found], more)


@router.get("/users/{user_id}")
def retrieve_user(user_id: str, services: ServicesOf, caller: OrganizationReader) -> UserObject:
    """One user."""
    user = Users(services.db).get(user_id, caller.organization_id)
    return user_object(user, _directory(services, caller).last_uses([user.id]).get(user.id))


@router.post("/users/{user_id}", openapi_extra=json_schema(UserFields))
def update_user(user_id: str, services: ServicesOf, caller: OrganizationOwner, body: UserBody) -> UserObject:
    """Another role for a user."""
    users = Users(services.db)
    if body.role is not None:
        users.set_role(user_id, Role(body.role), caller.actor, caller.organization_id)
    return retrieve_user(user_id, services, caller)


@router.delete("/users/{user_id}")
def delete_user(user_id: str, services: ServicesOf, caller: OrganizationOwner) -> Deleted:
    """Remove a user from the organization: the user's keys open nothing any more."""
    Users(services.db).remove(user_id, caller.actor, caller.organization_id)
    return Deleted(id=user_id, object="organization.user.deleted")


@router.post("/invites", openapi_extra=json_schema(InviteFields))
def create_invite(services: ServicesOf, caller: OrganizationOwner, body: InviteBody) -> InviteObject:
    """Invite an address for a week. No mail is sent; signing in with the address accepts."""
    places = body.places(_default_project(services, caller))
    made = Invites(services.db).create(
        body.email, Role(body.role), caller.actor, organization_id=caller.organization_id, places=places
    )
    return invite_object(made)


@router.get("/invites")
def list_invites(
    services: ServicesOf, caller: OrganizationReader, after: After = None, limit: Limit = 20
) -> ListPage[InviteObject]:
    """The organization's invitations."""
    found, more = _directory(services, caller).invites(after, limit)
    return list_page([invite_object(invite) for invite in found], more)


@router.get("/invites/{invite_id}")
def retrieve_invite(invite_id: str, services: ServicesOf, caller: OrganizationReader) -> InviteObject:
    """One invitation."""
    return invite_object(Invites(services.db).get(invite_id, caller.organization_id))


@router.delete("/invites/{invite_id}")
def delete_invite(invite_id: str, services: ServicesOf, caller: OrganizationOwner) -> Deleted:
    """Take an invitation back that was not accepted."""
    Invites(services.db).delete(invite_id, caller.actor, caller.organization_id)
    return Deleted(id=invite_id, object="organization.invite.deleted")


@router.post("/admin_api_keys", openapi_extra=json_schema(AdminKeyFields))
def create_admin_key(
    services: ServicesOf, caller: OrganizationOwner, body: AdminKeyBody
) -> NewAdminKeyObject:
    """An admin key, whose text is shown this once. It is an owner's."""
    key, text = AdminKeys(services.db).create(
        body.name,
        caller.actor,
        organization_id=caller.organization_id,
        expires_at=expiry(body.expires_in_seconds),
        user_id=caller.user_id,
    )
    shown = admin_key_object(key, _owners(services, caller, key.user_id).get(key.user_id or ""))
    return NewAdminKeyObject(**dict(shown), value=text)


@router.get("/admin_api_keys")
def list_admin_keys(
    services: ServicesOf,
    caller: OrganizationReader,
    after: After = None,
    limit: Limit = 20,
    order: Ordered = "asc",
) -> ListPage[AdminKeyObject]:
    """The organization's admin keys, without their secrets."""
    found, more = _directory(services, caller).admin_keys(after, limit, order)
    owners = _owners(services, caller, *(key.user_id for key in found))
    return list_page([admin_key_object(key, owners.get(key.user_id or "")) for key in found], more)


@router.get("/admin_api_keys/{key_id}")
def retrieve_admin_key(key_id: str, services: ServicesOf, caller: OrganizationReader) -> AdminKeyObject:
    """One admin key, without its secret."""
    key = _directory(services, caller).admin_key(key_id)
    return admin_key_object(key, _owners(services, caller, key.user_id).get(key.user_id or ""))


@router.delete("/admin_api_keys/{key_id}")
def delete_admin_key(key_id: str, services: ServicesOf, caller: OrganizationOwner) -> Deleted:
    """Revoke an admin key, at once."""
    AdminKeys(services.db).revoke(key_id, caller.actor, caller.organization_id)
    return Deleted(id=key_id, object="organization.admin_api_key.deleted")


def _directory(services: Services, caller: Administrator) -> Directory:
    return Directory(services.db, caller.organization_id)


def _owners(services: Services, caller: Administrator, *user_ids: str | None) -> dict[str, User]:
    known = [user_id for user_id in user_ids if user_id is not None]
    return _directory(services, caller).user_names(known)


def _default_project(services: Services, caller: Administrator) -> str | None:
    """The project that always exists, in the organization that it belongs to."""
    try:
        return _directory(services, caller).project(DEFAULT).id
    except NotFoundError:
        return None
