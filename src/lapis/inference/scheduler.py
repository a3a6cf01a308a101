"""Which tokens the next forward computes: a pure decision over counts, no clock and no tensors.

Continuous batching (Orca, OSDI 2022) with chunked prefill (Sarathi-Serve, arXiv 2403.02310): a step first
takes one token of every sequence that generates, then fills the rest of its token budget with prompts.
When pages run out, the youngest sequence gives up its pages and computes them again later; an older one is
never interrupted for a younger one, so the oldest always finishes. Tenants take turns by the tokens they
have been served (virtual token counter, arXiv 2401.00588).
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field

from lapis.errors import LimitError
from lapis.inference.kv_cache import PAGE, KVCache, pages_for
from lapis.inference.request import Request

PROMPT_WEIGHT = 1  # a generated token costs about as much as two prompt tokens (section 4 of the VTC paper)
OUTPUT_WEIGHT = 2


@dataclass(eq=False)
class Sequence:
    """A request on its way: its tokens so far, and how many of them have their keys and values written."""

    request: Request
    number: int  # order of arrival; also the owner's number in the KV cache
    seed: int
    limit: int  # tokens, prompt included, after which it ends
    ids: list[int]
    computed: int = 0
    cached: int = 0  # prompt tokens that came from the prefix cache when it first ran
    charged: int = 0  # tokens its tenant has been charged for
    queued: bool = True  # it has never run yet
    cancelled: bool = False

    @property
    def prompt_tokens(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def completion_tokens(self) -> int:
        return len(self.ids) - self.prompt_tokens

    @property
    def pending(self) -> int:
        """Tokens to compute before the next one can be sampled."""
        return len(self.ids) - self.computed

    @property
    def queue_tokens(self) -> int:
        """What it takes of the queue's bound: its prompt, rounded up to whole pages."""
        return pages_for(self.prompt_tokens) * PAGE


@dataclass(frozen=True)
class Chunk:
    """Tokens start..start+count of one sequence; `samples` when a new token follows from the last of them."""

    sequence: Sequence
    start: int
    count: int
    samples: bool


@dataclass(frozen=True)
class Step:
    """One forward: the chunks to compute together, and the sequences dropped because they were cancelled."""

    chunks: tuple[Chunk, ...]
    dropped: tuple[Sequence, ...]

    @property
    def tokens(self) -> int:
        return sum(chunk.count for chunk in self.chunks)


@dataclass
class Tenant:
    """A tenant's waiting sequences in order of arrival, and its virtual token counter."""

    waiting: list[Sequence] = field(default_factory=list)
    counter: int = 0


