"""Work that goes on beside the requests: batches, jobs, what expires. Each loop runs until the server ends."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor

from lapis.errors import LapisError
from lapis.log import logger

Loop = Callable[[], Awaitable[None]]  # goes on until it is cancelled

AGAIN_SECONDS = 1.0  # between a loop's failure and its next try
UNFORESEEN_SECONDS = 10.0  # the same after an error that nobody foresaw


def in_thread(run: Callable[[threading.Event], None]) -> Loop:
    """A loop that blocks, in a thread of its own: `run` goes on until its event is set, and is waited for."""

    async def loop() -> None:
        stop = threading.Event()
        with ThreadPoolExecutor(1, thread_name_prefix="loop") as pool:
            running = asyncio.get_running_loop().run_in_executor(pool, run, stop)
            try:
                await asyncio.shield(running)
            finally:
                stop.set()
                await running

    return loop


async def keep_running(loop: Loop) -> None:
    """Run a loop; after an error, such as a full disk, begin it anew."""
    name = getattr(loop, "__qualname__", loop)
    while True:
        try:
            return await loop()
        except LapisError as error:
            logger.warning("%s: %s", name, error)
            await asyncio.sleep(AGAIN_SECONDS)
        except Exception:  # noqa: BLE001
            # The last line of defence: what nobody foresaw is a defect, but the loop must not end with it.
            logger.exception("%s: an error that nobody foresaw; again in %g s", name, UNFORESEEN_SECONDS)
            await asyncio.sleep(UNFORESEEN_SECONDS)
