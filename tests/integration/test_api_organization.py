"""client.admin.organization: projects, people and keys through the official client; roles; other organizations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import pytest

from lapis.audit import AuditLog
from lapis.home import Home
from lapis.server import RunningServer
from lapis.tenants.admin_keys import AdminKeys
from lapis.tenants.invites import Invites
from lapis.tenants.keys import ApiKeys
from lapis.tenants.tenant import Role, Tenants
from lapis.tenants.users import Users
from tests.served import fake_server

ACTOR = "test"


@dataclass
class Place:
    """A server that wants keys, and two organizations' clients."""

    server: RunningServer
    owner: openai.OpenAI
    reader: openai.OpenAI
    foreign: openai.OpenAI  # an owner of another organization

    def client(self, key: str) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=self.server.url, api_key=key, max_retries=0, _strict_response_validation=True
        )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    home = Home(tmp_path_factory.mktemp("organization"))
    from lapis.db import open_database

    db = open_database(home.database_url)
    acme = Tenants(db).create_organization("acme", ACTOR).id
    ApiKeys(db).create("door", ACTOR)
    keys = AdminKeys(db)
    texts = [
        keys.create("owner", ACTOR)[1],
        keys.create("reader", ACTOR, role=Role.READER)[1],
        keys.create("foreign", ACTOR, organization_id=acme)[1],
    ]
    db.dispose()
    with fake_server(home, load=False) as server:
        clients = [
            openai.OpenAI(
                base_url=server.url,
                api_key="none",
                admin_api_key=text,
                max_retries=0,
                _strict_response_validation=True,
            )
            for text in texts
        ]
        yield Place(server, *clients)
        for client in clients:
            client.close()


def test_a_project_is_made_renamed_listed_and_archived(place: Place) -> None:
    projects = place.owner.admin.organization.projects
    made = projects.create(name="search")
    assert (made.name, made.status, made.archived_at) == ("search", "active", None)
    assert projects.update(made.id, name="find").name == "find"
    assert projects.retrieve(made.id).name == "find"
    account = projects.service_accounts.create(made.id, name="ci")
    assert account.api_key is not None and account.role == "member"
    with place.client(account.api_key.value) as working:
        assert working.models.list().data[0].id == "tiny"
        assert projects.archive(made.id).status == "archived"
        with pytest.raises(openai.AuthenticationError, match="archived"):
            working.models.list()
    assert made.id not in [project.id for project in projects.list()]
    assert made.id in [project.id for project in projects.list(include_archived=True)]
    with pytest.raises(openai.ConflictError):
        projects.create(name="find")
    with pytest.raises(openai.BadRequestError, match="geography"):
        projects.create(name="far", geography="EU")


def test_lists_are_walked_to_their_end_and_nothing_comes_twice(place: Place) -> None:
    projects = place.owner.admin.organization.projects
    made = {projects.create(name=f"walk-{number}").id for number in range(5)}
    found = [project.id for project in projects.list(limit=2)]
    assert len(found) == len(set(found))
    assert made <= set(found)
    accounts = projects.service_accounts
    home = next(iter(made))
    born = [accounts.create(home, name=f"bot-{number}").id for number in range(5)]
    assert [account.id for account in accounts.list(home, limit=2)] == born[::-1]
    assert len([key.id for key in projects.api_keys.list(home, limit=2)]) == 5
    with pytest.raises(openai.BadRequestError, match="go on after"):
        projects.list(after="proj_none")


def test_a_service_accounts_keys_are_shown_once_and_end_with_it(place: Place) -> None:
    projects = place.owner.admin.organization.projects
    home = projects.create(name="bots").id
    accounts = projects.service_accounts
    account = accounts.create(home, name="ci", expires_in_seconds=3600)
    assert account.api_key is not None and account.api_key.expires_at is not None
    extra = accounts.api_keys.create(account.id, project_id=home, name="only reads", scopes=["api.all.read"])
    with place.client(extra.value) as reading:
        reading.models.list()
        with pytest.raises(openai.PermissionDeniedError, match=r"models\.use"):
            reading.completions.create(model="tiny", prompt="x", max_tokens=1)
    shown = projects.api_keys.retrieve(extra.id, project_id=home)
    assert extra.value not in shown.model_dump_json()
    assert shown.redacted_value == f"lapis_{extra.value.split('_')[1]}_***"
    assert shown.owner.service_account is not None and shown.owner.service_account.id == account.id
    assert shown.last_used_at is not None
    projects.api_keys.update(extra.id, project_id=home, scopes=[])
    with place.client(extra.value) as working:
        working.completions.create(model="tiny", prompt="x", max_tokens=1)
        assert accounts.update(account.id, project_id=home, name="cd", role="owner").role == "owner"
        assert accounts.retrieve(account.id, project_id=home).name == "cd"
        assert projects.api_keys.delete(extra.id, project_id=home).deleted
        with pytest.raises(openai.AuthenticationError, match="revoked"):
            working.models.list()
    with pytest.raises(openai.NotFoundError):
        projects.api_keys.retrieve(extra.id, project_id=home)
    with place.client(account.api_key.value) as working:
        assert accounts.delete(account.id, project_id=home).deleted
        with pytest.raises(openai.AuthenticationError, match="revoked"):
            working.models.list()
    bare = accounts.create(home, name="later", create_service_account_only=True)
    assert (bare.role, bare.api_key) == ("none", None)
    with pytest.raises(openai.BadRequestError, match="administrate"):
        accounts.api_keys.create(bare.id, project_id=home, scopes=["admin"])


