"""The audit log: one chain from many writers; what was edited, dropped or moved is named."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from click.testing import CliRunner
from sqlalchemy.engine import Engine

from lapis.audit import GENESIS, AuditLog, os_user
from lapis.cli.audit import group
from lapis.db import open_database, write
from lapis.errors import IntegrityError
from lapis.hashing import canonical_json, digest_json
from tests.tampering import tamper


@pytest.fixture
def url(database_url: str) -> str:
    return database_url


@pytest.fixture
def db(url: str) -> Iterator[Engine]:
    engine = open_database(url)
    yield engine
    engine.dispose()


@pytest.fixture
def log(db: Engine) -> AuditLog:
    log = AuditLog(db)
    for number in range(1, 6):
        log.append("os:ana", "key.create", f"key_{number}", {"project": "default", "number": number})
    return log


def test_a_whole_log_is_verified_and_read_back(log: AuditLog) -> None:
    summary = log.verify()
    entries = log.entries()
    assert summary.entries == 5
    assert summary.head == entries[-1].digest
    assert [entry.sequence for entry in entries] == [1, 2, 3, 4, 5]
    assert entries[2].facts == {"project": "default", "number": 3}
    assert [entry.sequence for entry in log.entries(after=2, limit=2)] == [3, 4]


def test_an_empty_log_is_whole(db: Engine) -> None:
    assert AuditLog(db).verify().head == GENESIS


@pytest.mark.parametrize(
    ("statement", "named"),
    [
        *(
            (f"UPDATE audit_entries SET {column} = {value} WHERE sequence = {entry}", f"entry {entry} ")
            for column, value in {
                "at": "at + 1",
                "actor": "'os:eve'",
                "action": "'key.look'",
                "target": "'key_9'",
                "facts": "'{}'",
                "previous": f"'{GENESIS[:-1]}1'",
                "digest": f"'{GENESIS[:-1]}1'",
                "organization_id": "'org-9'",
                "project_id": "'proj_9'",
            }.items()
            for entry in (1, 3, 5)
        ),
        ("DELETE FROM audit_entries WHERE sequence = 1", "entry 1 is missing"),
        ("DELETE FROM audit_entries WHERE sequence = 2", "entry 2 is missing"),
        ("DELETE FROM audit_entries WHERE sequence = 5", "entry 5 is missing"),
        ("DELETE FROM audit_entries WHERE sequence >= 4", "entry 4 is missing"),
        ("DELETE FROM audit_entries", "entry 1 is missing"),
        ("UPDATE audit_entries SET sequence = 6 WHERE sequence = 5", "entry 5 is missing"),
        ("INSERT INTO audit_entries SELECT 6, at, actor, action, target, facts, previous, digest, "
         "organization_id, project_id FROM audit_entries WHERE sequence = 5", "entry 6 "),
        ("UPDATE audit_head SET sequence = 3", "entry 4 follows"),
        ("UPDATE audit_head SET sequence = 6", "entry 6 is missing"),
        (f"UPDATE audit_head SET digest = '{GENESIS}'", "end at entry 5"),
        ("DELETE FROM audit_head", "where it ends is missing"),
    ],
)  # fmt: skip
def test_the_first_broken_entry_is_named(log: AuditLog, db: Engine, statement: str, named: str) -> None:
    tamper(db, statement)
    with pytest.raises(IntegrityError, match=named):
        log.verify()


@pytest.mark.sqlite
@pytest.mark.parametrize(
    ("statement", "named"),
    [
        ("UPDATE audit_entries SET actor = x'6f733a61' WHERE sequence = 3", "entry 3 .* was changed"),
        ("UPDATE audit_entries SET actor = CAST(x'ff' AS TEXT) WHERE sequence = 3", "entry 3 was changed"),
        ("UPDATE audit_entries SET at = 9e999 WHERE sequence = 3", "entry 3 .* was changed"),
        ("UPDATE audit_entries SET at = 'then' WHERE sequence = 3", "entry 3 .* was changed"),
        ("UPDATE audit_entries SET facts = '{' WHERE sequence = 3", "entry 3 .* was changed"),
        ("INSERT INTO audit_head VALUES (2, 5, 'x')", "where it ends is there 2 times"),
        ("UPDATE audit_head SET sequence = 'last'", "where it ends was changed"),
    ],
)
def test_values_that_no_entry_can_have_are_named_too(
    log: AuditLog, db: Engine, statement: str, named: str
) -> None:
    tamper(db, statement)
    with pytest.raises(IntegrityError, match=named):
        log.verify()


def test_nothing_is_added_to_a_log_whose_end_is_unknown(log: AuditLog, db: Engine) -> None:
    for statement in ("INSERT INTO audit_head VALUES (2, 5, 'x')", "DELETE FROM audit_head"):
        tamper(db, statement)
        with pytest.raises(IntegrityError, match="lapis audit verify"):
            log.append("os:ana", "key.create", "key_6")


def test_a_kept_head_shows_what_the_database_alone_cannot(log: AuditLog, db: Engine) -> None:
    head = log.verify().head
    assert log.verify(head).head == head
    log.append("os:ana", "key.create", "key_6")
    assert log.verify(head).entries == 6  # the log may grow
    assert log.verify(GENESIS).entries == 6
    with db.connect() as connection:
        kept = connection.execute(sa.text("SELECT digest FROM audit_entries WHERE sequence = 4")).scalar()
    tamper(
        db,
        "DELETE FROM audit_entries WHERE sequence > 4",
        f"UPDATE audit_head SET sequence = 4, digest = '{kept}'",
    )
    assert log.verify().entries == 4  # a chain that is whole, and too short
    with pytest.raises(IntegrityError, match="cut off"):
        log.verify(head)


def test_a_log_that_was_rebuilt_is_not_the_one_whose_head_was_kept(log: AuditLog, db: Engine) -> None:
    head = log.verify().head
    tamper(db, "DELETE FROM audit_entries", f"UPDATE audit_head SET sequence = 0, digest = '{GENESIS}'")
    for number in range(1, 6):
        log.append("os:eve", "key.create", f"key_{number}")
    assert log.verify().entries == 5
    with pytest.raises(IntegrityError, match="rebuilt"):
        log.verify(head)


def test_the_command_line_verifies_lists_and_exports(log: AuditLog, db: Engine, tmp_path: Path) -> None:
    run = CliRunner().invoke
    said = run(group, ["verify"])
    assert said.exit_code == 0, said.output
    head = log.verify().head
    assert "5 entries" in said.output
    assert head in said.output
    assert json.loads(run(group, ["verify", "--head", head, "--json"]).output) == {"entries": 5, "head": head}
    mistyped = run(group, ["verify", "--head", head[:-1]])
    assert mistyped.exit_code == 2 and "64 hexadecimal digits" in mistyped.output
    listed = run(group, ["list", "--limit", "2"]).output
    assert "key_5" in listed
    assert "key_3" not in listed
    assert json.loads(run(group, ["list", "--target", "key_3", "--json"]).output)[0]["sequence"] == 3
    exported = run(group, ["export", str(tmp_path / "audit.jsonl")])
    assert exported.output == f"{tmp_path}/audit.jsonl: 5 entries.\n"
    text = (tmp_path / "audit.jsonl").read_text()
    assert run(group, ["export"]).output == text
    previous = GENESIS
    for number, line in enumerate(map(json.loads, text.splitlines()), 1):
        named = [line[name] for name in ("at", "actor", "action", "target")]
        chained = [number, *named, canonical_json(line["facts"]), previous]
        assert line["previous"] == previous
        assert line["digest"] == digest_json(chained)
        previous = line["digest"]
    assert previous == head
    tamper(db, "DELETE FROM audit_entries WHERE sequence = 5")
    assert isinstance(run(group, ["verify"]).exception, IntegrityError)


def test_entries_that_changed_places_are_noticed(log: AuditLog, db: Engine) -> None:
    swap = "UPDATE audit_entries SET sequence = {} WHERE sequence = {}"
    tamper(db, swap.format(99, 2), swap.format(2, 3), swap.format(3, 99))
    with pytest.raises(IntegrityError, match="entry 2"):
        log.verify()


def test_an_act_that_fails_leaves_no_entry(log: AuditLog, db: Engine) -> None:
    def act() -> None:
        with write(db) as connection:
            log.append_in(connection, "os:ana", "key.revoke", "key_1")
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        act()
    assert log.verify().entries == 5


def test_processes_that_append_at_once_leave_one_chain(log: AuditLog, url: str) -> None:
    code = (
        f"from lapis.audit import AuditLog; from lapis.db import connect; log = AuditLog(connect({url!r}))\n"
        "for number in range(50): log.append('os:many', 'test.append', str(number))"
    )
    started = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE) for _ in range(2)]
    for process in started:
        _, said = process.communicate(timeout=60)
        assert process.returncode == 0, said.decode()
    assert log.verify().entries == 105


def test_the_actor_of_the_command_line_is_the_user_of_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGNAME", "ana")
    assert os_user() == "os:ana"
