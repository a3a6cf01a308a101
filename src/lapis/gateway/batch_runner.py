"""Batches run inside the server: as many lines at a time as the engine has room for, behind live traffic.

A finished line is in the database before it counts. Whoever takes a batch over goes on with the lines that are not.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections import Counter, deque
from collections.abc import Iterable
from typing import IO, TYPE_CHECKING, Any

from lapis.errors import AuthError, LapisError, NotFoundError
from lapis.gateway.batch_input import Line, LineError, body_of, read_input
from lapis.gateway.batches import LEASE_SECONDS, Batch, LineResult
from lapis.gateway.inside import LOOK_AGAIN_SECONDS, Answer
from lapis.gateway.on_behalf import restored
from lapis.log import logger
from lapis.tenants.keys import Identity
from lapis.tenants.usage import Usage

if TYPE_CHECKING:
    from lapis.gateway.services import Services

BATCHES = 8  # that one server runs at a time
IN_FLIGHT = 256  # lines of all of them
BEGUN = 8  # lines of a batch between two looks at its engine's queue
FIRST = 8  # lines of a batch at a time, before it is known how many go
WAITING = 2  # requests in an engine's queue at which no more lines are begun
LOOK_SECONDS = 0.5  # between two looks for batches
AGAIN_SECONDS = 30.0  # until a batch that failed by our own fault is tried again
TICK_SECONDS = 0.05  # between two looks for room, and two writes of finished lines
# For so long a batch of which nothing runs keeps its place while it waits; it leaves it to others then.
PATIENCE_SECONDS = 5.0
TRIES = 3  # of a line that the server fails
BUSY = (408, 409, 429, 503)  # a later try makes sense, unless the answer says not
EXPIRED = LineError("batch_expired", "The batch's time was over before this request was run.")
ENDED = LineError("invalid_api_key", "The API key that began the batch has ended.")
GONE = LineError("input_file_gone", "The input file was deleted before all requests were run.")


class BatchRunner:
    """Runs the batches of an installation, some at a time."""

    def __init__(self, services: Services) -> None:
        self.services = services
        self.in_flight = 0

    async def run(self) -> None:
        """Take batches and run them until the server ends."""
        running: dict[str, tuple[str, asyncio.Task[Any]]] = {}
        try:
            while True:
                for id in [id for id, (_, task) in running.items() if task.done()]:
                    project, task = running.pop(id)
                    if (error := task.exception()) is not None:  # our bug stops one batch, for a while
                        logger.error("batch %s stopped here", id, exc_info=error)
                        running[id] = (project, asyncio.create_task(asyncio.sleep(AGAIN_SECONDS)))
                taken = None
                if len(running) < BATCHES and not self.services.draining:
                    projects = Counter(project for project, _ in running.values())
                    taken = await asyncio.to_thread(self.services.batches.claim, list(running), projects)
                if taken is not None:
                    work = _BatchRun(self, *taken).run()
                    running[taken[0].id] = (taken[0].project_id, asyncio.create_task(work))
                    continue
                await asyncio.sleep(LOOK_SECONDS)
        finally:
            for _, task in running.values():
                task.cancel()
            await asyncio.gather(*[task for _, task in running.values()], return_exceptions=True)

    def has_room(self, model: str) -> bool:
        """Whether the engine of a model takes another line without live requests having to wait."""
        if self.in_flight >= IN_FLIGHT or self.services.draining:
            return False
        engine = self.services.router.loaded(model)
        return engine is None or int(engine.stats()["waiting"]) < WAITING


class _BatchRun:
    """One batch under a lease, from whatever state it is in to its end."""

    def __init__(self, runner: BatchRunner, batch: Batch, token: str) -> None:
        self._runner = runner
        self._services = runner.services
        self._store = runner.services.batches
        self._batch = batch
        self._token = token
        self._results: list[LineResult] = []
        self._tries: Counter[int] = Counter()
        self._width = FIRST
        self._hold_until = 0.0  # loop time before which nothing more is begun
        self._pause = (
            0.0  # seconds after which it goes on, here or in another server, once this run has ended
        )
        self._renewed = 0.0
        self._looked = 0.0
        self._identity: Identity | None = None

    async def run(self) -> None:
        """Run it. What cannot go on here is left to the next who takes it."""
        batch = self._batch
        try:
            await self._run()
        except LapisError as error:  # the lease is lost, or the disk is full: the next who takes it goes on
            logger.warning("batch %s stopped here: %s", batch.id, error)
            await asyncio.sleep(LEASE_SECONDS)
        finally:
            self._store.release(
                batch, self._token, self._pause
            )  # short, and must happen though we are cancelled

    async def _run(self) -> None:
        outcome = "completed"
        if self._batch.status in ("validating", "in_progress"):
            outcome = await self._run_file()
        ended = not self._services.draining and not self._pause
        if self._batch.status == "in_progress" and ended:
            self._batch = await asyncio.to_thread(self._store.finalize, self._batch, self._token, outcome)
        if self._batch.status == "cancelling":
            await self._finish("cancelled")
        elif self._batch.status == "finalizing":
            outcome = self._batch.facts["outcome"]
            await self._finish(outcome, [ENDED] if outcome == "failed" else None)

    async def _run_file(self) -> str:
        """Read the input and run its lines; the status that the batch gets if it was not cancelled meanwhile."""
        batch = self._batch
        if not await self._may_go_on() and batch.status == "validating":
            await self._finish("failed", [ENDED])
            return "failed"
        try:
            file = await asyncio.to_thread(self._services.files.open, batch.project_id, batch.input_file_id)
        except NotFoundError:
            await self._finish("failed", [GONE])
            return "failed"
        with file:
            found = await self._renewing(asyncio.to_thread(read_input, file, batch.endpoint))
            if batch.status == "validating":
                if found.errors:
                    await self._finish("failed", found.errors)
                    return "failed"
                models = {line.model for line in found.lines}
                model = models.pop() if len(models) == 1 else None
                count = len(found.lines)
                self._batch = await asyncio.to_thread(self._store.begin, batch, self._token, count, model)
            return await self._run_lines(file, found.lines)

    async def _run_lines(self, file: IO[bytes], lines: Iterable[Line]) -> str:
        done = await asyncio.to_thread(self._store.recorded, self._batch)
        waiting = deque(line for line in lines if line.number not in done)
        running: dict[asyncio.Task[Answer], Line] = {}
        try:
            while (waiting or running) and self._batch.status == "in_progress":
                if self._services.files.clock() >= self._batch.expires_at:
                    return await self._give_up(EXPIRED, [*waiting, *running.values()], "expired")
                if self._identity is None:
                    return await self._give_up(ENDED, [*waiting, *running.values()], "failed")
                if self._services.draining and not running:
                    break
                wait = self._hold_until - asyncio.get_running_loop().time()
                if wait > PATIENCE_SECONDS and not running:
                    self._pause = wait
                    break
                self._begin(file, waiting, running)
                if running:
                    await asyncio.wait(running, timeout=TICK_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                else:
                    await asyncio.sleep(TICK_SECONDS)
                self._collect(waiting, running)
                await self._write()
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            self._runner.in_flight -= len(running)
        return "completed"

    async def _may_go_on(self) -> bool:
        """Look whose requests these are; whether the key that began them still opens anything."""
        keys = self._services.admission.keys
        try:
            self._identity = await asyncio.to_thread(restored, self._batch.facts["identity"], keys)
        except AuthError:
            self._identity = None
        return self._identity is not None

    async def _give_up(self, why: LineError, lines: Iterable[Line], outcome: str) -> str:
        self._results += [_not_run(line, why) for line in lines]
        await self._write()
        return outcome

    def _begin(
        self, file: IO[bytes], waiting: deque[Line], running: dict[asyncio.Task[Answer], Line]
    ) -> None:
        if asyncio.get_running_loop().time() < self._hold_until:
            return
        for _ in range(BEGUN):  # an engine's queue is seen to grow only later
            if not waiting or len(running) >= self._width or not self._runner.has_room(waiting[0].model):
                return
            line = waiting.popleft()
            running[asyncio.create_task(self._ask(file, line))] = line
            self._runner.in_flight += 1

    async def _ask(self, file: IO[bytes], line: Line) -> Answer:
        identity = self._identity
        assert identity is not None  # looked at before a line is begun
        body = await asyncio.to_thread(body_of, file, line)
        return await self._services.post(identity, self._batch.endpoint, body)

    def _collect(self, waiting: deque[Line], running: dict[asyncio.Task[Answer], Line]) -> None:
        for task in [task for task in running if task.done()]:
            line = running.pop(task)
            self._runner.in_flight -= 1
            answer = task.result()
            if self._is_to_be_tried_again(line, answer):
                waiting.appendleft(line)
                continue
            self._width = min(self._width + 1, IN_FLIGHT)
            self._results.append(_result(line, answer))

    def _is_to_be_tried_again(self, line: Line, answer: Answer) -> bool:
        if answer.headers.get("x-should-retry") == "false":
            return False
        if answer.status in BUSY:
            self._width = max(1, self._width // 2)
            self._hold_until = asyncio.get_running_loop().time() + _retry_after(answer)
            return True
        self._tries[line.number] += 1
        return answer.status >= 500 and self._tries[line.number] < TRIES

    async def _write(self) -> None:
        """Keep what is finished; from time to time renew the lease, by which we learn of a cancellation."""
        now = asyncio.get_running_loop().time()
        if now - self._looked > 1.0:
            self._looked = now
            await self._may_go_on()
        if self._results:
            results, self._results = self._results, []
            self._batch = await asyncio.to_thread(self._store.record, self._batch, self._token, results)
            self._renewed = now
        elif now - self._renewed > min(1.0, LEASE_SECONDS / 3):
            self._batch = await asyncio.to_thread(self._store.renew, self._batch, self._token)
            self._renewed = now

    async def _finish(self, status: str, errors: list[LineError] | None = None) -> None:
        told = None if errors is None else [error.facts() for error in errors]
        work = asyncio.to_thread(self._store.finish, self._batch, self._token, status, told)
        self._batch = await self._renewing(work)

    async def _renewing(self, work: Any) -> Any:
        """The result of work that may take longer than the lease."""
        task = asyncio.ensure_future(work)
        while not (await asyncio.wait({task}, timeout=LEASE_SECONDS / 3))[0]:
            await asyncio.to_thread(self._store.renew, self._batch, self._token)
        return task.result()


def _result(line: Line, answer: Answer) -> LineResult:
    body = answer.json()
    said = {"status_code": answer.status, "request_id": answer.headers["x-request-id"], "body": body}
    succeeded = 200 <= answer.status < 300
    text = _text(line, {"response": said, "error": None})
    return LineResult(line.number, succeeded, text, _usage(body) if succeeded else Usage(0, 0))


def _not_run(line: Line, error: LineError) -> LineResult:
    said = {"code": error.code, "message": error.message}
    return LineResult(line.number, False, _text(line, {"response": None, "error": said}))


def _text(line: Line, said: dict[str, Any]) -> str:
    return json.dumps({"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": line.custom_id, **said})


def _usage(body: dict[str, Any]) -> Usage:
    """The tokens that an answer names, under the names of its endpoint."""
    used: dict[str, Any] = body.get("usage") or {}
    details = used.get("input_tokens_details") or used.get("prompt_tokens_details") or {}
    return Usage(
        int(used.get("input_tokens", used.get("prompt_tokens", 0))),
        int(used.get("output_tokens", used.get("completion_tokens", 0))),
        int(details.get("cached_tokens") or 0),
    )


def _retry_after(answer: Answer) -> float:
    """Seconds until a try makes sense."""
    seconds = 1.0 if answer.retry_after is None else answer.retry_after
    return min(max(seconds, TICK_SECONDS), LOOK_AGAIN_SECONDS)
