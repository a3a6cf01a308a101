"""How the Outputs of one request get from the engine's thread to whoever asked, in asyncio or in a thread."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable

from lapis.inference.request import Output, join_outputs

Waiter = tuple[asyncio.AbstractEventLoop, "asyncio.Future[None]"]


class Channel:
    """The engine's end: outputs that nobody has taken yet. Deltas that pile up are handed out as one."""

    def __init__(self) -> None:
        self.closed = False  # the last output has been put in
        self.first_at: float | None = None  # when the first output came, on the monotonic clock
        self._pending: list[Output] = []
        self._wanted = 0  # tokens in all for which the waiter is woken
        self._ready = threading.Condition()
        self._waiter: Waiter | None = None

    def put(self, output: Output) -> Waiter | None:
        """Add an output; the one with a finish_reason closes the channel. Returns who must be woken."""
        with self._ready:
            if self.closed:
                return None
            if self.first_at is None:
                self.first_at = time.monotonic()
            self._pending.append(output)
            self.closed = output.finish_reason is not None
            self._ready.notify_all()
            if output.completion_tokens < self._wanted and not self.closed:
                return None
            waiter, self._waiter = self._waiter, None
            return waiter

    async def take(self, tokens: int = 0) -> Output | None:
        """What has come since the last take, waiting for something; None after the end.

        Who needs nothing before the answer has so many `tokens` in all, or is complete, is not woken before.
        """
        while True:
            with self._ready:
                enough = self._pending and self._pending[-1].completion_tokens >= tokens
                if enough or (self._pending and self.closed):
                    return self._drain()
                if self.closed:
                    return None
                self._wanted = tokens
                loop = asyncio.get_running_loop()
                future: asyncio.Future[None] = loop.create_future()
                self._waiter = (loop, future)
            await future

    def take_now(self) -> Output | None:
        """What has come since the last take; None if nothing has."""
        with self._ready:
            return self._drain() if self._pending else None

    def take_all(self) -> Output:
        """Block until the end; everything not taken before, as one output."""
        with self._ready:
            while not self.closed:
                self._ready.wait()
            return self._drain()

    def _drain(self) -> Output:
        joined = join_outputs(self._pending)
        self._pending.clear()
        return joined


class Stream:
    """A request's outputs, for one reader. Dropping it or leaving the iteration early cancels the request."""

    def __init__(self, request_id: str, channel: Channel, cancel: Callable[[], None]) -> None:
        self.request_id = request_id
        self._channel = channel
        self._cancel = cancel

    async def __aiter__(self) -> AsyncIterator[Output]:
        try:
            while (output := await self._channel.take()) is not None:
                yield output
        finally:
            self.cancel()

    async def take(self, tokens: int = 0) -> Output | None:
        """As the channel's."""
        return await self._channel.take(tokens)

    def take_now(self) -> Output | None:
        """As the channel's."""
        return self._channel.take_now()

    @property
    def first_at(self) -> float:
        """When the first output came, on the monotonic clock; now, if none has."""
        return self._channel.first_at or time.monotonic()

    async def whole(self) -> Output:
        """Wait for the end without blocking the event loop; everything not read before, as one output."""
        return join_outputs([output async for output in self])

    def result(self) -> Output:
        """Block until the end; everything not read before, as one output."""
        return self._channel.take_all()

    def cancel(self) -> None:
        """Stop the request; its pages are free at the next step. Does nothing after the end."""
        if not self._channel.closed:
            self._cancel()

    def __del__(self) -> None:
        self.cancel()


def wake(waiters: Iterable[Waiter | None]) -> None:
    """Wake the readers in asyncio, each event loop once."""
    by_loop: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = {}
    for waiter in waiters:
        if waiter is not None:
            by_loop.setdefault(waiter[0], []).append(waiter[1])
    for loop, futures in by_loop.items():
        with contextlib.suppress(RuntimeError):  # a closed loop has no reader any more
            loop.call_soon_threadsafe(_set_all, futures)


def _set_all(futures: list[asyncio.Future[None]]) -> None:
    for future in futures:
        if not future.done():
            future.set_result(None)