def test_people_are_invited_join_projects_and_leave(place: Place) -> None:
    organization, db = place.owner.admin.organization, place.server.services.db
    home = organization.projects.create(name="people").id
    invite = organization.invites.create(
        email="Bo@example.org", role="reader", projects=[{"id": home, "role": "member"}]
    )
    assert (invite.email, invite.status) == ("bo@example.org", "pending")
    plain = organization.invites.create(email="eve@example.org", role="owner")
    assert [place_.id for place_ in plain.projects] == ["default"]
    assert organization.invites.delete(plain.id).deleted
    bo = Invites(db).accept("bo@example.org", "Bo")
    assert bo is not None
    assert organization.invites.retrieve(invite.id).status == "accepted"
    assert [one.id for one in organization.invites.list(limit=1)] == [invite.id]
    members = organization.projects.users
    assert [(one.email, one.role) for one in members.list(home)] == [("bo@example.org", "member")]
    _, text = ApiKeys(db).create("laptop", ACTOR, project="people", user_id=bo.id)
    with place.client(text) as working:
        working.models.list()
        assert members.delete(bo.id, project_id=home).deleted
        with pytest.raises(openai.AuthenticationError, match="no access"):
            working.models.list()
        keys = organization.projects.api_keys
        assert [key.owner_project_access for key in keys.list(home)] == ["inactive"]
        assert list(keys.list(home, owner_project_access="active")) == []
        assert members.create(home, role="owner", email="bo@example.org").role == "owner"
        assert members.update(bo.id, project_id=home, role="member").role == "member"
        assert members.retrieve(bo.id, project_id=home).id == bo.id
        working.models.list()
    assert organization.users.retrieve(bo.id).api_key_last_used_at is not None
    assert [one.id for one in organization.users.list(emails=["bo@example.org", "x@y.z"])] == [bo.id]
    assert organization.users.update(bo.id, role="owner").role == "owner"
    assert organization.users.delete(bo.id).deleted
    with pytest.raises(openai.NotFoundError):
        organization.users.retrieve(bo.id)


def test_admin_keys_make_each_other_and_end_at_once(place: Place) -> None:
    keys = place.owner.admin.organization.admin_api_keys
    made = keys.create(name="second", expires_in_seconds=60)
    assert made.value.startswith("lapis_admin_")
    assert made.value not in keys.retrieve(made.id).model_dump_json()
    assert made.id in [key.id for key in keys.list(limit=1)]
    other = place.owner.with_options(admin_api_key=made.value)
    other.admin.organization.users.list()
    assert keys.delete(made.id).deleted
    with pytest.raises(openai.AuthenticationError, match="revoked"):
        other.admin.organization.users.list()
    with pytest.raises(openai.NotFoundError):
        keys.delete(made.id)


def test_a_project_key_does_not_administrate_and_an_admin_key_does_no_work(place: Place) -> None:
    _, text = ApiKeys(place.server.services.db).create("worker", ACTOR, scopes=["admin", "models.use"])
    wrong = place.owner.with_options(admin_api_key=text)
    with pytest.raises(openai.AuthenticationError, match="does not administrate"):
        wrong.admin.organization.projects.list()
    assert place.owner.admin_api_key is not None
    with (
        place.client(place.owner.admin_api_key) as working,
        pytest.raises(openai.AuthenticationError, match="does no work"),
    ):
        working.models.list()
    bare = httpx.get(f"{place.server.url}/organization/projects")
    assert bare.status_code == 401 and "No admin key" in bare.json()["error"]["message"]


