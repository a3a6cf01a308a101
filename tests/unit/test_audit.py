"""The audit log: one chain from many writers; what was edited, dropped or moved is named."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
from sqlalchemy.engine import Engine

from lapis.audit import GENESIS, AuditLog, os_user
from lapis.db import open_database, write
from lapis.errors import IntegrityError
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
        ("UPDATE audit_entries SET actor = 'os:eve' WHERE sequence = 3", "entry 3"),
        ("UPDATE audit_entries SET facts = '{}' WHERE sequence = 1", "entry 1"),
        ("UPDATE audit_entries SET at = at + 1 WHERE sequence = 5", "entry 5"),
        ("DELETE FROM audit_entries WHERE sequence = 2", "entry 2 is missing"),
        ("DELETE FROM audit_entries WHERE sequence >= 4", "entry 4 is missing"),
        ("DELETE FROM audit_entries", "entry 1 is missing"),
        ("UPDATE audit_head SET sequence = 3", "entry 4 follows"),
    ],
)
def test_the_first_broken_entry_is_named(log: AuditLog, db: Engine, statement: str, named: str) -> None:
    tamper(db, statement)
    with pytest.raises(IntegrityError, match=named):
        log.verify()


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
