"""Kept responses: a conversation from its last id, nobody else's, not forever and not without end."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy.engine import Engine

from lapis.db import open_database, write
from lapis.errors import InputError, NotFoundError
from lapis.gateway import stored
from lapis.gateway.stored import LIFETIME, StoredResponse, StoredResponses
from lapis.home import Home
from lapis.tables.tenants import projects


@pytest.fixture
def db(home: Home) -> Iterator[Engine]:
    engine = open_database(home.database_url)
    yield engine
    engine.dispose()


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def turn(id: str, previous: str | None = None, text: str = "") -> StoredResponse:
    answer = {"type": "message", "text": f"answer {id}{text}"}
    return StoredResponse(id, previous, [{"type": "message", "text": f"ask {id}"}], {"output": [answer]})


def test_a_conversation_is_rebuilt_from_its_last_response(db: Engine) -> None:
    kept = StoredResponses(db)
    for id, previous in (("a", None), ("b", "a"), ("c", "b"), ("other", "a")):
        kept.put("default", turn(id, previous))
    said = [item["text"] for item in kept.conversation("default", "c")]
    assert said == ["ask a", "answer a", "ask b", "answer b", "ask c", "answer c"]
    assert kept.get("default", "b") == turn("b", "a")


def test_what_is_missing_is_named(db: Engine) -> None:
    kept = StoredResponses(db)
    for id, previous in (("a", None), ("b", "a")):
        kept.put("default", turn(id, previous))
    kept.delete("default", "a")
    with pytest.raises(NotFoundError, match="'a'") as caught:
        kept.conversation("default", "b")
    assert caught.value.param == "previous_response_id"
    for act in (kept.get, kept.delete):
        with pytest.raises(NotFoundError, match="'a'"):
            act("default", "a")


def test_another_projects_responses_are_not_there(db: Engine) -> None:
    with write(db) as connection:
        connection.execute(
            projects.insert().values(id="p2", organization_id="default", name="p2", created_at=0.0)
        )
    kept = StoredResponses(db)
    kept.put("p2", turn("theirs"))
    kept.put("default", turn("mine", "theirs"))
    for act in (kept.get, kept.delete, kept.conversation):
        with pytest.raises(NotFoundError):
            act("default", "theirs")
    with pytest.raises(NotFoundError, match="'theirs'"):
        kept.conversation("default", "mine")
    assert kept.get("p2", "theirs").id == "theirs"


def test_a_response_expires_unless_its_conversation_goes_on(db: Engine) -> None:
    clock = Clock()
    kept = StoredResponses(db, clock)
    kept.put("default", turn("a"))
    kept.put("default", turn("lonely"))
    clock.now += LIFETIME - 1
    kept.put("default", turn("b", "a"))
    clock.now += 2
    assert len(kept.conversation("default", "b")) == 4
    with pytest.raises(NotFoundError):
        kept.get("default", "lonely")


def test_the_oldest_go_when_a_project_keeps_too_much(db: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "TRIM_BYTES", 1)
    clock = Clock()
    kept = StoredResponses(db, clock, project_bytes=10_000)
    for number in range(20):
        clock.now += 1
        kept.put("default", turn(f"r{number}", text="x" * 1000))
    with pytest.raises(NotFoundError):
        kept.get("default", "r0")
    assert kept.get("default", "r19").id == "r19"
    assert kept.get("default", "r13").id == "r13"


def test_a_conversation_without_end_is_refused(db: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "MAX_TURNS", 3)
    kept = StoredResponses(db)
    previous = None
    for number in range(4):
        kept.put("default", turn(f"r{number}", previous))
        previous = f"r{number}"
    with pytest.raises(InputError, match="more than 3"):
        kept.conversation("default", "r3")
    assert len(kept.conversation("default", "r2")) == 6
