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
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

from lapis.errors import UnavailableError
from lapis.inference import scheduler as schedules
from lapis.inference.kv_cache import KVCache
from lapis.inference.request import FinishReason, Output, Request, TokenLogprob, check_request, check_scored
from lapis.inference.scheduler import Chunk, Scheduler, Step
from lapis.inference.stream import Channel, Stream, Waiter, wake
from lapis.inference.text import StopText
from lapis.log import logger
from lapis.tokenizer.bpe import TextStream, Tokenizer

DRAIN_SECONDS = 1.0  # what close() gives running requests to finish
JOIN_SECONDS = 0.9  # what it then gives the step that is under way


@dataclass(frozen=True)
class Sample:
    """The new token of a sequence and its logprobs if they were asked for, or why there is none."""

    token: int | None = None
    logprob: TokenLogprob | None = None
    error: str | None = None


class Runner(Protocol):
    """What computes: the model, or a fake of it. Called from the engine's thread only."""

    def run(self, chunks: Sequence[Chunk], cache: KVCache) -> list[Sample | None]:
        """Compute chunks; a Sample for each chunk that samples, None for the others."""

    def score(self, ids: Sequence[int]) -> list[float]:
        """The log probability of each token after the first."""


@dataclass(frozen=True)
class Limits:
    """How much an engine takes on; `queued_tokens` bounds the prompts that wait, more are refused."""

    context: int  # tokens of prompt and completion together
    pages: int  # of the KV cache
    step_tokens: int = 256  # tokens of one forward: larger is faster prefill, smaller is smoother decoding
    running: int = 64  # requests that are worked on at a time
    queued_tokens: int = 32768


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


