"""Sessions of the console: they end by sign-out, without use, after a day; the cookie is kept nowhere."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy.engine import Engine

from lapis.audit import AuditLog
from lapis.db import open_database
from lapis.errors import NotFoundError
from lapis.gateway.sessions import IDLE_SECONDS, LONGEST_SECONDS, TOUCH_SECONDS, Sessions
from lapis.tenants.keys import ApiKeys


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def db(database_url: str) -> Iterator[Engine]:
    engine = open_database(database_url)
    yield engine
    engine.dispose()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def sessions(db: Engine, clock: Clock) -> Sessions:
    return Sessions(db, clock)


@pytest.fixture
def key_id(db: Engine) -> str:
    return ApiKeys(db).create("laptop", "test")[0].id


def test_a_session_is_found_by_its_cookie_on_every_server(
    sessions: Sessions, db: Engine, clock: Clock, key_id: str
) -> None:
    token = sessions.open(key_id=key_id)
    found = Sessions(db, clock).find(token)
    assert found is not None
    assert found.key_id == key_id
    assert found.actor == f"key:{key_id}"
    assert sessions.find(token + "x") is None
    assert sessions.find("") is None


@pytest.mark.sqlite
def test_the_database_does_not_hold_the_cookie(
    sessions: Sessions, db: Engine, tmp_path: Path, key_id: str
) -> None:
    token = sessions.open(key_id=key_id).encode()
    db.dispose()
    assert all(token not in file.read_bytes() for file in (tmp_path / "home").iterdir())


def test_without_use_it_ends(sessions: Sessions, clock: Clock, key_id: str) -> None:
    token = sessions.open(key_id=key_id)
    clock.now += IDLE_SECONDS - 1
    found = sessions.find(token)
    assert found is not None
    sessions.touch(found)
    clock.now += IDLE_SECONDS - 1
    assert sessions.find(token) is not None
    clock.now += 1
    assert sessions.find(token) is None


def test_after_a_day_it_ends_however_much_it_is_used(sessions: Sessions, clock: Clock, key_id: str) -> None:
    token = sessions.open(key_id=key_id)
    end = clock.now + LONGEST_SECONDS
    while clock.now < end:
        found = sessions.find(token)
        assert found is not None
        sessions.touch(found)
        clock.now += IDLE_SECONDS / 2
    assert sessions.find(token) is None


def test_not_every_click_is_a_write(sessions: Sessions, clock: Clock, key_id: str) -> None:
    token = sessions.open(key_id=key_id)
    clock.now += TOUCH_SECONDS / 2
    first = sessions.find(token)
    assert first is not None
    sessions.touch(first)
    assert sessions.find(token) == first


def test_sign_out_ends_it_and_both_are_audited(sessions: Sessions, db: Engine, key_id: str) -> None:
    token = sessions.open(key_id=key_id)
    found = sessions.find(token)
    assert found is not None
    sessions.end(found)
    sessions.end(found)
    assert sessions.find(token) is None
    acts = [(entry.action, entry.actor) for entry in AuditLog(db).entries()[1:]]
    assert acts == [("session.open", f"key:{key_id}"), ("session.end", f"key:{key_id}")]
    with pytest.raises(NotFoundError):
        sessions.choose_project(found, "default")


def test_what_is_over_is_swept_by_the_next_sign_in(sessions: Sessions, clock: Clock, key_id: str) -> None:
    old = sessions.open(key_id=key_id)
    clock.now += IDLE_SECONDS
    sessions.open(key_id=key_id)
    clock.now -= IDLE_SECONDS
    assert sessions.find(old) is None
