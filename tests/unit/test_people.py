"""Users, service accounts, invitations and admin keys: who belongs where, and whose keys open what."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator

import pytest
import sqlalchemy as sa
from click.testing import CliRunner
from sqlalchemy.engine import Engine

from lapis.audit import AuditLog
from lapis.cli import keys as keys_cli
from lapis.cli import projects as projects_cli
from lapis.cli import users as users_cli
from lapis.db import open_database, write
from lapis.errors import AuthError, ConflictError, IntegrityError, NotFoundError
from lapis.gateway.admission import Admission
from lapis.gateway.audit_events import Wanted, read_events
from lapis.gateway.sessions import Sessions
from lapis.jobs.job import JobSpec
from lapis.jobs.queue import JobQueue
from lapis.jobs.shares import set_weight
from lapis.tenants.admin_keys import AdminKeys
from lapis.tenants.invites import LIFETIME, Invites
from lapis.tenants.keys import ApiKeys
from lapis.tenants.limits import Limits
from lapis.tenants.quota import Quota
from lapis.tenants.service_accounts import ServiceAccounts
from lapis.tenants.tenant import Role, Tenants
from lapis.tenants.users import Users
from tests.tampering import tamper

ANA = "os:ana"


@pytest.fixture
def db(database_url: str) -> Iterator[Engine]:
    engine = open_database(database_url)
    yield engine
    engine.dispose()


def refused(verify: Callable[[str], object], text: str, why: str) -> None:
    with pytest.raises(AuthError, match=why):
        verify(text)


def test_a_users_key_opens_a_project_as_long_as_the_user_has_a_place_there(db: Engine) -> None:
    users, keys = Users(db), ApiKeys(db)
    project = Tenants(db).create_project("search", ANA)
    bo = users.add("Bo@Example.org", Role.READER, ANA)
    assert (bo.email, bo.name) == ("bo@example.org", "bo")
    key, text = keys.create("laptop", ANA, project="search", user_id=bo.id)
    refused(keys.verify, text, "no access")
    users.join(project.id, bo.id, Role.MEMBER, ANA)
    identity = keys.verify(text)
    assert (identity.user_id, identity.project_id, identity.actor) == (bo.id, project.id, f"key:{key.id}")
    users.leave(project.id, bo.id, ANA)
    refused(keys.verify, text, "no access")
    users.set_role(bo.id, Role.OWNER, ANA)  # an owner may work in every project
    keys.verify(text)
    users.remove(bo.id, ANA)
    refused(keys.verify, text, "no access")
    users.add("bo@example.org", Role.OWNER, ANA)  # somebody new with the same address inherits no key
    refused(keys.verify, text, "no access")


def test_a_service_account_is_born_with_a_key_and_takes_its_keys_with_it(db: Engine) -> None:
    accounts, keys = ServiceAccounts(db), ApiKeys(db)
    made, key = accounts.create("ci", "default", ANA)
    assert made.role == "member" and key is not None
    assert keys.verify(key[1]).service_account_id == made.id
    _, second = accounts.create_key(made.id, "default", ANA, scopes=["models.read"])
    accounts.delete(made.id, "default", ANA)
    for text in (key[1], second):
        refused(keys.verify, text, "revoked")
    bare, none = accounts.create("later", "default", ANA, with_key=False)
    assert (bare.role, none) == ("none", None)
    _, text = accounts.create_key(bare.id, "default", ANA)
    refused(keys.verify, text, "no access")
    accounts.update(bare.id, "default", ANA, role="member")
    keys.verify(text)


def test_an_archived_projects_keys_stop_at_once_and_nothing_new_is_begun_in_it(db: Engine) -> None:
    tenants, keys, accounts = Tenants(db), ApiKeys(db), ServiceAccounts(db)
    project = tenants.create_project("old", ANA)
    _, key = accounts.create("ci", project.id, ANA)
    assert key is not None
    keys.verify(key[1])
    assert tenants.archive("old", ANA).archived_at is not None
    refused(keys.verify, key[1], "archived")
    with pytest.raises(ConflictError, match="archived"):
        accounts.create("more", project.id, ANA)
    with pytest.raises(ConflictError, match="archived"):
        keys.create("more", ANA, project="old")
    first = tenants.project(project.id).archived_at
    assert tenants.archive("old", ANA).archived_at == first  # again: nothing changes
    with pytest.raises(ConflictError, match="default"):
        tenants.archive("default", ANA)


def test_nothing_of_another_organization_is_there(db: Engine) -> None:
    acme = Tenants(db).create_organization("acme", ANA).id
    users, accounts = Users(db), ServiceAccounts(db)
    bo = users.add("bo@example.org", Role.OWNER, ANA)
    account, _ = accounts.create("ci", "default", ANA)
    project = Tenants(db).create_project("theirs", ANA, acme)
    for act in (
        lambda: users.get(bo.id, acme),
        lambda: users.remove(bo.id, ANA, acme),
        lambda: users.join("default", bo.id, Role.MEMBER, ANA, acme),
        lambda: users.join(project.id, bo.id, Role.MEMBER, ANA),
        lambda: accounts.get(account.id, "default", acme),
        lambda: accounts.delete(account.id, "default", ANA, acme),
        lambda: accounts.create("ci", "default", ANA, organization_id=acme),
    ):
        with pytest.raises(NotFoundError):
            act()
    assert users.list(acme) == []


def test_an_invitation_is_accepted_once_by_its_address_and_in_time(db: Engine) -> None:
    now = [1000.0]
    invites = Invites(db, lambda: now[0])
    project = Tenants(db).create_project("search", ANA)
    invite = invites.create("bo@example.org", Role.READER, ANA, places={project.id: "member"})
    assert invite.status(now[0]) == "pending"
    assert invites.accept("eve@example.org") is None
    bo = invites.accept("BO@example.org", "Bo")
    assert bo is not None and (bo.email, bo.name, bo.role) == ("bo@example.org", "Bo", Role.READER)
    assert Users(db).member(project.id, bo.id).role is Role.MEMBER
    assert invites.get(invite.id).status(now[0]) == "accepted"
    assert invites.accept("bo@example.org") == bo  # signing in again changes nothing
    with pytest.raises(ConflictError, match="already"):
        invites.create("bo@example.org", Role.OWNER, ANA)
    late = invites.create("late@example.org", Role.OWNER, ANA)
    now[0] += LIFETIME
    assert late.status(now[0]) == "expired"
    assert invites.accept("late@example.org") is None
    invites.delete(late.id, ANA)
    with pytest.raises(ConflictError, match="accepted"):
        invites.delete(invite.id, ANA)


def test_an_admin_key_is_another_kind_of_credential(db: Engine) -> None:
    door = Admission(ApiKeys(db), keys_required=True)
    admin, admin_text = door.admin_keys.create("ops", ANA)
    _, project_text = door.keys.create("laptop", ANA)
    found = door.administrator(admin_text)
    assert (found.organization_id, found.role, found.actor) == ("default", Role.OWNER, f"key:{admin.id}")
    refused(door.identify, admin_text, "administrates")
    refused(door.administrator, project_text, "does not administrate")
    refused(door.administrator, project_text[:-1] + "!", "not valid")
    refused(door.identify, admin_text[:-1] + "!", "not valid")
    door.admin_keys.revoke(admin.prefix, ANA)
    refused(door.administrator, admin_text, "revoked")
    with pytest.raises(AuthError, match="No admin key"):
        door.administrator(None)


def test_an_admin_key_is_worth_no_more_than_its_user(db: Engine) -> None:
    users, admin = Users(db), AdminKeys(db)
    bo = users.add("bo@example.org", Role.OWNER, ANA)
    _, text = admin.create("ops", ANA, user_id=bo.id)
    admin.verify(text).require_owner()
    users.set_role(bo.id, Role.READER, ANA)
    with pytest.raises(AuthError, match="reader"):
        admin.verify(text).require_owner()
    users.remove(bo.id, ANA)
    refused(admin.verify, text, "no longer there")


def test_the_last_use_of_a_key_is_known_to_a_minute_with_one_write_a_minute(db: Engine) -> None:
    now, writes = [1000.0], list[str]()
    keys = ApiKeys(db, lambda: now[0])
    _, text = keys.create("laptop", ANA)
    sa.event.listen(db, "before_cursor_execute", lambda c, cursor, statement, *rest: writes.append(statement))
    for _ in range(5):
        keys.verify(text)
        now[0] += 10.0
    assert sum("UPDATE" in statement for statement in writes) == 1
    assert keys.list()[0].last_used_at == 1000.0
    now[0] = 1070.0
    ApiKeys(db, lambda: now[0]).verify(text)  # another server
    assert keys.list()[0].last_used_at == 1070.0


def test_every_act_is_in_the_audit_log_and_says_whose_it_is(db: Engine) -> None:
    users = Users(db)
    project = Tenants(db).create_project("search", ANA)
    bo = users.add("bo@example.org", Role.READER, ANA)
    users.join(project.id, bo.id, Role.MEMBER, ANA)
    account, _ = ServiceAccounts(db).create("ci", project.id, ANA)
    ServiceAccounts(db).delete(account.id, project.id, ANA)
    acts = [entry.action for entry in AuditLog(db).entries()]
    assert acts == [
        "project.create", "user.add", "project_user.add", "service_account.create", "key.create",
        "key.revoke", "service_account.delete",
    ]  # fmt: skip
    assert AuditLog(db).verify().entries == len(acts)
    with db.connect() as connection:
        rows = connection.execute(
            sa.text("SELECT project_id FROM audit_entries WHERE sequence > 2")
        ).scalars()
        assert set(rows) == {project.id}


def test_what_is_done_in_another_organization_is_shown_to_it_alone(db: Engine) -> None:
    other = Tenants(db).create_organization("acme", ANA).id
    project = Tenants(db).create_project("secret", ANA, other)
    queue, sessions = JobQueue(db), Sessions(db)
    queue.cancel(queue.submit(JobSpec("train", ("true",)), ANA, project.id).id, ANA)
    set_weight(db, project.id, 3.0, ANA, time.time())
    bo = Users(db).add("bo@example.org", Role.OWNER, ANA, organization_id=other)
    with write(db) as connection:
        key, _ = ApiKeys(db).create_in(connection, "laptop", ANA, project.id)
    for token in (sessions.open(key_id=key.id), sessions.open(user_id=bo.id)):
        session = sessions.find(token)
        assert session is not None
        sessions.end(session)
    shown, _ = read_events(db, other, Wanted(everything=True))
    assert [event.type for event in shown][::-1] == [
        "organization.updated", "project.created", "job.submit", "job.cancel", "share.set", "user.added",
        "api_key.created", "login.succeeded", "login.succeeded", "logout.succeeded", "logout.succeeded",
    ]  # fmt: skip
    assert read_events(db, "default", Wanted(everything=True)) == ([], False)


def test_an_entry_given_to_another_project_is_noticed(db: Engine) -> None:
    Tenants(db).create_project("search", ANA)
    tamper(db, "UPDATE audit_entries SET project_id = NULL")
    with pytest.raises(IntegrityError, match="was changed"):
        AuditLog(db).verify()


def test_the_command_line_limits_projects_and_models(db: Engine) -> None:
    run = CliRunner().invoke
    set_ = run(
        projects_cli.group, ["limit", "default", "--tokens-per-day", "1_000", "--concurrent-requests", "4"]
    )
    assert set_.exit_code == 0, set_.output
    assert run(projects_cli.group, ["limit", "default", "--tokens-per-day", "none"]).exit_code == 0
    quota = Tenants(db).project("default").quota
    assert (quota.tokens_per_day, quota.concurrent_requests) == (None, 4)
    args = ["limit", "default", "--model", "tiny", "--requests-per-minute", "9", "--json"]
    assert json.loads(run(projects_cli.group, args).output)["requests_per_minute"] == 9
    assert Limits(db).models("default")["tiny"] == Quota(requests_per_minute=9)
    assert "tokens per day" not in run(projects_cli.group, ["limit", "default"]).output
    for wrong in (["--tokens-per-day", "-1"], ["--model", "tiny", "--storage-bytes", "1"]):
        assert run(projects_cli.group, ["limit", "default", *wrong]).exit_code != 0


def test_a_person_is_added_with_all_places_or_not_at_all(db: Engine) -> None:
    Tenants(db).create_project("search", ANA)
    Tenants(db).create_project("old", ANA)
    Tenants(db).archive("old", ANA)
    run = CliRunner().invoke
    places = ["bo@example.org", "--project", "search", "--project", "old"]
    assert isinstance(run(users_cli.group, ["add", *places]).exception, ConflictError)
    assert Users(db).list() == []
    assert run(users_cli.group, ["add", *places[:3]]).exit_code == 0
    [bo] = Users(db).list()
    assert Users(db).member(Tenants(db).project("search").id, bo.id).role == Role.MEMBER


def test_the_command_line_makes_the_first_administrator(database_url: str) -> None:
    run = CliRunner().invoke
    made = run(projects_cli.group, ["create", "search"])
    assert made.exit_code == 0, made.output
    assert run(users_cli.group, ["add", "bo@example.org", "--project", "search"]).exit_code == 0
    assert "bo@example.org" in run(users_cli.group, ["list"]).output
    text = run(keys_cli.group, ["create", "ops", "--admin", "--role", "reader"]).output.split()[0]
    db = open_database(database_url)
    assert AdminKeys(db).verify(text).role is Role.READER
    assert run(keys_cli.group, ["revoke", text.split("_")[2]]).exit_code == 0
    refused(AdminKeys(db).verify, text, "revoked")
    assert run(keys_cli.group, ["create", "ops", "--admin", "--project", "search"]).exit_code == 2
    assert run(users_cli.group, ["remove", "bo@example.org"]).exit_code == 0
    assert run(projects_cli.group, ["archive", "search"]).exit_code == 0
    assert "archived" in run(projects_cli.group, ["list"]).output
    db.dispose()
