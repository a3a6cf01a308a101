"""Organizations, projects and roles."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy.engine import Engine

from lapis.audit import AuditLog
from lapis.db import open_database
from lapis.errors import ConfigError, ConflictError, InputError, NotFoundError
from lapis.tenants.quota import Quota
from lapis.tenants.tenant import Role, Scope, Tenants


@pytest.fixture
def db(database_url: str) -> Iterator[Engine]:
    engine = open_database(database_url)
    yield engine
    engine.dispose()


def test_a_fresh_installation_has_a_default_organization_and_project(db: Engine) -> None:
    tenants = Tenants(db)
    assert [organization.name for organization in tenants.organizations()] == ["default"]
    assert tenants.project("default").quota == Quota()


def test_projects_are_found_by_name_and_by_id_within_their_organization(db: Engine) -> None:
    tenants = Tenants(db)
    acme = tenants.create_organization("acme", "os:ana")
    search = tenants.create_project("search", "os:ana", acme.id)
    assert tenants.project("search", acme.id) == tenants.project(search.id, acme.id) == search
    with pytest.raises(NotFoundError):
        tenants.project("search")  # of the default organization
    with pytest.raises(NotFoundError, match="organization"):
        tenants.create_project("search", "os:ana", "org-none")


def test_a_name_is_given_once(db: Engine) -> None:
    tenants = Tenants(db)
    with pytest.raises(ConflictError, match="default"):
        tenants.create_organization("default", "os:ana")
    with pytest.raises(ConflictError, match="default"):
        tenants.create_project("default", "os:ana")
    with pytest.raises(InputError):
        tenants.create_project("", "os:ana")


def test_a_quota_is_replaced_and_audited(db: Engine) -> None:
    tenants = Tenants(db)
    quota = Quota(requests_per_minute=10, tokens_per_day=2**40)
    assert tenants.set_quota("default", quota, "os:ana").quota == quota
    assert tenants.project("default").quota == quota
    assert AuditLog(db).entries()[-1].action == "project.set_quota"
    with pytest.raises(ConfigError, match="a limit is a number"):
        Quota(tokens_per_minute=-1)


def test_only_an_owner_may_administer() -> None:
    assert Role.READER.scopes < Role.MEMBER.scopes < Role.OWNER.scopes
    assert Scope.ADMIN in Role.OWNER.scopes - Role.MEMBER.scopes
