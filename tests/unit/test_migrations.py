"""A database of every earlier schema, with rows in it, goes on under this one: nothing is lost, keys keep working."""

from __future__ import annotations

import importlib.resources
import json
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.config import Config
from alembic.runtime.environment import EnvironmentContext
from alembic.script import ScriptDirectory
from sqlalchemy.engine import Connection

from lapis import db as database
from lapis.audit import GENESIS, AuditLog
from lapis.hashing import canonical_json, digest_json
from lapis.tenants.keys import LOCAL, ApiKeys
from lapis.tenants.secret import new_secret
from lapis.tenants.tenant import Scope, Tenants
from lapis.tenants.usage import Usage, UsageLedger

DAY_AGO = 1_700_000_000.0


def make(url: str, revision: str) -> None:
    """A database as that revision's Lapis left it."""
    script = ScriptDirectory(str(importlib.resources.files("lapis.migrations")))
    engine = database.connect(url)

    def steps(current: Any, context: Any) -> Any:
        return script._upgrade_revs(revision, current)

    with database.write(engine) as connection, EnvironmentContext(Config(), script, fn=steps) as environment:
        environment.configure(connection=connection, transactional_ddl=True)
        environment.run_migrations()
    engine.dispose()


def insert(connection: Connection, table: str, **row: Any) -> None:
    names = ", ".join(row)
    connection.execute(
        sa.text(f"INSERT INTO {table} ({names}) VALUES ({', '.join(f':{n}' for n in row)})"), row
    )


def fill(connection: Connection) -> dict[str, str]:
    """Rows in the tables of schema 001; the texts of the keys among them, by their names."""
    insert(connection, "organizations", id="org-1", name="acme", created_at=DAY_AGO)
    insert(
        connection, "projects", id="proj_1", organization_id="default", name="search", created_at=DAY_AGO,
        requests_per_minute=None, tokens_per_minute=None, tokens_per_day=1000,
    )  # fmt: skip
    texts = {}
    for name, scopes in (("full", "models.read models.use"), ("look", "models.read"), ("all", "admin")):
        secret, texts[name] = new_secret()
        insert(
            connection, "api_keys", id=f"key_{name}", project_id="proj_1", name=name, scopes=scopes,
            created_at=DAY_AGO, created_by="os:ana", expires_at=None, revoked_at=None, **vars(secret),
        )  # fmt: skip
    for kind, tokens in (("reserve", 50), ("reverse", -50), ("use", 30)):
        insert(
            connection, "usage_entries", reservation_id="res_1", kind=kind, at=DAY_AGO, project_id="proj_1",
            key_id="key_full", model="tiny", tokens=tokens, prompt_tokens=10 if kind == "use" else 0,
            completion_tokens=20 if kind == "use" else 0, cached_tokens=0, reason="",
        )  # fmt: skip
    insert(
        connection, "open_reservations", id="res_2", project_id="proj_1", key_id=None, model="tiny",
        tokens=5, at=DAY_AGO, expires_at=DAY_AGO + 600,
    )  # fmt: skip
    insert(
        connection, "usage_entries", reservation_id="res_2", kind="reserve", at=DAY_AGO, project_id="proj_1",
        key_id=None, model="tiny", tokens=5, prompt_tokens=0, completion_tokens=0, cached_tokens=0, reason="",
    )  # fmt: skip
    insert(
        connection, "jobs", id="job_1", project_id="proj_1", name="train", reason="", state="queued",
        spec=json.dumps({"name": "train", "argv": ["true"], "resources": {"cpus": 1.0, "gpus": 0}}),
        attempt=0, losses=0, created_at=DAY_AGO, created_by="os:ana",
    )  # fmt: skip
    facts = canonical_json({"project_id": "proj_1", "name": "full"})
    entry = [1, DAY_AGO, "os:ana", "key.create", "key_full", facts, GENESIS]
    names = ("sequence", "at", "actor", "action", "target", "facts", "previous")
    insert(connection, "audit_entries", **dict(zip(names, entry, strict=True)), digest=digest_json(entry))
    connection.execute(sa.text("UPDATE audit_head SET sequence = 1, digest = :d"), {"d": digest_json(entry)})
    return texts


@pytest.mark.parametrize("revision", ["001", "002"])
def test_an_older_database_goes_on_with_all_that_is_in_it(empty_database_url: str, revision: str) -> None:
    url = empty_database_url
    make(url, revision)
    before = database.connect(url)
    with database.write(before) as connection:
        texts = fill(connection)
    before.dispose()

    db = database.open_database(url)
    keys = ApiKeys(db)
    full = keys.verify(texts["full"])
    assert (full.project_id, full.key_id, full.user_id) == ("proj_1", "key_full", None)
    assert full.scopes == {Scope.MODELS_READ, Scope.MODELS_USE, Scope.WORK_READ, Scope.WORK_WRITE}
    assert keys.verify(texts["look"]).scopes == {Scope.MODELS_READ}
    assert keys.verify(texts["all"]).scopes == {Scope.ADMIN}

    project = Tenants(db).project("search")
    assert (project.quota.tokens_per_day, project.archived_at) == (1000, None)
    ledger = UsageLedger(db)
    assert (ledger.balance().used, ledger.balance().open, ledger.balance().balanced) == (30, 5, True)
    assert ledger.expire() == 1
    ledger.settle(ledger.reserve(LOCAL, "tiny", 10), Usage(3, 4))
    assert ledger.balance().used == 37

    audit = AuditLog(db)
    assert audit.entries()[0].facts == {"project_id": "proj_1", "name": "full"}
    assert audit.verify().entries == 1
    with db.connect() as connection:
        found = connection.execute(sa.text("SELECT project_id FROM audit_entries")).scalar()
        assert found == "proj_1"
    with pytest.raises(sa.exc.DBAPIError, match="append-only"), database.write(db) as connection:
        connection.execute(sa.text("UPDATE audit_entries SET project_id = 'other'"))
    db.dispose()
