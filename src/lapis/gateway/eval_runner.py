"""Executes eval runs beside the requests: asks the model for each item, grades the answer, records the item."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from lapis.errors import AuthError, ConflictError, InputError, LapisError, NotFoundError
from lapis.evaluate.graders.grader import Single, passing
from lapis.evaluate.graders.grading import Grading
from lapis.evaluate.graders.python_grader import PythonSandbox
from lapis.gateway.eval_runs import LEASE_SECONDS, EvalRun, EvalRuns, ItemResult, ItemStatus, Used
from lapis.gateway.eval_sampling import Sampled, asking, given, sampled, unanswered
from lapis.gateway.eval_source import DataRow, data_rows
from lapis.gateway.evals import EvalStore
from lapis.gateway.files import FileStore
from lapis.gateway.graders import Graders
from lapis.gateway.inside import LOOK_AGAIN_SECONDS, Post, post_patiently
from lapis.gateway.on_behalf import restored
from lapis.log import logger
from lapis.tenants.keys import ApiKeys, Identity

ITEMS = 8  # of a run at a time
IDLE_SECONDS = 0.5  # between two looks for a run
# For so long an item waits for a limit or a busy server; then the run leaves its place to others.
PATIENCE_SECONDS = 20.0
WATCH_SECONDS = 0.5  # between two looks whether a run was canceled


class _PausedError(Exception):
    """A run waits for a limit; it goes on after so many seconds."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds


