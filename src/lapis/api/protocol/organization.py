"""OpenAI's objects of an organization: projects, users, invitations, admin keys."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, Field

from lapis.api.protocol.generation import Body
from lapis.api.protocol.lists import Listed
from lapis.errors import InputError
from lapis.tenants.admin_keys import ADMIN_MARK, AdminKey
from lapis.tenants.invites import Invite
from lapis.tenants.secret import redacted
from lapis.tenants.tenant import Project
from lapis.tenants.users import Member, User

Name = Annotated[str, Field(min_length=1, max_length=200)]
Email = Annotated[str, Field(min_length=3, max_length=320)]
Lifetime = Annotated[int, Field(gt=0, le=100 * 365 * 86_400)]  # seconds


class ProjectObject(Listed):
    """A project."""

    object: Literal["organization.project"] = "organization.project"
    name: str
    created_at: int
    archived_at: int | None
    status: Literal["active", "archived"]
    external_key_id: None = None
    residency: None = None


def project_object(project: Project) -> ProjectObject:
    """A project as OpenAI's object."""
    return ProjectObject(
        id=project.id,
        name=project.name,
        created_at=int(project.created_at),
        archived_at=whole(project.archived_at),
        status="active" if project.archived_at is None else "archived",
    )


class ProjectFields(Body):
    """What a project is made or changed with. Data stays where the server is: there are no regions to choose."""

    name: Name | None = None
    external_key_id: None = None
    geography: None = None
    residency: None = None


class UserObject(Listed):
    """A user of an organization."""

    object: Literal["organization.user"] = "organization.user"
    name: str
    email: str
    role: Literal["owner", "reader"]
    added_at: int
    api_key_last_used_at: int | None
    is_service_account: Literal[False] = False


def user_object(user: User, last_used_at: float | None) -> UserObject:
    """A user as OpenAI's object."""
    return UserObject(
        id=user.id,
        name=user.name,
        email=user.email,
        role="owner" if user.role == "owner" else "reader",
        added_at=int(user.created_at),
        api_key_last_used_at=whole(last_used_at),
    )


class UserFields(Body):
    """What of a user can be changed: the role. Roles of one's own making are not offered."""

    role: Literal["owner", "reader"] | None = None
    role_id: None = None
    developer_persona: None = None
    technical_level: None = None


class Place(Body):
    """A place in a project that comes with an invitation."""

    id: Annotated[str, Field(min_length=1, max_length=100)]
    role: Literal["member", "owner"]


class InviteObject(Listed):
    """An invitation."""

    object: Literal["organization.invite"] = "organization.invite"
    email: str
    role: Literal["owner", "reader"]
    status: Literal["accepted", "expired", "pending"]
    created_at: int
    expires_at: int
    accepted_at: int | None
    projects: list[Place]


def invite_object(invite: Invite) -> InviteObject:
    """An invitation as OpenAI's object."""
    places = [
        Place(id=project, role="owner" if role == "owner" else "member")
        for project, role in invite.projects.items()
    ]
    return InviteObject(
        id=invite.id,
        email=invite.email,
        role="owner" if invite.role == "owner" else "reader",
        status=invite.status(time.time()),
        created_at=int(invite.created_at),
        expires_at=int(invite.expires_at),
        accepted_at=whole(invite.accepted_at),
        projects=places,
    )


class InviteFields(Body):
    """Whom to invite. Without `projects` it is the default one, as with OpenAI."""

    email: Email
    role: Literal["reader", "owner"]
    projects: Annotated[list[Place], Field(max_length=1000)] | None = None

    def places(self, default: str | None) -> Mapping[str, str]:
        """The roles in projects. Raises InputError for a project that is named twice."""
        if self.projects is None:
            return {} if default is None else {default: "member"}
        places = {place.id: place.role for place in self.projects}
        if len(places) < len(self.projects):
            raise InputError("A project is named twice.", param="projects")
        return places


class MemberObject(Listed):
    """A user of a project."""

    object: Literal["organization.project.user"] = "organization.project.user"
    name: str
    email: str
    role: str
    added_at: int


def member_object(member: Member) -> MemberObject:
    """A user of a project as OpenAI's object."""
    user = member.user
    return MemberObject(
        id=user.id, name=user.name, email=user.email, role=member.role, added_at=int(member.added_at)
    )


class MemberFields(Body):
    """Whom to give a place in a project: a user of the organization, by id or address."""

    role: Literal["owner", "member"]
    user_id: Annotated[str, Field(max_length=100)] | None = None
    email: Email | None = None


class MemberRole(Body):
    """What of a place in a project can be changed."""

    role: Literal["owner", "member"] | None = None


class AdminKeyOwner(BaseModel):
    """Whose an admin key is; without an id it was made at the machine, by who is named."""

    type: Literal["user"] = "user"
    object: Literal["organization.user"] = "organization.user"
    id: str | None
    name: str
    created_at: int | None
    role: str


class AdminKeyObject(Listed):
    """An admin key, without its secret."""

    object: Literal["organization.admin_api_key"] = "organization.admin_api_key"
    name: str
    redacted_value: str
    created_at: int
    expires_at: int | None
    last_used_at: int | None
    owner: AdminKeyOwner


class NewAdminKeyObject(AdminKeyObject):
    """An admin key with its text, which is shown this once."""

    value: str


def admin_key_object(key: AdminKey, user: User | None) -> AdminKeyObject:
    """An admin key as OpenAI's object."""
    return AdminKeyObject(
        id=key.id,
        name=key.name,
        redacted_value=redacted(key.prefix, ADMIN_MARK),
        created_at=int(key.created_at),
        expires_at=whole(key.expires_at),
        last_used_at=whole(key.last_used_at),
        owner=AdminKeyOwner(
            id=key.user_id,
            name=key.created_by if user is None else user.name,
            created_at=None if user is None else int(user.created_at),
            role=key.role,
        ),
    )


class AdminKeyFields(Body):
    """What an admin key is made with."""

    name: Name
    expires_in_seconds: Lifetime | None = None


def whole(at: float | None) -> int | None:
    """A moment in whole seconds."""
    return None if at is None else int(at)


def expiry(seconds: int | None) -> float | None:
    """The moment so many seconds from now."""
    return None if seconds is None else time.time() + seconds
