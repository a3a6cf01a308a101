"""Work that goes on beside the requests: batches, jobs, what expires. Each loop runs until the server ends."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from lapis.errors import LapisError
from lapis.log import logger

Loop = Callable[[], Awaitable[None]]  # goes on until it is cancelled

AGAIN_SECONDS = 1.0  # between a loop's failure and its next try


async def keep_running(loop: Loop) -> None:
    """Run a loop; after an error that another try may get over, such as a full disk, begin it anew."""
    while True:
        try:
            return await loop()
        except LapisError as error:
            logger.warning("%s: %s", getattr(loop, "__qualname__", loop), error)
            await asyncio.sleep(AGAIN_SECONDS)
