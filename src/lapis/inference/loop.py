"""The engine's thread: takes requests in, runs step after step, hands text out. Knows no tensors.

A fault stays with the request that caused it: when a step fails, each of its chunks is run again alone
(writing the same keys and values twice changes nothing), and only those that fail again end with an error.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from lapis.errors import LapisError, NotFoundError, UnavailableError, nearest
from lapis.inference import scheduler as schedules
from lapis.inference.kv_cache import PAGE, KVCache
from lapis.inference.request import (
    Output,
    Pooling,
    Request,
    SamplingParams,
    check_request,
    check_scored,
)
from lapis.inference.result import Result
from lapis.inference.scheduler import Chunk, Scheduler, Step
from lapis.inference.stream import Stream, Waiter, wake
from lapis.inference.writer import Writer
from lapis.log import logger
from lapis.tokenizer.bpe import Tokenizer
from lapis.tokenizer.grammar import Grammar

if TYPE_CHECKING:
    from lapis.inference.structured import Compiler

CALM_SECONDS = 1.0  # without work before all books are checked: whoever comes meanwhile would wait for that
DRAIN_SECONDS = 1.0  # what close() gives running requests to finish
JOIN_SECONDS = 0.9  # what it then gives the step that is under way
STEP_SECONDS = 0.15  # what a step's prompts may take while others generate; a page's worth at least


class Adapter(Protocol):
    """A low-rank adapter as a runner knows it."""

    @property
    def digest(self) -> str:
        """Names its contents: equal prefixes are shared among equal digests only."""


class Runner(Protocol):
    """What computes: the model, or a fake of it. Called from the engine's thread only."""

    def run(self, chunks: Sequence[Chunk], cache: KVCache) -> list[Result]:
        """Compute chunks; a Result for each, in order."""


@dataclass(frozen=True)
class Limits:
    """How much an engine takes on; `queued_tokens` and `queued` bound what waits, more is refused."""

    context: int  # tokens of prompt and completion together
    pages: int  # of the KV cache
    step_tokens: int = 512  # tokens of one forward: larger is faster prefill, smaller is smoother decoding
    running: int = 64  # requests that are worked on at a time
    queued_tokens: int = 32768
    queued: int = 1024  # requests that wait
    drafts: int = 0  # tokens that speculation may guess ahead for one request; 0 for none
    draft_rows: int = 8  # rows that a step with guesses has at most
    kept_pages: int | None = None  # as KVCache's `kept`


@dataclass
class Counts:
    """What an engine has done so far."""

    steps: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    cache_faults: int = 0
    busy_seconds: float = 0.0


