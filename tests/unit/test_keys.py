"""API keys: shown once, kept as a digest, refused at once when revoked or expired."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from sqlalchemy.engine import Engine

from lapis.audit import AuditLog
from lapis.cli.keys import group
from lapis.db import open_database
from lapis.errors import AuthError, InputError, NotFoundError
from lapis.tenants.keys import LOCAL, ApiKeys
from lapis.tenants.tenant import Scope, Tenants


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "home" / "lapis.db"


@pytest.fixture
def db(database_url: str) -> Iterator[Engine]:
    engine = open_database(database_url)
    yield engine
    engine.dispose()


@pytest.fixture
def keys(db: Engine) -> ApiKeys:
    return ApiKeys(db)


def test_a_key_tells_who_asks(keys: ApiKeys, db: Engine) -> None:
    project = Tenants(db).create_project("search", "os:ana")
    made, text = keys.create("laptop", "os:ana", project="search")
    identity = keys.verify(text)
    assert (identity.organization_id, identity.project_id) == ("default", project.id)
    assert identity.key_id == made.id
    assert identity.scopes == set(Scope) - {Scope.ADMIN}


@pytest.mark.sqlite
def test_the_database_never_holds_a_key(keys: ApiKeys, path: Path, db: Engine) -> None:
    _, text = keys.create("laptop", "os:ana")
    secret = text.split("_")[2].encode()
    db.dispose()
    assert all(secret not in file.read_bytes() for file in path.parent.iterdir())


def test_a_revoked_key_is_refused_at_once_by_everybody(keys: ApiKeys, database_url: str) -> None:
    other = ApiKeys(open_database(database_url))
    made, text = keys.create("laptop", "os:ana")
    assert other.verify(text).key_id == made.id
    keys.revoke(made.prefix, "os:ana")
    with pytest.raises(AuthError, match="revoked"):
        other.verify(text)
    assert (
        keys.revoke(made.prefix, "os:ana").revoked_at == keys.list()[0].revoked_at
    )  # again: nothing changes
    other.db.dispose()


def test_a_key_ends_when_it_expires(db: Engine) -> None:
    now = [1000.0]
    keys = ApiKeys(db, clock=lambda: now[0])
    _, text = keys.create("short", "os:ana", expires_at=1060.0)
    now[0] = 1059.9
    keys.verify(text)
    assert keys.exist()
    now[0] = 1060.0
    assert not keys.exist()
    with pytest.raises(AuthError, match="expired"):
        keys.verify(text)
    for never in (1060.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="expired already"):
            keys.create("late", "os:ana", expires_at=never)


def test_what_is_no_key_is_refused_alike(keys: ApiKeys) -> None:
    made, text = keys.create("laptop", "os:ana")
    wrong = text[:-1] + ("a" if text[-1] != "a" else "b")
    others = [
        "",
        "_",
        "lapis",
        "lapis__",
        f"lapis_{made.prefix}_",
        wrong,
        text + "x",
        text.upper(),
        " " + text,
    ]
    others += [
        "sk-abc",
        "lapis_ünknown_x",
        "lapis_\ud800_x",
        "lapis_a\0b_x",
        "lapis_' OR 1=1 --_x",
        "x" * 100_000,
    ]
    said = set()
    for other in others:
        with pytest.raises(AuthError) as caught:
            keys.verify(other)
        said.add(caught.value.message)
    assert said == {"The API key is not valid."}


def test_a_scope_that_is_missing_is_named(keys: ApiKeys) -> None:
    _, text = keys.create("reader", "os:ana", scopes=["models.read"])
    identity = keys.verify(text)
    identity.require(Scope.MODELS_READ)
    with pytest.raises(AuthError, match=r"models\.use"):
        identity.require(Scope.MODELS_USE)
    LOCAL.require(Scope.ADMIN)


def test_bad_input_is_refused_with_the_nearest_name(keys: ApiKeys) -> None:
    with pytest.raises(InputError, match=r"Did you mean 'models\.use'"):
        keys.create("k", "os:ana", scopes=["models.us"])
    with pytest.raises(InputError, match="without a scope"):
        keys.create("k", "os:ana", scopes=[])
    with pytest.raises(InputError, match="name"):
        keys.create(" ", "os:ana")
    with pytest.raises(NotFoundError, match="Did you mean 'default'"):
        keys.create("k", "os:ana", project="defualt")
    with pytest.raises(NotFoundError):
        keys.revoke("nothing", "os:ana")


def test_every_change_is_in_the_audit_log_and_no_secret_is(keys: ApiKeys, db: Engine) -> None:
    made, text = keys.create("laptop", "os:ana")
    keys.revoke(made.prefix, "os:bo")
    entries = AuditLog(db).entries()
    assert [(e.actor, e.action, e.target) for e in entries] == [
        ("os:ana", "key.create", made.id),
        ("os:bo", "key.revoke", made.id),
    ]
    assert text.split("_")[2] not in json.dumps([dict(entry.facts) for entry in entries])


def test_the_command_line_shows_a_key_once(database_url: str) -> None:
    run = CliRunner().invoke
    made = run(group, ["create", "laptop", "--expires-days", "30", "--scope", "models.read", "--json"])
    assert made.exit_code == 0, made.output
    facts = json.loads(made.output)
    assert facts["key"].startswith(f"lapis_{facts['prefix']}_")
    assert facts["scopes"] == ["models.read"]
    listed = run(group, ["list"])
    assert facts["prefix"] in listed.output
    assert facts["key"] not in listed.output
    revoked = run(group, ["revoke", facts["prefix"]])
    assert revoked.exit_code == 0
    assert json.loads(run(group, ["list", "--json"]).output)[0]["state"] == "revoked"
    db = open_database(database_url)
    assert len(AuditLog(db).entries()) == 2
    db.dispose()
