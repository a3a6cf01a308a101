"""Tokens are reserved before a request runs and settled after it, however it ends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

from lapis.db import retried
from lapis.errors import LimitError
from lapis.log import logger
from lapis.tenants.keys import Identity
from lapis.tenants.quota import LimitState
from lapis.tenants.usage import LIFETIME, Operation, Reservation, Usage, UsageLedger


class Meter:
    """The ledger, written from one thread: the event loop never waits for the disk."""

    def __init__(self, ledger: UsageLedger) -> None:
        self._ledger = ledger
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="meter")
        self._refused: set[str] = set()  # projects whose last reservation their quota did not allow

    def trusts(self, identity: Identity) -> bool:
        """Whether work may begin while its reservation is still being written."""
        return identity.project_id not in self._refused

    async def reserve(
        self,
        identity: Identity,
        model: str,
        tokens: int,
        *,
        generated: int = 0,
        operation: Operation = "completions",
    ) -> Meterage:
        """Take tokens, of which so many may be generated, out of the limits. Raises as the ledger's `reserve`."""
        work = partial(self._ledger.reserve, generated=generated, operation=operation)
        booking = self._thread.submit(work, identity, model, tokens)
        try:
            reservation = await asyncio.wrap_future(booking)
        except asyncio.CancelledError:
            booking.add_done_callback(self._give_back)  # the client left while we wrote
            raise
        except LimitError:
            self._refused.add(identity.project_id)
            raise
        self._refused.discard(identity.project_id)
        return Meterage(reservation, self)

    def write(self, work: Callable[..., Any], *arguments: Any) -> None:
        """Do a ledger write later, in order, again if the database was away; a failure is logged."""
        self._thread.submit(retried, work, *arguments).add_done_callback(_report)

    def flush(self) -> None:
        """Block until everything asked for so far is written."""
        self._thread.submit(lambda: None).result()

    def close(self) -> None:
        """Write what is still to be written, then end."""
        self._thread.shutdown(wait=True)

    def settle(self, reservation: Reservation, usage: Usage) -> None:
        """Replace a reservation by what was used; nothing used gives it back."""
        if usage.total_tokens:
            self.write(self._ledger.settle, reservation, usage)
        else:
            self.write(self._ledger.release, reservation)

    def renew(self, reservation: Reservation) -> None:
        """Keep a long request's reservation open."""
        self.write(self._ledger.renew, reservation)

    def _give_back(self, booking: Future[Reservation]) -> None:
        if not booking.cancelled() and booking.exception() is None:
            self._ledger.release(booking.result())  # at once: this runs in our thread, which may be ending


class Meterage:
    """One request's reservation: settled exactly once."""

    def __init__(self, reservation: Reservation, meter: Meter) -> None:
        self._reservation = reservation
        self._meter = meter
        self._renewed = time.monotonic()
        self._closed = False

    @property
    def limits(self) -> tuple[LimitState, ...]:
        """What was left of each limit on requests and tokens when the request began."""
        return self._reservation.limits

    def tick(self, now: float) -> None:
        """Say that the request is alive at a monotonic time; renews when half its lifetime is over."""
        if now - self._renewed > LIFETIME / 2:
            self._renewed = now
            self._meter.renew(self._reservation)

    def settle(self, usage: Usage) -> None:
        """Book what was used. Later calls do nothing."""
        if not self._closed:
            self._closed = True
            self._meter.settle(self._reservation, usage)


def _report(done: Future[Any]) -> None:
    error = None if done.cancelled() else done.exception()
    if error is not None:
        logger.error("the usage ledger could not be written: %s", error)
