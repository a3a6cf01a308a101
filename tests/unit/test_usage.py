"""The usage ledger: reserved before, settled after, never edited; limits hold to the token."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Engine

from lapis.db import open_database, write
from lapis.errors import ConflictError, LimitError, NotFoundError
from lapis.tenants.keys import LOCAL
from lapis.tenants.quota import Consumption, Quota
from lapis.tenants.tenant import Tenants
from lapis.tenants.usage import Balance, Usage, UsageLedger
from tests.tampering import tamper


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000_020.0  # 20 s after a whole minute began

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
def ledger(db: Engine, clock: Clock) -> UsageLedger:
    return UsageLedger(db, clock)


def test_settling_replaces_what_was_reserved(ledger: UsageLedger) -> None:
    reservation = ledger.reserve(LOCAL, "laptop", 100)
    assert ledger.consumption("default") == Consumption(1, 100, 100, 1)
    assert ledger.balance() == Balance(entries=100, used=0, open=100)
    ledger.settle(reservation, Usage(12, 8, cached_tokens=4))
    assert ledger.consumption("default") == Consumption(1, 20, 20, 1)
    assert ledger.balance() == Balance(entries=20, used=20, open=0)


def test_a_released_reservation_costs_nothing_but_the_request(ledger: UsageLedger) -> None:
    reservation = ledger.reserve(LOCAL, "laptop", 100)
    ledger.release(reservation)
    ledger.release(reservation)  # a second time changes nothing
    assert ledger.consumption("default") == Consumption(1, 0, 0, 1)
    assert ledger.balance() == Balance(0, 0, 0)


def test_a_reservation_is_settled_once(ledger: UsageLedger) -> None:
    settled, released = ledger.reserve(LOCAL, "m", 10), ledger.reserve(LOCAL, "m", 10)
    ledger.settle(settled, Usage(1, 1))
    ledger.release(released)
    with pytest.raises(ConflictError, match="settled already"):
        ledger.settle(settled, Usage(1, 1))
    with pytest.raises(ConflictError, match="settled already"):
        ledger.release(settled)
    with pytest.raises(ConflictError, match="released already"):
        ledger.settle(released, Usage(1, 1))
    with pytest.raises(NotFoundError):
        ledger.settle(replace(settled, id="res_none"), Usage(1, 1))
    assert ledger.balance() == Balance(2, 2, 0)


def test_what_a_dead_process_reserved_comes_back(ledger: UsageLedger, db: Engine, clock: Clock) -> None:
    Tenants(db).set_quota("default", Quota(tokens_per_day=100), "os:ana")
    ledger.reserve(LOCAL, "m", 100, lifetime=60)  # and its process dies
    with pytest.raises(LimitError):
        ledger.reserve(LOCAL, "m", 1)
    clock.now += 60
    ledger.reserve(LOCAL, "m", 100)
    assert ledger.balance() == Balance(100, 0, 100)


def test_a_long_request_keeps_its_reservation(ledger: UsageLedger, clock: Clock) -> None:
    reservation = ledger.reserve(LOCAL, "m", 100, lifetime=60)
    clock.now += 59
    ledger.renew(reservation, lifetime=60)
    clock.now += 59
    assert ledger.expire() == 0
    clock.now += 1
    assert ledger.expire() == 1
    with pytest.raises(ConflictError, match="closed"):
        ledger.renew(reservation)


def test_a_settlement_after_expiry_still_counts(ledger: UsageLedger, clock: Clock) -> None:
    reservation = ledger.reserve(LOCAL, "m", 100, lifetime=5)
    clock.now += 5
    assert ledger.expire() == 1
    ledger.settle(reservation, Usage(30, 20))
    assert ledger.balance() == Balance(50, 50, 0)
    assert ledger.consumption("default").tokens_day == 50
    with pytest.raises(ConflictError):
        ledger.settle(reservation, Usage(30, 20))


def test_usage_belongs_to_the_minute_in_which_the_request_began(ledger: UsageLedger, clock: Clock) -> None:
    reservation = ledger.reserve(LOCAL, "m", 100)
    clock.now += 60
    ledger.settle(reservation, Usage(10, 10))
    assert ledger.consumption("default") == Consumption(0, 0, 20, 1)


def test_sums_per_model_project_and_key(ledger: UsageLedger, db: Engine, clock: Clock) -> None:
    project = Tenants(db).create_project("search", "os:ana")
    other = replace(LOCAL, project_id=project.id, key_id="key_1")
    for identity, model, usage in (
        (LOCAL, "a", Usage(1, 2)),
        (other, "b", Usage(5, 5, 3)),
        (other, "a", Usage(1, 1)),
    ):
        ledger.settle(ledger.reserve(identity, model, 50), usage)
        clock.now += 100
    ledger.reserve(LOCAL, "a", 50)  # open: nothing used yet
    by_model = {item.group: (item.requests, item.usage) for item in ledger.summary("model")}
    assert by_model == {"b": (1, Usage(5, 5, 3)), "a": (2, Usage(2, 3, 0))}
    assert [item.group for item in ledger.summary("key_id", project_id=project.id)] == ["key_1"]
    assert [
        item.requests for item in ledger.summary("project_id", since=clock.now - 200, until=clock.now)
    ] == [2]


def test_old_sums_are_forgotten_and_entries_are_not(ledger: UsageLedger, db: Engine, clock: Clock) -> None:
    for _ in range(4):
        ledger.settle(ledger.reserve(LOCAL, "m", 10), Usage(1, 1))
        clock.now += 86_400
    with db.connect() as connection:
        assert (
            connection.execute(
                sa.text("SELECT count(*) FROM usage_windows WHERE seconds = 60 AND model = ''")
            ).scalar()
            == 3
        )
    assert ledger.summary("model")[0].requests == 4


def test_a_ledger_that_was_edited_does_not_balance(ledger: UsageLedger, db: Engine) -> None:
    ledger.settle(ledger.reserve(LOCAL, "m", 10), Usage(1, 1))
    assert ledger.balance().balanced
    with pytest.raises(sa.exc.DBAPIError, match="append-only"), write(db) as connection:
        connection.execute(sa.text("UPDATE usage_entries SET tokens = 0"))
    tamper(db, "UPDATE usage_entries SET tokens = 1 WHERE kind = 'reserve'", table="usage_entries")
    assert not ledger.balance().balanced


def test_a_limit_holds_to_the_token_under_many_clients(db: Engine) -> None:
    Tenants(db).set_quota("default", Quota(tokens_per_day=1000), "os:ana")
    ledger, used, refused = UsageLedger(db, lambda: 1000.0), [0] * 8, [0] * 8

    def client(number: int) -> None:
        for _ in range(8):
            try:
                reservation = ledger.reserve(LOCAL, "m", 70)
            except LimitError:
                refused[number] += 1
                continue
            ledger.settle(reservation, Usage(20, 15))
            used[number] += 35

    threads = [threading.Thread(target=client, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    balance = ledger.balance()
    assert balance == Balance(sum(used), sum(used), 0)
    assert 930 < balance.used <= 1000
    assert sum(refused) > 0
