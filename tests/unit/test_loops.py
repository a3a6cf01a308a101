"""Loops beside the requests: they end with the server, and with nothing else."""

from __future__ import annotations

import asyncio
import threading

import pytest

from lapis.errors import StorageError
from lapis.gateway import loops


@pytest.mark.parametrize("error", [StorageError("No space left."), OSError(24, "Too many open files")])
def test_a_loop_that_fails_begins_anew_whatever_the_error(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loops, "AGAIN_SECONDS", 0.0)
    monkeypatch.setattr(loops, "UNFORESEEN_SECONDS", 0.0)
    begun = []

    def run(stop: threading.Event) -> None:
        begun.append(1)
        if len(begun) < 3:
            raise error

    asyncio.run(asyncio.wait_for(loops.keep_running(loops.in_thread(run)), 10))
    assert len(begun) == 3
