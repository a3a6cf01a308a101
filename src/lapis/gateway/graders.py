"""Graders beside the event loop: in threads of their own, their models asked through the API in the caller's name."""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Any

from lapis.errors import LapisError, UnavailableError
from lapis.evaluate.graders.grader import Grader, models_of
from lapis.evaluate.graders.grading import Grading, Means, check, grade
from lapis.evaluate.graders.model_grader import Answer, Question
from lapis.evaluate.graders.python_grader import PythonSandbox
from lapis.gateway import inside
from lapis.gateway.inside import Post, post_patiently
from lapis.gateway.router import Router
from lapis.tenants.keys import Identity

THREADS = 64  # most of them wait for a model
A_PROJECT = 16  # of them that one project takes at a time: whose limit is spent does not stop the others
PATIENCE = 600.0  # seconds for which a model that grades may be busy
CHAT = "/v1/chat/completions"


class Graders:
    """What grades for the API and for evals."""

    def __init__(self, post: Post, router: Router) -> None:
        self._post = post
        self._router = router
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="grader")
        self._turns: defaultdict[str, asyncio.Semaphore] = defaultdict(lambda: asyncio.Semaphore(A_PROJECT))

    async def grade(
        self,
        identity: Identity,
        grader: Grader,
        text: str | None,
        item: Any,
        sandbox: PythonSandbox,
        sample: Mapping[str, Any] | None = None,
    ) -> Grading:
        """As `grading.grade`; what its models use is on the identity's account."""
        loop = asyncio.get_running_loop()
        ask = _Asking(self._post, identity, loop)
        means = Means(ask, sandbox)
        try:
            async with self._turns[identity.project_id]:
                return await loop.run_in_executor(self._threads, grade, grader, text, item, means, sample)
        finally:
            ask.end()

    async def check(self, identity: Identity, grader: Grader, sandbox: PythonSandbox) -> None:
        """Raise NotFoundError for a model that the caller cannot use, InputError for a program that cannot run."""
        for model in sorted(models_of(grader)):
            self._router.find(model, identity)
        async with self._turns[identity.project_id]:
            await asyncio.get_running_loop().run_in_executor(self._threads, check, grader, sandbox)

    def close(self) -> None:
        """End the threads; what they still wait for has been cancelled by the event loop."""
        self._threads.shutdown(wait=False, cancel_futures=True)


class _Asking:
    """An `Ask` for one grading: blocks its thread while the event loop asks."""

    def __init__(self, post: Post, identity: Identity, loop: asyncio.AbstractEventLoop) -> None:
        self._post, self._identity, self._loop = post, identity, loop
        self._waiting: set[Future[Answer]] = set()
        self._ended = False

    def __call__(self, question: Question) -> Answer:
        future = asyncio.run_coroutine_threadsafe(self._ask(question), self._loop)
        self._waiting.add(future)
        if self._ended:
            future.cancel()
        try:
            return future.result()
        except CancelledError as error:
            raise UnavailableError("The grading was cancelled.") from error

    def end(self) -> None:
        """Cancel what is still being asked."""
        self._ended = True
        for future in self._waiting:
            future.cancel()

    async def _ask(self, question: Question) -> Answer:
        body = {
            "model": question.model,
            "messages": question.messages,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "grade", "strict": True, "schema": question.schema},
            },
            "temperature": question.temperature,
            "top_p": question.top_p,
            "seed": question.seed,
        }
        limit = {"max_completion_tokens": question.max_tokens}
        answer = await self._send({**body, **limit})
        if answer.status == 400 and answer.json()["error"]["param"] == "max_completion_tokens":
            answer = await self._send(body)  # the context leaves less
        if answer.failure is not None:
            raise LapisError(answer.failure)
        return _read(answer.json())

    async def _send(self, body: Mapping[str, Any]) -> inside.Answer:
        return await post_patiently(self._post, self._identity, CHAT, json.dumps(body).encode(), PATIENCE)


def _read(completion: Any) -> Answer:
    (choice,) = completion["choices"]
    used = completion["usage"]
    return Answer(
        choice["message"]["content"] or "",
        cut=choice["finish_reason"] == "length",
        refused=bool(choice["message"].get("refusal")),
        prompt_tokens=used["prompt_tokens"],
        completion_tokens=used["completion_tokens"],
        cached_tokens=used["prompt_tokens_details"]["cached_tokens"],
    )
