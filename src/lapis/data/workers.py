"""A function over many tasks in worker processes, results in the order of the tasks.

A task is a picklable value whose results are files that appear whole or not at all, so it may run anywhere, and
twice. Where: in processes of this machine, or where `tasks_elsewhere` says (a cluster, cluster.py).
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

from lapis.errors import UnavailableError

Task = TypeVar("Task")
Result = TypeVar("Result")
Runner = Callable[[Callable[[Any], Any], Sequence[Any]], Iterator[Any]]
"""Yields function(task) for each task, in their order."""

_elsewhere: ContextVar[Runner | None] = ContextVar("elsewhere", default=None)


def worker_count(wanted: int = 0) -> int:
    """How many workers to use: what is asked for, or the CPUs this process may run on."""
    return wanted or len(os.sched_getaffinity(0))


MAIN_BYTES = 200_000_000  # what the process that directs the others takes, without its tables
WORKER_BYTES = 250_000_000  # what one worker takes at most, with the models of its annotators
IDLE_BYTES = 100_000_000  # what a worker takes before it has begun


@dataclass(frozen=True)
class Room:
    """How many processes there is memory for, and the bytes left for tables over all documents."""

    workers: int
    tables: int = 1 << 30

    @staticmethod
    def within(memory: int, workers: int) -> Room:
        """Within a number of bytes of memory for all processes together; 0 bounds nothing."""
        if not memory:
            return Room(workers)
        workers = max(1, min(workers, (memory - MAIN_BYTES) // WORKER_BYTES))
        return Room(workers, max(1 << 24, memory - MAIN_BYTES - workers * IDLE_BYTES))


@contextmanager
def tasks_elsewhere(runner: Runner) -> Iterator[None]:
    """Have `run_tasks` run its tasks through a runner of another place."""
    before = _elsewhere.set(runner)
    try:
        yield
    finally:
        _elsewhere.reset(before)


def run_tasks(function: Callable[[Task], Result], tasks: Sequence[Task], workers: int) -> Iterator[Result]:
    """Yield function(task) for each task in order; one worker means this process.

    Raises what a task raises, and UnavailableError if a worker dies (as one does that runs out of memory).
    """
    workers = min(workers, len(tasks))
    runner = _elsewhere.get()
    if runner is not None and len(tasks) > 1:
        yield from runner(function, tasks)
        return
    if workers <= 1:
        yield from map(function, tasks)
        return
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_begin)
    try:
        yield from _ordered(pool, function, tasks, workers)
    except BrokenProcessPool as error:
        raise UnavailableError(
            "A worker process ended unexpectedly: most often the machine is out of memory.",
            hint="Run the same command again with fewer workers (--workers 1); finished parts are kept.",
        ) from error
    except BaseException:
        for process in set(multiprocessing.active_children()) - before:
            process.kill()  # parts commit atomically, so nothing is lost
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _ordered(
    pool: ProcessPoolExecutor, function: Callable[[Task], Result], tasks: Sequence[Task], workers: int
) -> Iterator[Result]:
    waiting: deque[Future[Result]] = deque()
    for task in tasks:
        if len(waiting) >= 4 * workers:
            yield waiting.popleft().result()
        with _interrupts_held():
            waiting.append(pool.submit(function, task))
    while waiting:
        yield waiting.popleft().result()


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold Ctrl-C back while a worker is started: it inherits that, and is not hit before `_begin` has run."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin() -> None:
    """What a worker does first: leave Ctrl-C to its parent, end with it, and use one core."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        with suppress(OSError):
            parent.join()
        os._exit(1)