class Scheduler:
    """The waiting and the running sequences. Calls alternate: schedule, then commit what was computed."""

    def __init__(self, cache: KVCache, *, step_tokens: int, max_running: int, max_queued_tokens: int) -> None:
        assert 0 < max_running <= step_tokens  # every running sequence gets its token in every step
        self.cache = cache
        self.step_tokens = step_tokens
        self.max_running = max_running
        self.max_queued_tokens = max_queued_tokens
        self.queued_tokens = 0
        self.preemptions = 0
        self.running: list[Sequence] = []  # in order of arrival
        self._tenants: dict[str, Tenant] = {}
        self._arrivals = 0
        self._cancelled = 0

    @property
    def waiting(self) -> int:
        """Sequences that wait for pages or a place."""
        return sum(len(tenant.waiting) for tenant in self._tenants.values())

    @property
    def idle(self) -> bool:
        """Whether there is nothing to compute."""
        return not self.running and self.waiting == 0

    def add(self, request: Request, context: int, seed: int, tokens_per_second: float) -> Sequence:
        """Put a checked request into its tenant's queue. Raises LimitError when the queue is full.

        It ends when it has `context` tokens at the latest. `seed` is for requests that bring none;
        `tokens_per_second` is the measured speed, from which the error's `retry_after` follows.
        """
        limit = min(context, len(request.prompt_ids) + request.params.max_tokens)
        assert pages_for(limit) <= self.cache.pages
        seed = seed if request.params.seed is None else request.params.seed
        sequence = Sequence(request, self._arrivals, seed, limit, list(request.prompt_ids))
        if self.queued_tokens and self.queued_tokens + sequence.queue_tokens > self.max_queued_tokens:
            raise LimitError(
                f"The queue is full: {self.queued_tokens} prompt tokens wait, "
                f"{self.max_queued_tokens} are allowed.",
                retry_after=min(60.0, max(1.0, self.queued_tokens / max(tokens_per_second, 1.0))),
            )
        self._arrivals += 1
        self.queued_tokens += sequence.queue_tokens
        tenant = self._activate(request.tenant)
        tenant.waiting.append(sequence)
        return sequence

    def cancel(self, sequence: Sequence) -> None:
        """Have a waiting or running sequence dropped by the next `schedule`."""
        if not sequence.cancelled:
            sequence.cancelled = True
            self._cancelled += 1

    def schedule(self) -> Step:
        """Drop cancelled sequences (their pages are free at once), then choose the tokens to compute next."""
        dropped = self._drop_cancelled() if self._cancelled else ()
        chunks = self._decode()
        left = self.step_tokens - len(chunks)
        for sequence in self.running:
            if sequence.pending > 1 and left > 0:
                chunks.append(_chunk(sequence, left))
                left -= chunks[-1].count
        while left > 0 and (admitted := self._admit()) is not None:
            chunks.append(_chunk(admitted, left))
            left -= chunks[-1].count
        return Step(tuple(chunks), dropped)

    def commit(self, step: Step, tokens: Tokens[int | None]) -> None:
        """Record that a step was computed; `tokens` holds each chunk's new token (None: it got none)."""
        for chunk, token in zip(step.chunks, tokens, strict=True):
            sequence = chunk.sequence
            sequence.computed = chunk.start + chunk.count
            self.cache.publish(sequence.number, sequence.ids, sequence.computed)
            if token is not None:
                sequence.ids.append(token)
            self._charge(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Take a running sequence out; its pages are free or cached from now on."""
        self.running.remove(sequence)
        self.cache.close(sequence.number)
        self._forget_tenants()

    def _drop_cancelled(self) -> tuple[Sequence, ...]:
        dropped = [sequence for sequence in self.running if sequence.cancelled]
        for sequence in dropped:
            self.running.remove(sequence)
            self.cache.close(sequence.number)
        for tenant in self._tenants.values():
            gone = [sequence for sequence in tenant.waiting if sequence.cancelled]
            if gone:
                tenant.waiting = [sequence for sequence in tenant.waiting if not sequence.cancelled]
                dropped.extend(gone)
                self.queued_tokens -= sum(sequence.queue_tokens for sequence in gone if sequence.queued)
        self._cancelled = 0
        self._forget_tenants()
        return tuple(dropped)

    def _decode(self) -> list[Chunk]:
        chunks = []
        for sequence in list(self.running):
            if sequence.pending != 1:
                continue
            while sequence in self.running and not self.cache.grow(sequence.number, len(sequence.ids)):
                self._preempt(self.running[-1])
            if sequence in self.running:
                chunks.append(_chunk(sequence, 1))
        return chunks

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.cache.close(sequence.number)
        sequence.computed = 0
        self.preemptions += 1
        bisect.insort(self._tenant(sequence).waiting, sequence, key=lambda waiting: waiting.number)

    def _admit(self) -> Sequence | None:
        candidates = [tenant for tenant in self._tenants.values() if tenant.waiting]
        if not candidates or len(self.running) >= self.max_running:
            return None
        # Strictly the first in turn: letting a smaller one pass could starve a long prompt.
        tenant = min(candidates, key=lambda tenant: (tenant.counter, tenant.waiting[0].number))
        sequence = tenant.waiting[0]
        salt = sequence.request.tenant.encode()
        spare = len(self.running)  # a page for the next tokens of each, or they would be preempted at once
        cached = self.cache.open(sequence.number, salt, sequence.ids, spare)
        if cached is None:
            return None
        tenant.waiting.pop(0)
        if sequence.queued:
            sequence.queued = False
            self.queued_tokens -= sequence.queue_tokens
            sequence.cached = cached
            sequence.charged = cached  # tokens from the cache cost nothing
        sequence.computed = cached
        bisect.insort(self.running, sequence, key=lambda running: running.number)
        return sequence

    def _charge(self, sequence: Sequence) -> None:
        done = max(sequence.computed, sequence.charged)
        prompt = max(0, min(done, sequence.prompt_tokens) - sequence.charged)
        output = done - sequence.charged - prompt
        self._tenant(sequence).counter += PROMPT_WEIGHT * prompt + OUTPUT_WEIGHT * output
        sequence.charged = done

    def _tenant(self, sequence: Sequence) -> Tenant:
        return self._tenants[sequence.request.tenant]

    def _activate(self, name: str) -> Tenant:
        tenant = self._tenants.setdefault(name, Tenant())
        busy = {sequence.request.tenant for sequence in self.running}
        busy |= {other for other, queue in self._tenants.items() if queue.waiting}
        if name not in busy:
            # A tenant that comes back has saved up no credit: it starts level with the least served one.
            level = min((self._tenants[other].counter for other in busy), default=0)
            tenant.counter = max(tenant.counter, level)
        return tenant

    def _forget_tenants(self) -> None:
        if self.idle:
            self._tenants.clear()


def _chunk(sequence: Sequence, budget: int) -> Chunk:
    count = min(sequence.pending, budget)
    return Chunk(sequence, sequence.computed, count, samples=count == sequence.pending)
