"""The meter: tokens are reserved in the event loop where nobody has to be waited for, else in its thread."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa

from lapis.db import BusyError, connect, open_database, write
from lapis.errors import LimitError, UnavailableError
from lapis.gateway import metering
from lapis.gateway.metering import Meter
from lapis.home import Home
from lapis.tenants.keys import LOCAL
from lapis.tenants.limits import Limits
from lapis.tenants.prices import Prices
from lapis.tenants.quota import Quota
from lapis.tenants.tenant import Tenants
from lapis.tenants.usage import Reservation, Usage, UsageLedger


class Slow(UsageLedger):
    """A ledger that settles when it is let."""

    def __init__(self, db: sa.Engine) -> None:
        super().__init__(db)
        self.settling, self.may_go_on = threading.Event(), threading.Event()

    def settle(self, reservation: Reservation, usage: Usage) -> None:
        self.settling.set()
        assert self.may_go_on.wait(10)
        super().settle(reservation, usage)


class Nobody(UsageLedger):
    """A ledger that is not to be asked."""

    def reserve(self, *arguments: object, **more: object) -> None:  # type: ignore[override]
        raise AssertionError("the thread was asked")


@pytest.fixture
def url(home: Home) -> str:
    found = home.database_url
    if not found.startswith("sqlite:"):
        pytest.skip("a file alone is written at once")
    open_database(found).dispose()
    return found


def meter_of(url: str, kind: type[UsageLedger] = UsageLedger) -> tuple[Meter, UsageLedger]:
    ledger = kind(connect(url))
    return Meter(ledger, UsageLedger(connect(url, patient=False))), ledger


def test_an_idle_meter_asks_no_thread(url: str) -> None:
    meter, ledger = meter_of(url, Nobody)

    async def work() -> None:
        booked = await meter.reserve(LOCAL, "tiny", 10, generated=4)
        booked.settle(Usage(6, 3))
        while ledger.balance().open:  # settled soon, without being asked again
            await asyncio.sleep(0.001)

    asyncio.run(work())
    balance = ledger.balance()
    assert (balance.used, balance.open, balance.balanced) == (9, 0, True)
    meter.close()
    ledger.db.dispose()


def test_what_a_dead_process_reserved_does_not_block_the_rest_of_its_organization(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    prices, now = home.root / "prices.toml", [1_764_417_620.0]
    prices.write_text("[models.default]\nprompt = 1.0\n")
    ledger = UsageLedger(open_database(home.database_url), lambda: now[0], Prices(prices))
    dead, other = (Tenants(ledger.db).create_project(name, "me").id for name in ("dead", "other"))
    Limits(ledger.db).set_spend("default", 1, "me")  # 10,000 tokens
    meter = Meter(ledger)
    monkeypatch.setattr(metering, "TIDY_SECONDS", 0.01)

    async def work() -> None:
        expiring = asyncio.create_task(meter.tidy())
        ledger.reserve(replace(LOCAL, project_id=dead), "tiny", 10_000)
        await asyncio.sleep(0.05)
        assert ledger.balance().open == 10_000  # it may be alive
        now[0] += 600
        while ledger.balance().open:
            await asyncio.sleep(0.001)
        ledger.reserve(replace(LOCAL, project_id=other), "tiny", 10_000)
        expiring.cancel()

    asyncio.run(asyncio.wait_for(work(), 20))
    meter.close()
    ledger.db.dispose()


def test_what_is_not_settled_when_the_loop_ends_is_settled_at_the_end(url: str) -> None:
    meter, ledger = meter_of(url)

    async def work() -> None:
        for _ in range(3):
            (await meter.reserve(LOCAL, "tiny", 10)).settle(Usage(6, 3))

    asyncio.run(work())
    meter.flush()
    assert (ledger.balance().used, ledger.balance().open) == (27, 0)
    meter.close()
    ledger.db.dispose()


def test_one_failure_does_not_keep_the_others_from_being_settled(url: str) -> None:
    meter, ledger = meter_of(url)

    async def work() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
        booked = [await meter.reserve(LOCAL, "tiny", 10) for _ in range(3)]
        booked[0].settle(Usage(6, "no number"))  # type: ignore[arg-type]
        for one in booked[1:]:
            one.settle(Usage(6, 3))
        while ledger.balance().used < 18:
            await asyncio.sleep(0.001)

    asyncio.run(asyncio.wait_for(work(), 20))
    meter.close()
    ledger.db.dispose()


def test_the_loop_does_not_wait_for_another_writer(url: str) -> None:
    meter, ledger = meter_of(url)
    held, may_end, other = threading.Event(), threading.Event(), connect(url)

    def hold() -> None:
        with write(other):
            held.set()
            assert may_end.wait(20)

    async def reserve() -> None:
        holder = asyncio.create_task(asyncio.to_thread(hold))
        await asyncio.to_thread(held.wait)
        booking = asyncio.create_task(meter.reserve(LOCAL, "tiny", 10))
        for _ in range(20):
            await asyncio.sleep(0)  # the loop goes on
        assert not booking.done()
        may_end.set()
        (await booking).settle(Usage(0, 0))
        await holder

    asyncio.run(reserve())
    meter.close()
    assert ledger.balance().open == 0
    for db in (other, ledger.db):
        db.dispose()


def test_a_settlement_is_not_lost_to_a_busy_database(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lapis.db.BUSY_SECONDS", 0.05)
    monkeypatch.setattr(metering, "TIDY_SECONDS", 0.05)
    meter, ledger = meter_of(url)

    async def work() -> None:
        tidying = asyncio.create_task(meter.tidy())
        used, unused = [await meter.reserve(LOCAL, "tiny", 10) for _ in range(2)]
        with write(ledger.db):
            used.settle(Usage(3, 4))
            unused.settle(Usage(0, 0))
            with pytest.raises(UnavailableError, match="busy") as caught:
                await meter.reserve(LOCAL, "tiny", 10)
            assert caught.value.retry_after == 1.0
            await asyncio.sleep(0.2)
        while ledger.balance().open:
            await asyncio.sleep(0.001)
        tidying.cancel()

    asyncio.run(asyncio.wait_for(work(), 20))
    assert (ledger.balance().used, ledger.balance().balanced) == (7, True)
    meter.close()
    ledger.db.dispose()


def test_flush_waits_for_what_the_loop_is_settling(url: str) -> None:
    ledger, slow = UsageLedger(connect(url)), Slow(connect(url, patient=False))
    meter = Meter(ledger, slow)
    flushed = threading.Event()

    def flush() -> None:
        assert slow.settling.wait(10)
        threading.Timer(0.1, slow.may_go_on.set).start()
        meter.flush()
        assert ledger.balance().open == 0
        flushed.set()

    async def work() -> None:
        (await meter.reserve(LOCAL, "tiny", 10)).settle(Usage(5, 5))
        await asyncio.to_thread(flush)

    asyncio.run(work())
    assert flushed.is_set()
    meter.close()
    ledger.db.dispose()


def test_what_is_refused_at_once_is_not_trusted_until_it_is_allowed(url: str) -> None:
    meter, ledger = meter_of(url, Nobody)
    Tenants(ledger.db).set_quota("default", Quota(tokens_per_day=5), "me")
    with pytest.raises(LimitError, match="tokens per day"):
        asyncio.run(meter.reserve(LOCAL, "tiny", 10))
    assert not meter.trusts(LOCAL)
    asyncio.run(meter.reserve(LOCAL, "tiny", 5))
    assert meter.trusts(LOCAL)
    meter.close()
    ledger.db.dispose()


def test_an_impatient_writer_is_told_at_once(url: str) -> None:
    first, second = connect(url), connect(url, patient=False)
    with write(first), pytest.raises(BusyError), write(second):
        pass
    with write(second):
        pass
    for db in (first, second):
        db.dispose()


def test_the_databases_log_does_not_grow_with_what_the_loop_writes(url: str) -> None:
    meter, ledger = meter_of(url)

    async def work(times: int) -> None:
        for _ in range(times):
            (await meter.reserve(LOCAL, "tiny", 10)).settle(Usage(5, 5))
            await asyncio.sleep(0)

    asyncio.run(work(1000))
    meter.flush()
    log = Path(url.removeprefix("sqlite:///") + "-wal")
    assert log.stat().st_size < 16 << 20  # without folding: 6 pages of 4 KiB a write, 48 MB
    assert ledger.balance().used == 10_000
    meter.close()
    ledger.db.dispose()
