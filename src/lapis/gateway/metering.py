"""Tokens are reserved before a request runs and settled after it, however it ends."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

from lapis.db import BusyError, fold, retried
from lapis.errors import LapisError, LimitError, StorageError, UnavailableError
from lapis.log import logger
from lapis.tenants.keys import Identity
from lapis.tenants.quota import LimitState
from lapis.tenants.usage import LIFETIME, NOTHING, Operation, Reservation, Usage, UsageLedger

FOLD_AFTER = 250  # writes of the loop's own: some 1,500 pages of SQLite's log
# Between two looks for what dead processes had reserved, and for what is still to be written.
TIDY_SECONDS = 60.0
SETTLE_AFTER = 0.002  # seconds, in which the loop sends the answer first


class Meter:
    """The ledger, written from one thread: the event loop never waits for the disk.

    But while that thread has nothing to do, the loop reserves and settles by itself in an `impatient` ledger of the
    same database (see db.connect), where it waits for nobody: a fifth of a millisecond, and no thread is woken.
    """

    def __init__(self, ledger: UsageLedger, impatient: UsageLedger | None = None) -> None:
        self._ledger = ledger
        self._impatient = impatient
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="meter")
        self._last: Future[Any] | None = None  # what the thread writes last
        self._at_once = 0  # writes of the loop's own
        self._unsettled: deque[tuple[Reservation, Usage]] = deque()  # what the loop settles next
        self._again: deque[tuple[Reservation, Usage]] = deque()  # what the database did not take
        self._settling = threading.Lock()  # `flush` from another thread waits for what the loop is writing
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
        more = {"generated": generated, "operation": operation}
        try:
            reservation = self._reserve_at_once(identity, model, tokens, more)
            if reservation is None:
                reservation = await self._reserve_in_thread(identity, model, tokens, more)
        except LimitError:
            self._refused.add(identity.project_id)
            raise
        self._refused.discard(identity.project_id)
        return Meterage(reservation, self)

    def write(self, work: Callable[..., Any], *arguments: Any) -> None:
        """Write to the database later, in order, again if it was away; a failure is logged."""
        self._submit(retried, work, *arguments).add_done_callback(_report)

    async def tidy(self) -> None:
        """Settle what the database did not take, and release what dead processes had reserved, each minute."""
        while True:
            self._settle_again()
            # In our own thread: a second writer would be in the loop's way.
            self.write(self._ledger.expire)
            await asyncio.sleep(TIDY_SECONDS)

    def flush(self) -> None:
        """Block until everything asked for so far is written, or was tried: what fails is tried again later."""
        self._settle_again()
        self._settle_in_thread()
        self._thread.submit(lambda: None).result()

    def close(self) -> None:
        """Write what is still to be written, then end."""
        self.flush()
        if self._again:
            self.flush()  # the last try
        self._thread.shutdown(wait=True)
        if self._again:
            logger.error("the usage of %d requests is lost: the database did not take it", len(self._again))
        if self._impatient is not None:
            self._impatient.db.dispose()

    def settle(self, reservation: Reservation, usage: Usage) -> None:
        """Replace a reservation by what was used, soon; nothing used gives it back. Called in the event loop."""
        self._unsettled.append((reservation, usage))
        if self._impatient is None:
            self._settle_in_thread()
        elif len(self._unsettled) == 1:
            asyncio.get_running_loop().call_later(SETTLE_AFTER, self._settle_all)

    def renew(self, reservation: Reservation) -> None:
        """Keep a long request's reservation open."""
        self.write(self._ledger.renew, reservation)

    def _submit(self, work: Callable[..., Any], *arguments: Any) -> Future[Any]:
        self._last = self._thread.submit(work, *arguments)
        return self._last

    def _reserve_at_once(
        self, identity: Identity, model: str, tokens: int, more: dict[str, Any]
    ) -> Reservation | None:
        """None if somebody else is writing: then there would be something to wait for."""
        if self._impatient is None or not self._idle:
            return None
        try:
            reservation = self._impatient.reserve(identity, model, tokens, **more)
        except BusyError:
            return None
        self._wrote_at_once()
        return reservation

    def _settle_all(self) -> None:
        try:
            with self._settling:
                while self._unsettled:
                    waiting = self._unsettled.popleft()
                    if not self._settle_at_once(*waiting):
                        self._settle_later(*waiting)
        finally:
            # One may have failed in a way that nobody foresaw: the others are settled all the same.
            if self._unsettled:
                asyncio.get_running_loop().call_later(SETTLE_AFTER, self._settle_all)

    def _settle_in_thread(self) -> None:
        with self._settling:
            while self._unsettled:
                self._settle_later(*self._unsettled.popleft())

    def _settle_again(self) -> None:
        with self._settling:
            for _ in range(len(self._again)):
                self._settle_later(*self._again.popleft())

    def _settle_later(self, reservation: Reservation, usage: Usage) -> None:
        self._submit(self._settle, reservation, usage).add_done_callback(_report)

    def _settle(self, reservation: Reservation, usage: Usage) -> None:
        """In our thread. What a database that is busy, away or full does not take is kept for later."""
        try:
            if usage.total_tokens:
                retried(self._ledger.settle, reservation, usage)
            else:
                retried(self._ledger.release, reservation)
        except (UnavailableError, StorageError) as error:
            self._again.append((reservation, usage))
            logger.warning("the usage of a request is written later: %s", error)

    def _settle_at_once(self, reservation: Reservation, usage: Usage) -> bool:
        if self._impatient is None or not self._idle:
            return False
        try:
            if usage.total_tokens:
                self._impatient.settle(reservation, usage)
            else:
                self._impatient.release(reservation)
        except (UnavailableError, StorageError):
            return False
        except LapisError as error:
            _complain(error)
        self._wrote_at_once()
        return True

    @property
    def _idle(self) -> bool:
        return self._last is None or self._last.done()

    def _wrote_at_once(self) -> None:
        self._at_once += 1
        if self._at_once % FOLD_AFTER == 0:
            # What comes meanwhile waits behind it: a log to which is added all the time would never end.
            self.write(fold, self._ledger.db)

    async def _reserve_in_thread(
        self, identity: Identity, model: str, tokens: int, more: dict[str, Any]
    ) -> Reservation:
        booking: Future[Reservation] = self._submit(
            partial(self._ledger.reserve, **more), identity, model, tokens
        )
        try:
            return await asyncio.wrap_future(booking)
        except asyncio.CancelledError:
            booking.add_done_callback(self._give_back)  # the client left while we wrote
            raise

    def _give_back(self, booking: Future[Reservation]) -> None:
        if not booking.cancelled() and booking.exception() is None:
            self._settle(booking.result(), NOTHING)  # at once: this runs in our thread, which may be ending


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
        _complain(error)


def _complain(error: BaseException) -> None:
    logger.error("usage, or when a key was used, could not be written: %s", error)
