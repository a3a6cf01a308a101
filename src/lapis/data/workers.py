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
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import BaseContext
from typing import Any, TypeVar

from lapis.errors import UnavailableError

Task = TypeVar("Task")
Result = TypeVar("Result")
Runner = Callable[[Callable[[Any], Any], Sequence[Any]], Iterator[Any]]
"""Yields function(task) for each task, in their order."""

_elsewhere: ContextVar[Runner | None] = ContextVar("elsewhere", default=None)
_kept: ContextVar[ProcessPoolExecutor | None] = ContextVar("kept", default=None)

# Workers are forked from a process that has loaded these and does nothing else, so none of them loads them again.
PRELOADED = ("lapis.cli.main", "lapis.data.pipeline")
SAFE_PATH = "PYTHONSAFEPATH"


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


@contextmanager
def kept_workers(count: int) -> Iterator[None]:
    """Keep one set of worker processes for every `run_tasks` inside, in place of a new one for each.

    They start with the first tasks, and end by themselves afterwards. There are none where tasks run elsewhere.
    """
    if count <= 1 or _elsewhere.get() is not None:
        yield
        return
    with _opened(count) as pool:
        before = _kept.set(pool)
        try:
            yield
        finally:
            _kept.reset(before)


def workers_at_hand(wanted: int) -> int:
    """How many workers to use for what is done sooner than a process starts: those that are there already."""
    return wanted if _kept.get() is not None and _elsewhere.get() is None else 1


def warm_up(workers: int) -> None:
    """Start the process that workers are forked from. It loads what they need while this one goes on."""
    if worker_count(workers) > 1:
        _context()


def _context() -> BaseContext:
    """How workers start: forked from a process that is started now, unless it is there."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    before = os.environ.get(SAFE_PATH)
    os.environ[SAFE_PATH] = "1"  # modules come from where they are installed, none from the user's folder
    try:
        resource_tracker.ensure_running()  # it lets interrupts through again
        with _interrupts_held():
            forkserver.ensure_running()
    except OSError:  # the folder of temporary files has a name too long for a socket in it
        return multiprocessing.get_context("spawn")
    finally:
        if before is None:
            del os.environ[SAFE_PATH]
        else:
            os.environ[SAFE_PATH] = before
    return context


def run_tasks(function: Callable[[Task], Result], tasks: Sequence[Task], workers: int) -> Iterator[Result]:
    """Yield function(task) for each task in order; one worker means this process.

    Raises what a task raises, and UnavailableError if a worker dies (as one does that runs out of memory).
    """
    workers = min(workers, len(tasks))
    runner, kept = _elsewhere.get(), _kept.get()
    if runner is not None and len(tasks) > 1:
        yield from runner(function, tasks)
    elif workers <= 1:
        yield from map(function, tasks)
    elif kept is not None:
        yield from _results(kept, function, tasks, workers)
    else:
        with _opened(workers) as pool:
            yield from _results(pool, function, tasks, workers)


@contextmanager
def _opened(workers: int) -> Iterator[ProcessPoolExecutor]:
    context = _context()
    with _interrupts_held():
        pool = ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(dict(os.environ),))
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _results(
    pool: ProcessPoolExecutor, function: Callable[[Task], Result], tasks: Sequence[Task], workers: int
) -> Iterator[Result]:
    try:
        yield from _ordered(pool, function, tasks, workers)
    except BaseException as error:
        for process in list((pool._processes or {}).values()):
            process.kill()  # parts commit atomically, so nothing is lost
        pool.shutdown(wait=True, cancel_futures=True)  # nobody writes any more when this is over
        if isinstance(error, BrokenProcessPool):
            raise UnavailableError(
                "A worker process ended unexpectedly: most often the machine is out of memory.",
                hint="Run the same command again with fewer workers (--workers 1); finished parts are kept.",
            ) from error
        raise


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
    """Hold Ctrl-C back while a process is started: it inherits that, and neither is hit in the middle of it.

    The mask is for the new process. In this one a thread of a library may take the signal, so the handler waits too.
    """
    came: list[int] = []
    handled = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append(number)) if handled else None
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if before is not None:
            signal.signal(signal.SIGINT, before)
        if came:
            signal.raise_signal(signal.SIGINT)


def _begin(environment: dict[str, str]) -> None:
    """What a worker does first: leave Ctrl-C to its parent, end with it, see what it sees, and use one core."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.clear()
    os.environ.update(environment)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        with suppress(OSError):
            parent.join()
        os._exit(1)
