"""Whatever happens to reservations, the ledger balances and agrees with a simple model of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy.engine import Engine

from lapis.db import open_database
from lapis.errors import ConflictError, LimitError
from lapis.home import Home
from lapis.tenants.keys import LOCAL
from lapis.tenants.quota import Quota
from lapis.tenants.tenant import Tenants
from lapis.tenants.usage import Balance, Reservation, Usage, UsageLedger

LIFETIME, LIMIT = 50.0, 1000
STEPS = st.tuples(
    st.sampled_from(["reserve", "settle", "release", "crash", "renew", "wait"]),
    st.integers(0, 200),  # tokens, or seconds
    st.integers(0, 5),  # which of the reservations
)


@pytest.fixture(scope="module")
def db(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    engine = open_database(Home(tmp_path_factory.mktemp("ledger")).database_url)
    Tenants(engine).set_quota("default", Quota(tokens_per_day=LIMIT), "os:ana")
    yield engine
    engine.dispose()


class Clock:
    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class Model:
    """The ledger as a few dictionaries: what is open until when, and what was used."""

    def __init__(self) -> None:
        self.open: dict[str, tuple[int, float]] = {}
        self.ended: dict[str, str] = {}
        self.used = 0

    def expire(self, now: float) -> None:
        for name in [name for name, (_, until) in self.open.items() if until <= now]:
            del self.open[name]
            self.ended[name] = "expired"

    @property
    def reserved(self) -> int:
        return sum(tokens for tokens, _ in self.open.values())


DAYS = iter(range(1, 10_000))


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(STEPS, max_size=25))
def test_the_sum_balances_at_every_step(db: Engine, steps: list[tuple[str, int, int]]) -> None:
    clock = Clock(next(DAYS) * 86_400.0)  # a day of its own: no earlier example counts against the limit
    ledger, model, made = UsageLedger(db, clock), Model(), list[Reservation]()
    ledger.expire()
    before = ledger.balance()
    assert before.open == 0
    for act, amount, which in steps:
        chosen = made[which % len(made)] if made else None
        if act == "reserve":
            reserve(ledger, model, made, amount, clock.now)
        elif act == "wait":
            clock.now += amount / 4
        elif act == "crash":  # another process goes on: all that counts is in the database
            ledger = UsageLedger(db, clock)
        elif chosen is not None:
            close(ledger, model, chosen, act, amount, clock.now)
        balance = ledger.balance()
        assert balance.balanced
        assert balance == Balance(
            before.entries + model.used + model.reserved, before.used + model.used, model.reserved
        )
        assert ledger.consumption("default").tokens_day == model.used + model.reserved
    clock.now += LIFETIME
    ledger.expire()
    assert ledger.balance() == Balance(before.used + model.used, before.used + model.used, 0)


def reserve(ledger: UsageLedger, model: Model, made: list[Reservation], tokens: int, now: float) -> None:
    fits = model.used + sum(size for size, until in model.open.values() if until > now) + tokens <= LIMIT
    try:
        reservation = ledger.reserve(LOCAL, "m", tokens, lifetime=LIFETIME)
    except LimitError:
        assert not fits
        return
    assert fits
    model.expire(now)
    model.open[reservation.id] = (tokens, now + LIFETIME)
    made.append(reservation)


def close(
    ledger: UsageLedger, model: Model, reservation: Reservation, act: str, amount: int, now: float
) -> None:
    still = reservation.id in model.open
    ended = model.ended.get(reservation.id)
    try:
        if act == "renew":
            ledger.renew(reservation, LIFETIME)
            model.open[reservation.id] = (reservation.tokens, now + LIFETIME)
            return
        if act == "settle":
            ledger.settle(reservation, Usage(amount // 2, amount - amount // 2))
            assert still or ended == "expired"
            model.used += amount
            model.ended[reservation.id] = "settled"
        else:
            ledger.release(reservation)
            assert ended != "settled"
            model.ended.setdefault(reservation.id, "released")
        model.open.pop(reservation.id, None)
    except ConflictError:
        assert not still


def test_nothing_was_ever_edited(db: Engine) -> None:
    sums = "SELECT count(*) FROM usage_entries GROUP BY reservation_id, kind HAVING count(*) > 1"
    with db.connect() as connection:
        assert connection.execute(sa.text(sums)).all() == []