Act = Callable[[Any, dict[str, str]], object]
READS: list[Act] = [
    lambda o, i: o.projects.retrieve(i["project"]),
    lambda o, i: o.users.retrieve(i["user"]),
    lambda o, i: o.invites.retrieve(i["invite"]),
    lambda o, i: o.admin_api_keys.retrieve(i["admin_key"]),
    lambda o, i: o.projects.users.list(i["project"]),
    lambda o, i: o.projects.users.retrieve(i["user"], project_id=i["project"]),
    lambda o, i: o.projects.service_accounts.list(i["project"]),
    lambda o, i: o.projects.service_accounts.retrieve(i["account"], project_id=i["project"]),
    lambda o, i: o.projects.api_keys.list(i["project"]),
    lambda o, i: o.projects.api_keys.retrieve(i["key"], project_id=i["project"]),
]
WRITES: list[Act] = [
    lambda o, i: o.projects.update(i["project"], name="taken"),
    lambda o, i: o.projects.archive(i["project"]),
    lambda o, i: o.users.update(i["user"], role="owner"),
    lambda o, i: o.users.delete(i["user"]),
    lambda o, i: o.invites.create(
        email="c@example.org", role="reader", projects=[{"id": i["project"], "role": "member"}]
    ),
    lambda o, i: o.invites.delete(i["invite"]),
    lambda o, i: o.admin_api_keys.delete(i["admin_key"]),
    lambda o, i: o.projects.users.create(i["project"], role="member", user_id=i["user"]),
    lambda o, i: o.projects.users.update(i["user"], project_id=i["project"], role="owner"),
    lambda o, i: o.projects.users.delete(i["user"], project_id=i["project"]),
    lambda o, i: o.projects.service_accounts.create(i["project"], name="x"),
    lambda o, i: o.projects.service_accounts.update(i["account"], project_id=i["project"], name="x"),
    lambda o, i: o.projects.service_accounts.delete(i["account"], project_id=i["project"]),
    lambda o, i: o.projects.service_accounts.api_keys.create(i["account"], project_id=i["project"]),
    lambda o, i: o.projects.api_keys.update(i["key"], project_id=i["project"], scopes=[]),
    lambda o, i: o.projects.api_keys.delete(i["key"], project_id=i["project"]),
]


def test_a_reader_sees_all_and_changes_nothing_and_another_organization_sees_nothing(place: Place) -> None:
    organization, db = place.owner.admin.organization, place.server.services.db
    project = organization.projects.create(name="closed").id
    user = Users(db).add("cy@example.org", Role.READER, ACTOR)
    organization.projects.users.create(project, role="member", user_id=user.id)
    account = organization.projects.service_accounts.create(project, name="ci")
    assert account.api_key is not None
    ids = {
        "project": project, "user": user.id, "account": account.id, "key": account.api_key.id,
        "invite": organization.invites.create(email="di@example.org", role="reader").id,
        "admin_key": AdminKeys(db).list("default")[0].id,
    }  # fmt: skip
    for read in READS:
        read(place.reader.admin.organization, ids)
    log = AuditLog(db)
    before = log.entries(limit=10_000)[-1].sequence
    for write in WRITES:
        with pytest.raises(openai.PermissionDeniedError, match="reader"):
            write(place.reader.admin.organization, ids)
    for act in READS + WRITES:
        with pytest.raises(openai.NotFoundError) as caught:
            act(place.foreign.admin.organization, ids)
        unknown = dict.fromkeys(ids, "none")
        with pytest.raises(openai.NotFoundError) as nothing:
            act(place.foreign.admin.organization, unknown)
        hidden = str(caught.value.message)
        for id in ids.values():
            hidden = hidden.replace(id, "none")
        assert hidden == str(nothing.value.message)  # not a word more than of what never was
    assert log.entries(before) == []
    for listed in ("projects", "users", "invites"):
        assert list(getattr(place.foreign.admin.organization, listed).list()) == []
    mine = [key.name for key in place.foreign.admin.organization.admin_api_keys.list()]
    assert mine == ["foreign"]


def test_what_is_not_offered_says_so_to_who_administrates(place: Place) -> None:
    with pytest.raises(openai.InternalServerError, match="Roles and groups") as caught:
        place.owner.admin.organization.projects.roles.list("default")
    assert caught.value.status_code == 501
    with pytest.raises(openai.InternalServerError, match="not offered"):
        place.owner.admin.organization.groups.list()