class EvalRunner:
    """Takes one run after the other; several may work side by side, also in several servers."""

    def __init__(
        self, evals: EvalStore, runs: EvalRuns, files: FileStore, keys: ApiKeys, graders: Graders, post: Post
    ) -> None:
        self._evals, self._runs, self._files = evals, runs, files
        self._keys, self._graders, self._post = keys, graders, post

    async def work(self) -> None:
        """Execute runs, as long as the server runs."""
        while True:
            run = await asyncio.to_thread(self._runs.claim)
            if run is None:
                await asyncio.sleep(IDLE_SECONDS)
            else:
                await self._run(run)

    async def _run(self, run: EvalRun) -> None:
        """Execute a run until it is done, is no longer ours, or the server ends."""
        working = asyncio.create_task(self._execute(run))
        watching = asyncio.create_task(self._watch(run))
        try:
            await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            ended = working.done()
            for task in (working, watching):
                task.cancel()
            await asyncio.gather(working, watching, return_exceptions=True)
            if not ended:  # another server, or this one when it is back, goes on at once
                await asyncio.shield(asyncio.to_thread(self._runs.release, run))
        if ended:
            await self._end(run, working)

    async def _end(self, run: EvalRun, working: asyncio.Task[None]) -> None:
        try:
            working.result()
        except _PausedError as paused:
            await asyncio.to_thread(self._runs.release, run, paused.seconds)
        except ConflictError:
            return  # canceled, deleted or taken over
        except (AuthError, NotFoundError, InputError) as error:
            told = {"code": error.code, "message": error.message}
            await asyncio.to_thread(self._runs.finish, run, "failed", told)
        except LapisError:  # the disk is full, the database is gone: this or another server tries again
            await asyncio.to_thread(self._runs.release, run)
            raise
        except Exception:  # noqa: BLE001 (our bug ends one run, not the loop; the trace is in the log)
            logger.exception("the run %s failed", run.id)
            told = {
                "code": "internal_error",
                "message": f"The server failed; its log has the cause under {run.id}.",
            }
            await asyncio.to_thread(self._runs.finish, run, "failed", told)
        else:
            await asyncio.to_thread(self._runs.finish, run, "completed")

    async def _watch(self, run: EvalRun) -> None:
        """Returns when a run is no longer ours; keeps its lease until then. Raises AuthError once its key ended."""
        loop = asyncio.get_running_loop()
        renew_at = loop.time() + LEASE_SECONDS / 3
        while await asyncio.to_thread(self._runs.is_mine, run):
            await self._identity(run)
            if loop.time() > renew_at:
                await asyncio.to_thread(self._runs.renew, run)
                renew_at = loop.time() + LEASE_SECONDS / 3
            await asyncio.sleep(WATCH_SECONDS)

    async def _identity(self, run: EvalRun) -> Identity:
        return await asyncio.to_thread(restored, json.loads(run.identity), self._keys)

    async def _execute(self, run: EvalRun) -> None:
        """All items that are not recorded yet. Raises ConflictError where the run is no longer ours, _PausedError where
        it must wait for long: what was begun is recorded before."""
        identity = await self._identity(run)
        made_of = await asyncio.to_thread(self._evals.get, run.project_id, run.eval_id)
        done = await asyncio.to_thread(self._runs.recorded, run)
        rows = enumerate(data_rows(run.data_source["source"], self._files, run.project_id))
        wanted = ((number, row) for number, row in rows if number not in done)
        criteria = made_of.graders()
        paused: list[_PausedError] = []
        with PythonSandbox() as sandbox:
            reading = asyncio.Lock()

            async def several() -> None:
                while not paused:
                    async with reading:  # a thread at a time: the file is read line by line
                        found = await asyncio.to_thread(next, wanted, None)
                    if found is None:
                        return
                    number, row = found
                    try:
                        answer = await self._sample(run, identity, row)
                    except _PausedError as error:
                        paused.append(error)
                        return
                    graded = await self._grade(identity, criteria, row, answer, sandbox)
                    result = _result(number, row, answer, criteria, graded)
                    await asyncio.to_thread(self._runs.record, run, result)

            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(ITEMS):
                        group.create_task(several())
            except* LapisError as failed:
                raise failed.exceptions[0] from None
        if paused:
            raise paused[0]

    async def _sample(self, run: EvalRun, identity: Identity, row: DataRow) -> Sampled:
        """The answer to an item: the one that it brings along, or what the run's model says."""
        source, model = run.data_source, str(run.data_source.get("model", ""))
        try:
            if source["type"] == "jsonl":
                return given(row.sample)
            asked = asking(source, row.item)
        except InputError as error:
            return unanswered(None, model, error.code, error.message)
        body = json.dumps(asked.body).encode()
        answer = await post_patiently(self._post, identity, asked.path, body, PATIENCE_SECONDS)
        if answer.busy:
            raise _PausedError(min(answer.retry_after or 1.0, LOOK_AGAIN_SECONDS))
        if answer.failure is not None:
            return unanswered(asked, model, str(answer.status), answer.failure)
        return sampled(asked, answer.json())

    async def _grade(
        self,
        identity: Identity,
        criteria: list[Single],
        row: DataRow,
        answer: Sampled,
        sandbox: PythonSandbox,
    ) -> list[Grading]:
        if answer.failed:
            return []
        graders = self._graders
        return await asyncio.gather(
            *(
                graders.grade(identity, criterion, answer.text, row.item, sandbox, answer.values)
                for criterion in criteria
            )
        )


def _result(
    number: int, row: DataRow, answer: Sampled, criteria: list[Single], graded: list[Grading]
) -> ItemResult:
    """An item as it is recorded: it passes where every criterion does."""
    results = [_shown(criterion, grading) for criterion, grading in zip(criteria, graded, strict=False)]
    status: ItemStatus = "pass" if all(result["passed"] for result in results) else "fail"
    if answer.failed or any(grading.errors.any for grading in graded):
        status = "error"
    usage = dict(answer.usage)
    for grading in graded:
        for model, tokens in grading.usage.items():
            used = Used(tokens.prompt_tokens, tokens.completion_tokens, tokens.cached_tokens, tokens.calls)
            usage[model] = usage.get(model, Used()) + used
    return ItemResult(number, status, row.item, answer.shown, results, usage)


def _shown(criterion: Single, grading: Grading) -> dict[str, Any]:
    """What a criterion says of an item, and what a model that graded wrote."""
    failed = grading.errors.any
    shown: dict[str, Any] = {
        "name": grading.name,
        "type": grading.type,
        "passed": not failed and passing(criterion, grading.reward),
        "score": grading.reward,
        "sample": None if grading.answer is None else {"output": grading.answer, "label": grading.label},
    }
    return {**shown, "errors": grading.errors.names, "message": grading.message} if failed else shown