@dataclass(eq=False)
class Writer:
    """A sequence's way out: tokens become text here, and it is decided whether the text has ended."""

    sequence: schedules.Sequence
    tokenizer: Tokenizer
    stop_ids: frozenset[int]
    channel: Channel = field(default_factory=Channel)

    def __post_init__(self) -> None:
        self._text = TextStream(self.tokenizer)
        self._stop = StopText(self.sequence.request.params.stop)

    def write(self, sample: Sample) -> Output:
        """The delta of a sample whose token has just been added to the sequence."""
        if sample.token is None:
            return self.output(finish_reason="error", error=sample.error)
        reason: FinishReason | None = None
        text = ""
        if sample.token in self.stop_ids:
            reason = "stop"
        else:
            text = self._stop.push(self._text.push(sample.token))
            if self._stop.stopped:
                reason = "stop"
            elif len(self.sequence.ids) >= self.sequence.limit:
                reason = "length"
        if reason is not None and not self._stop.stopped:
            text += self._stop.push(self._text.finish()) + self._stop.finish()
            reason = "stop" if self._stop.stopped else reason
        logprobs = () if sample.logprob is None else (sample.logprob,)
        return self.output(text, (sample.token,), logprobs, reason)

    def output(
        self,
        text: str = "",
        token_ids: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprob, ...] = (),
        finish_reason: FinishReason | None = None,
        error: str | None = None,
    ) -> Output:
        """An Output with this sequence's counts."""
        sequence = self.sequence
        return Output(
            text,
            token_ids,
            logprobs,
            finish_reason,
            error,
            sequence.prompt_tokens,
            sequence.completion_tokens,
            sequence.cached,
        )


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
        self._work = threading.Condition()  # guards everything below
        self._scheduler = self._new_scheduler()
        self._writers: dict[int, Writer] = {}
        self._scores: deque[tuple[list[int], Future[list[float]]]] = deque()
        self._cancels: deque[schedules.Sequence] = deque()  # lock-free: filled by __del__ in any thread
        self._refusal = ""  # why nothing is accepted any more
        self._ending = False
        self._thread = threading.Thread(target=self._run, name=f"engine {name}", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> Stream:
        """Queue a request. Raises InputError, LimitError (the queue is full), UnavailableError (closed)."""
        check_request(request, self.context, self.tokenizer.vocab_size)
        with self._work:
            self._check_open()
            seed = secrets.randbits(64)
            sequence = self._scheduler.add(request, self.context, seed, self._speed)
            stop_ids = self.stop_ids if request.params.stop_ids is None else request.params.stop_ids
            writer = Writer(sequence, self.tokenizer, stop_ids)
            self._writers[sequence.number] = writer
            self._work.notify_all()
        return Stream(request.id, writer.channel, lambda: self._cancels.append(sequence))

    def score(self, ids: Sequence[int]) -> list[float]:
        """The log probability of each token after the first. Blocks; raises InputError, UnavailableError."""
        check_scored(ids, self.context, self.tokenizer.vocab_size)
        future: Future[list[float]] = Future()
        with self._work:
            self._check_open()
            self._scores.append((list(ids), future))
            self._work.notify_all()
        return future.result()

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
                "pages_used": cache.used,
                "pages_cached": cache.cached,
                "pages_evicted": cache.evicted,
                "preemptions": self._scheduler.preemptions,
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
                self._score_one()
        except Exception:  # noqa: BLE001 - nobody above this thread could report it
            logger.exception("engine %s: the step loop failed", self.name)
            with self._work:
                self._refusal = f"The engine {self.name!r} failed; its log has the reason."
                waiters = self._fail_all(self._refusal)
            wake(waiters)

    def _wait_for_work(self) -> bool:
        with self._work:
            if self._scheduler.idle and not self._scores and not self._ending:
                self._check_books()
                while self._scheduler.idle and not self._scores and not self._ending:
                    self._work.wait()
            return not self._ending

    def _step(self) -> None:
        with self._work:
            while self._cancels:
                self._scheduler.cancel(self._cancels.popleft())
            step = self._scheduler.schedule()
            waiters = [self._end(sequence, "The request was cancelled.") for sequence in step.dropped]
            cache = self._scheduler.cache
        wake(waiters)
        if not step.chunks:
            return
        started = time.monotonic()
        samples = self._compute(step, cache)
        seconds = time.monotonic() - started
        with self._work:
            waiters = self._commit(step, samples)
            self._counts.steps += 1
            self._counts.busy_seconds += seconds
            self._speed += 0.1 * (step.tokens / max(seconds, 1e-6) - self._speed)
            self._work.notify_all()
        wake(waiters)

    def _compute(self, step: Step, cache: KVCache) -> list[Sample | None]:
        try:
            return self._runner.run(step.chunks, cache)
        except Exception:  # noqa: BLE001 - one request's fault must not end the others
            logger.exception("engine %s: a step of %d requests failed", self.name, len(step.chunks))
        samples: list[Sample | None] = []
        for chunk in step.chunks:
            try:
                samples += self._runner.run([chunk], cache)
            except Exception as error:  # noqa: BLE001 - it ends this request
                logger.exception("engine %s: request %s failed", self.name, chunk.sequence.request.id)
                samples.append(Sample(error=f"The request failed: {type(error).__name__}: {error}"))
        return samples

    def _commit(self, step: Step, samples: Sequence[Sample | None]) -> list[Waiter | None]:
        tokens = [None if sample is None else sample.token for sample in samples]
        self._scheduler.commit(step, tokens)
        return [
            self._deliver(chunk.sequence, sample)
            for chunk, sample in zip(step.chunks, samples, strict=True)
            if sample is not None
        ]

    def _deliver(self, sequence: schedules.Sequence, sample: Sample) -> Waiter | None:
        writer = self._writers.get(sequence.number)
        if writer is None:  # close() has ended it meanwhile
            return None
        try:
            output = writer.write(sample)
        except Exception as error:  # noqa: BLE001 - it ends this request
            logger.exception("engine %s: the text of request %s failed", self.name, sequence.request.id)
            output = writer.output(finish_reason="error", error=f"The request failed: {error}")
        counts = self._counts
        counts.completion_tokens += len(output.token_ids)
        if sequence.completion_tokens <= 1:
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
        waiters = [self._end(writer.sequence, error) for writer in list(self._writers.values())]
        while self._scores:
            self._scores.popleft()[1].set_exception(UnavailableError(error))
        return waiters

    def _score_one(self) -> None:
        with self._work:
            if not self._scores:
                return
            ids, future = self._scores.popleft()
        try:
            future.set_result(self._runner.score(ids))
        except Exception as error:  # noqa: BLE001 - raised where the scores are waited for
            future.set_exception(error)

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
            KVCache(limits.pages),
            step_tokens=limits.step_tokens,
            max_running=min(limits.running, limits.step_tokens),
            max_queued_tokens=limits.queued_tokens,
        )