class EngineLoop:
    """Submit, score, stats and close over one Runner; the base of LocalEngine and FakeEngine."""

    def __init__(
        self, name: str, runner: Runner, limits: Limits, tokenizer: Tokenizer, stop_ids: frozenset[int]
    ) -> None:
        self.name = name
        self.context = limits.context
        self.tokenizer = tokenizer
        self.stop_ids = stop_ids
        self._runner = runner
        self._limits = limits
        self._counts = Counts()
        self._started = time.monotonic()
        self._speed = 1000.0  # tokens per second, smoothed; the first guess only matters for retry_after
        self._prompt_speed: float | None = None  # the same, of steps that are mostly prompts
        self._work = threading.Condition()  # guards everything below
        self._scheduler = self._new_scheduler()
        self._writers: dict[int, Writer] = {}
        self._cancels: deque[schedules.Sequence] = deque()  # lock-free: filled by __del__ in any thread
        self._grammars: Compiler | None = None
        self._adapters: dict[str, Adapter] = {}
        self._refusal = ""  # why nothing is accepted any more
        self._ending = False
        self._thread = threading.Thread(target=self._run, name=f"engine {name}", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> Stream:
        """Queue a request.

        Raises InputError, NotFoundError (no such adapter), LimitError (the queue is full), UnavailableError.
        """
        check_request(request, self.context, self.tokenizer.vocab_size)
        stop_ids = self.stop_ids if request.params.stop_ids is None else request.params.stop_ids
        structure, matcher = request.params.structure, None
        if structure is not None:
            stop_ids = stop_ids or self.stop_ids  # a text whose grammar has ended has to end
            matcher = self._compiler().matcher(structure, stop_ids)
        with self._work:
            self._check_open()
            adapter = self._adapter(request.adapter)
            salt = b"" if adapter is None else adapter.digest.encode()
            seed = secrets.randbits(64)
            sequence = self._scheduler.add(request, self.context, seed, self._speed, salt)
            sequence.stop_ids, sequence.matcher, sequence.adapter = stop_ids, matcher, adapter
            writer = Writer(sequence, self.tokenizer, stop_ids)
            self._writers[sequence.number] = writer
            self._work.notify_all()
        return Stream(request.id, writer.channel, lambda: self._cancels.append(sequence))

    def prepare(self, structure: Grammar) -> None:
        """Compile a grammar, so that `submit` does not: the first takes some 0.3 s, others about 1 ms.

        Blocks; meant for a thread beside the one that submits. Raises InputError.
        """
        self._compiler().matcher(structure)

    def score(self, ids: Sequence[int], tenant: str = "default") -> list[float]:
        """The log probability of each token after the first, computed in pieces beside what runs.

        Blocks. Raises InputError, LimitError (the queue is full), UnavailableError (closed).
        """
        check_scored(ids, self.context, self.tokenizer.vocab_size)
        params = SamplingParams(max_tokens=0, prompt_logprobs=0)
        output = self._read([Request("score", tuple(ids), params, tenant)])[0]
        return [logprob.logprob for logprob in output.prompt_logprobs]

    def embed(
        self, ids: Sequence[Sequence[int]], pooling: Pooling = "mean", tenant: str = "default"
    ) -> list[list[float]]:
        """One vector of length 1 for each text: the mean of its hidden rows, or the last one.

        Blocks; `submit` with `pooling` can be awaited and cancelled. Raises as `score`.
        """
        params = SamplingParams(max_tokens=0)
        requests = [
            Request(f"embed-{number}", tuple(text), params, tenant, pooling=pooling)
            for number, text in enumerate(ids)
        ]
        return [list(output.embedding) for output in self._read(requests)]

    def remove_adapter(self, name: str) -> None:
        """Take no more requests for an adapter; those under way keep it. Raises NotFoundError."""
        with self._work:
            self._adapter(name)
            del self._adapters[name]

    @property
    def adapters(self) -> list[str]:
        """The names of the adapters, sorted."""
        with self._work:
            return sorted(self._adapters)

    def stats(self) -> dict[str, Any]:
        """What is running, waiting and cached now, and what has been done since the start."""
        with self._work:
            cache, counts = self._scheduler.cache, self._counts
            return {
                "running": len(self._scheduler.running),
                "waiting": self._scheduler.waiting,
                "queued_tokens": self._scheduler.queued_tokens,
                "max_queued_tokens": self._limits.queued_tokens,
                "pages": cache.pages,
                "pages_touched": cache.touched,
                "pages_used": cache.used,
                "pages_cached": cache.cached,
                "pages_evicted": cache.evicted,
                "preemptions": self._scheduler.preemptions,
                "drafted_tokens": self._scheduler.drafted,
                "accepted_tokens": self._scheduler.accepted,
                **vars(counts),
                "tokens_per_second": self._speed,
                "uptime_seconds": time.monotonic() - self._started,
            }

    def close(self) -> None:
        """Accept nothing more, let what runs finish for a second, end the rest with an error. Within 2 s."""
        deadline = time.monotonic() + DRAIN_SECONDS
        with self._work:
            self._refusal = self._refusal or f"The engine {self.name!r} has been closed."
            while self._writers and self._thread.is_alive() and (left := deadline - time.monotonic()) > 0:
                self._work.wait(left)
            self._ending = True
            waiters = self._fail_all(self._refusal)
            self._work.notify_all()
        wake(waiters)
        if self._thread is not threading.current_thread():
            self._thread.join(JOIN_SECONDS)

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._step()
        except Exception:  # noqa: BLE001 - nobody above this thread could report it
            logger.exception("engine %s: the step loop failed", self.name)
            with self._work:
                self._refusal = f"The engine {self.name!r} failed; its log has the reason."
                waiters = self._fail_all(self._refusal)
            wake(waiters)

    def _wait_for_work(self) -> bool:
        with self._work:
            if self._scheduler.idle and self._scheduler.cache.used:
                self._check_books()
            calm: float | None = CALM_SECONDS
            while self._scheduler.idle and not self._ending:
                if not self._work.wait(calm):
                    self._check_books()
                    calm = None
            return not self._ending

    def _step(self) -> None:
        with self._work:
            while self._cancels:
                self._scheduler.cancel(self._cancels.popleft())
            step = self._scheduler.schedule(self._prompt_tokens())
            waiters = [self._end(sequence, "The request was cancelled.") for sequence in step.dropped]
            cache = self._scheduler.cache
        wake(waiters)
        if not step.chunks:
            return
        started = time.monotonic()
        results = self._compute(step, cache)
        seconds = time.monotonic() - started
        with self._work:
            waiters = self._commit(step, results)
            self._counts.steps += 1
            self._counts.busy_seconds += seconds
            self._measure(step, seconds)
            self._work.notify_all()
        wake(waiters)

    def _prompt_tokens(self) -> int | None:
        """So many that others wait for their next token for STEP_SECONDS or so, by what was measured."""
        if self._prompt_speed is None:
            return None
        return max(PAGE, int(self._prompt_speed * STEP_SECONDS) // PAGE * PAGE)

    def _measure(self, step: Step, seconds: float) -> None:
        speed = step.tokens / max(seconds, 1e-6)
        self._speed += 0.1 * (speed - self._speed)
        if step.tokens >= 2 * PAGE and step.tokens >= 4 * len(step.chunks):  # prompts, for the most part
            before = self._prompt_speed
            self._prompt_speed = speed if before is None else before + 0.1 * (speed - before)

    def _compute(self, step: Step, cache: KVCache) -> list[Result]:
        try:
            return self._runner.run(step.chunks, cache)
        except Exception:  # noqa: BLE001 - one request's fault must not end the others
            logger.exception("engine %s: a step of %d requests failed", self.name, len(step.chunks))
        results: list[Result] = []
        for chunk in step.chunks:
            try:
                results += self._runner.run([chunk], cache)
            except Exception as error:  # noqa: BLE001 - it ends this request
                logger.exception("engine %s: request %s failed", self.name, chunk.sequence.request.id)
                results.append(Result(error=f"The request failed: {type(error).__name__}: {error}"))
        return results

    def _commit(self, step: Step, results: Sequence[Result]) -> list[Waiter | None]:
        """Text first: it decides how many of the new tokens count."""
        written = [self._write(*pair) for pair in zip(step.chunks, results, strict=True)]
        tokens = [() if output is None else output.token_ids for output in written]
        self._scheduler.commit(step, tokens)
        return [
            self._deliver(chunk, output)
            for chunk, output in zip(step.chunks, written, strict=True)
            if output is not None
        ]

    def _write(self, chunk: Chunk, result: Result) -> Output | None:
        sequence = chunk.sequence
        sequence.pooled = result.pooled
        writer = self._writers.get(sequence.number)
        if writer is None:  # close() has ended it meanwhile
            return None
        try:
            return writer.write(chunk, result)
        except Exception as error:  # noqa: BLE001 - it ends this request
            logger.exception("engine %s: the text of request %s failed", self.name, sequence.request.id)
            return writer.output(finish_reason="error", error=f"The request failed: {error}")

    def _deliver(self, chunk: Chunk, output: Output) -> Waiter | None:
        sequence, counts = chunk.sequence, self._counts
        writer = self._writers[sequence.number]
        counts.completion_tokens += len(output.token_ids)
        if not writer.started and (output.finish_reason is not None or output.token_ids):
            writer.started = True
            counts.prompt_tokens += sequence.prompt_tokens
            counts.cached_tokens += sequence.cached
        if output.finish_reason is not None:
            self._scheduler.finish(sequence)
            del self._writers[sequence.number]
            counts.failed += output.finish_reason == "error"
            counts.finished += output.finish_reason != "error"
        return writer.channel.put(output)

    def _end(self, sequence: schedules.Sequence, error: str) -> Waiter | None:
        writer = self._writers.pop(sequence.number, None)
        if writer is None:
            return None
        self._counts.cancelled += 1
        return writer.channel.put(writer.output(finish_reason="error", error=error))

    def _fail_all(self, error: str) -> list[Waiter | None]:
        return [self._end(writer.sequence, error) for writer in list(self._writers.values())]

    def _read(self, requests: Sequence[Request]) -> list[Output]:
        """Submit requests that only read and wait for all of them; one that fails ends the others."""
        streams: list[Stream] = []
        try:
            for request in requests:
                streams.append(self.submit(request))
            outputs = [stream.result() for stream in streams]
        finally:
            for stream in streams:
                stream.cancel()
        failed = next((output.error for output in outputs if output.finish_reason == "error"), None)
        if failed is not None:
            if self._refusal:
                raise UnavailableError(self._refusal)
            raise LapisError(f"The engine ended the request: {failed}")
        return outputs

    def _compiler(self) -> Compiler:
        with self._work:
            if self._grammars is None:
                from lapis.inference.structured import Compiler  # loads llguidance, at the first need

                self._grammars = Compiler(self.tokenizer, self.stop_ids)
            return self._grammars

    def _put_adapter(self, name: str, adapter: Adapter) -> None:
        with self._work:
            self._adapters[name] = adapter

    def _adapter(self, name: str | None) -> Adapter | None:
        if name is None:
            return None
        if name not in self._adapters:
            known = nearest(name, self._adapters)
            raise NotFoundError(f"{self.name!r} has no adapter {name!r}. {known}".strip(), param="model")
        return self._adapters[name]

    def _check_open(self) -> None:
        if self._refusal:
            raise UnavailableError(self._refusal)

    def _check_books(self) -> None:
        try:
            self._scheduler.cache.check()
            assert self._scheduler.cache.used == 0, "pages are owned though nothing runs"
        except AssertionError as fault:
            # Our own mistake; a fresh cache loses only reuse, going on with wrong books could mix up texts.
            logger.error("engine %s: the KV cache's books are wrong (%s); it starts afresh", self.name, fault)
            self._counts.cache_faults += 1
            self._scheduler = self._new_scheduler()

    def _new_scheduler(self) -> Scheduler:
        limits = self._limits
        return Scheduler(
            KVCache(limits.pages, limits.kept_pages),
            step_tokens=limits.step_tokens,
            max_running=min(limits.running, limits.step_tokens),
            max_queued_tokens=limits.queued_tokens,
            max_queued=limits.queued,
            max_drafts=limits.drafts,
            draft_rows=limits.draft_rows,
        )
