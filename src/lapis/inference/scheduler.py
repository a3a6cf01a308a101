"""Which tokens the next forward computes: a pure decision over counts, no clock and no tensors.

Continuous batching (Orca, OSDI 2022) with chunked prefill (Sarathi-Serve, arXiv 2403.02310): a step first
takes the next token of every sequence that generates, then fills the rest of its token budget with prompts.
Tenants take turns by the tokens they have been served (virtual token counter, arXiv 2401.00588), in the
queue, inside a step, and where places or pages are all taken: then the most served tenant's youngest
sequence gives its own up and computes them again later. A tenant's older sequence is never interrupted for
a younger one, and the least served tenant never for another, so everyone finishes.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

from lapis.errors import LimitError
from lapis.inference.kv_cache import PAGE, KVCache, pages_for
from lapis.inference.request import Request
from lapis.inference.speculation import Pace, propose

if TYPE_CHECKING:
    from lapis.inference.structured import Matcher

PROMPT_WEIGHT = 1  # a generated token costs about as much as two prompt tokens (section 4 of the VTC paper)
OUTPUT_WEIGHT = 2
LEAD_STEPS = 2  # a tenant may be ahead by so many full steps before another takes its places
LOOK = 16  # sequences of a tenant's queue that are looked at for one that can run now


@dataclass(eq=False)
class Sequence:
    """A request on its way: its tokens so far, and how many of them have their keys and values written."""

    request: Request
    number: int  # order of arrival; also the owner's number in the KV cache
    seed: int
    limit: int  # tokens, prompt included, after which it ends
    ids: list[int]
    salt: bytes  # pages are shared among sequences of one salt
    computed: int = 0
    cached: int = 0  # prompt tokens that came from the prefix cache when it first ran
    charged: int = 0  # tokens its tenant has been charged for
    queued: bool = True  # it has never run yet
    running: bool = False
    cancelled: bool = False
    adapter: object | None = None  # what the runner made of the request's adapter
    pooled: object | None = None  # what the runner keeps between the chunks of a text to embed
    pace: Pace = field(default_factory=Pace)
    stop_ids: frozenset[int] = frozenset()  # tokens that end it
    matcher: Matcher | None = None  # its place in the grammar that its text must belong to

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

    @property
    def shares(self) -> bool:
        """Whether it may skip what is in the prefix cache: not while every prompt token's row is asked for."""
        every_row = self.request.params.prompt_logprobs is not None or self.request.pooling == "mean"
        return not every_row or self.completion_tokens > 0


@dataclass(frozen=True)
class Chunk:
    """Tokens start..start+count of one sequence, the last of them drafts that may turn out wrong.

    When it `samples`, a new token follows from the last token that is none, and one from each right draft.
    """

    sequence: Sequence
    start: int
    count: int
    samples: bool
    drafts: tuple[int, ...] = ()

    @property
    def ids(self) -> list[int]:
        """The tokens to compute."""
        end = self.start + self.count - len(self.drafts)
        return [*self.sequence.ids[self.start : end], *self.drafts]


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
    """A tenant's waiting sequences, urgent and old ones first, and its virtual token counter."""

    waiting: list[Sequence] = field(default_factory=list)
    counter: int = 0


class Scheduler:
    """The waiting and the running sequences. Calls alternate: schedule, then commit what was computed.

    `max_drafts` is how many tokens a sequence may guess ahead in one step, `draft_rows` the rows that a step
    with guesses has at most.
    """

    def __init__(
        self,
        cache: KVCache,
        *,
        step_tokens: int,
        max_running: int,
        max_queued_tokens: int,
        max_queued: int = 1 << 30,
        max_drafts: int = 0,
        draft_rows: int = 0,
    ) -> None:
        assert 0 < max_running <= step_tokens  # every running sequence gets its token in every step
        self.cache = cache
        self.step_tokens = step_tokens
        self.max_running = max_running
        self.max_queued_tokens = max_queued_tokens
        self.max_queued = max_queued
        self.max_drafts = max_drafts
        self.draft_rows = min(draft_rows, step_tokens // 2)  # prompts get their half
        self.queued_tokens = 0
        self.queued = 0
        self.preemptions = 0
        self.drafted = 0
        self.accepted = 0
        self.running: list[Sequence] = []  # in order of arrival
        self._tenants: dict[str, Tenant] = {}
        self._chunks: dict[Sequence, Chunk] = {}  # of the step that is being put together
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

    def add(
        self, request: Request, context: int, seed: int, tokens_per_second: float, salt: bytes = b""
    ) -> Sequence:
        """Put a checked request into its tenant's queue. Raises LimitError when the queue is full.

        It ends when it has `context` tokens at the latest. `seed` is for requests that bring none;
        `tokens_per_second` is the measured speed, from which the error's `retry_after` follows. `salt` keeps
        its pages apart from those of other salts, beside its tenant's name.
        """
        limit = min(context, len(request.prompt_ids) + request.params.max_tokens)
        assert pages_for(limit) <= self.cache.pages
        seed = seed if request.params.seed is None else request.params.seed
        name = request.tenant.encode()
        salt = len(name).to_bytes(4, "little") + name + salt if salt else name
        sequence = Sequence(request, self._arrivals, seed, limit, list(request.prompt_ids), salt)
        self._check_queue(sequence, tokens_per_second)
        self._arrivals += 1
        self.queued += 1
        self.queued_tokens += sequence.queue_tokens
        self._wait(self._activate(request.tenant), sequence)
        return sequence

    def cancel(self, sequence: Sequence) -> None:
        """Have a waiting or running sequence dropped by the next `schedule`."""
        if not sequence.cancelled:
            sequence.cancelled = True
            self._cancelled += 1

    def schedule(self, prompt_tokens: int | None = None) -> Step:
        """Drop cancelled sequences (their pages are free at once), then choose the tokens to compute next.

        `prompt_tokens` bounds a step's prompts while other sequences generate.
        """
        dropped = self._drop_cancelled() if self._cancelled else ()
        self._chunks = {}
        self._decode()
        generating = self._planned()
        bound = self.step_tokens
        if generating and prompt_tokens is not None:
            bound = min(bound, generating + prompt_tokens)
        self._prefill(bound)
        return Step(tuple(self._chunks.values()), dropped)

    def commit(self, step: Step, tokens: Tokens[Tokens[int]]) -> None:
        """Record that a step was computed; `tokens` holds each chunk's new tokens."""
        for chunk, new in zip(step.chunks, tokens, strict=True):
            sequence = chunk.sequence
            taken = max(len(new) - 1, 0)  # drafts that were right: their keys and values stay
            sequence.computed = chunk.start + chunk.count - len(chunk.drafts) + taken
            sequence.ids.extend(new)
            self.cache.publish(sequence.number, sequence.ids, sequence.computed)
            self._charge(sequence, sequence.computed)
            if chunk.drafts:
                self.cache.shrink(sequence.number, len(sequence.ids))
                sequence.pace.learn(len(chunk.drafts), taken, self.max_drafts)
                self.drafted += len(chunk.drafts)
                self.accepted += taken

    def finish(self, sequence: Sequence) -> None:
        """Take a running sequence out; its pages are free or cached from now on."""
        self._leave(sequence)
        self._forget_tenants()

    # ---- putting a step together

    def _decode(self) -> None:
        """One token of every sequence that generates, and drafts where there is room for more rows."""
        generating = [sequence for sequence in self.running if sequence.pending == 1]
        spare = self.draft_rows - len(generating)
        for sequence in generating:
            if not sequence.running:
                continue  # it has just given up its pages
            drafts = self._drafts(sequence, spare)
            if not drafts or not self.cache.grow(sequence.number, len(sequence.ids) + len(drafts)):
                drafts = ()
                while sequence.running and not self.cache.grow(sequence.number, len(sequence.ids)):
                    self._preempt(max(self.running, key=self._cheapest_to_lose))
            if sequence.running:
                self._plan(sequence, 1, drafts)
                spare -= len(drafts)

    def _drafts(self, sequence: Sequence, spare: int) -> tuple[int, ...]:
        most = min(self.max_drafts, spare, sequence.limit - len(sequence.ids) - 1)
        if most <= 0 or sequence.completion_tokens == 0:
            return ()
        if sequence.matcher is not None:
            forced = sequence.matcher.forced(sequence.ids[sequence.prompt_tokens :])
            if forced:  # sampling may cut the same characters into other tokens, but seldom does
                return forced[:most]
        return propose(sequence.ids, sequence.pace.ready(most))

    def _prefill(self, bound: int) -> None:
        """Prompts by their tenants' turns, running ones first; a blocked one lets nobody pass into a place.

        The step has `bound` tokens at most.
        """
        ready = [sequence for sequence in self.running if sequence.pending > 1]
        admitting = self.waiting > 0
        while ready or admitting:
            left = bound - self._planned()
            first = self._first_waiting() if admitting else None
            candidates = ready if first is None else [*ready, first]
            sequence = min(candidates, key=self._turn, default=None)
            if sequence is None or (left <= 0 and sequence is not first):
                return
            if sequence is first:
                admitting = self._admit(sequence, left)
                ready = [other for other in ready if other.running]
            else:
                ready.remove(sequence)
            if sequence.running:
                self._plan(sequence, bound - self._planned())

    def _planned(self) -> int:
        return sum(chunk.count for chunk in self._chunks.values())

    def _plan(self, sequence: Sequence, budget: int, drafts: tuple[int, ...] = ()) -> Chunk:
        count = min(sequence.pending, budget)
        samples = count == sequence.pending and len(sequence.ids) < sequence.limit
        chunk = Chunk(sequence, sequence.computed, count + len(drafts), samples, drafts)
        self._charge(sequence, sequence.computed + count)
        self._chunks[sequence] = chunk
        return chunk

    def _first_waiting(self) -> Sequence | None:
        heads = [
            head
            for tenant in self._tenants.values()
            for head in islice((s for s in tenant.waiting[:LOOK] if not self._held_back(s)), 1)
        ]
        return min(heads, key=self._turn, default=None)

    def _held_back(self, sequence: Sequence) -> bool:
        """Whether a prompt that runs is about to compute pages that this one would compute as well."""
        return sequence.shares and any(
            other.pending > 1
            and other.salt == sequence.salt
            and other.computed < _common(sequence.ids, other.ids)
            for other in self.running
        )

    def _turn(self, sequence: Sequence) -> tuple[int, int, bool, int]:
        counter = self._tenant(sequence).counter
        return -sequence.request.priority, counter, not sequence.running, sequence.number

    # ---- places and pages

    def _admit(self, sequence: Sequence, left: int) -> bool:
        """Let the first in turn run, in the place of an over-served one if need be.

        When no tokens are left in the step, those of whoever gives its place up must do.
        """
        while left <= 0 or len(self.running) >= self.max_running or not self._open(sequence):
            victim = self._over_served(sequence)
            if victim is None:
                return False
            left += self._chunks[victim].count if victim in self._chunks else 0
            self._preempt(victim)
        self._tenant(sequence).waiting.remove(sequence)
        sequence.running = True
        bisect.insort(self.running, sequence, key=lambda running: running.number)
        return True

    def _open(self, sequence: Sequence) -> bool:
        spare = len(self.running)  # a page for the next tokens of each, or they would be preempted at once
        cached = self.cache.open(sequence.number, sequence.salt, sequence.ids, spare, share=sequence.shares)
        if cached is None:
            return False
        if sequence.queued:
            sequence.queued = False
            self.queued -= 1
            self.queued_tokens -= sequence.queue_tokens
            sequence.cached = cached
            sequence.charged = cached  # tokens from the cache cost nothing
        sequence.computed = cached
        return True

    def _over_served(self, sequence: Sequence) -> Sequence | None:
        """Whose place a waiting sequence may take: of a lower priority, or of a tenant that is far ahead.

        To a tenant without any place every other one that has several and is not behind counts as ahead.
        """
        own = self._tenant(sequence).counter
        places: dict[str, int] = {}
        for other in self.running:
            places[other.request.tenant] = places.get(other.request.tenant, 0) + 1

        def yields(other: Sequence) -> bool:
            if other.request.priority != sequence.request.priority:
                return other.request.priority < sequence.request.priority
            if other.request.tenant == sequence.request.tenant:
                return False
            lead = self._tenant(other).counter - own
            newcomer = sequence.request.tenant not in places
            return lead > LEAD_STEPS * self.step_tokens or (
                newcomer and lead >= 0 and places[other.request.tenant] > 1
            )

        return max(filter(yields, self.running), key=self._cheapest_to_lose, default=None)

    def _cheapest_to_lose(self, sequence: Sequence) -> tuple[int, int, int]:
        return -sequence.request.priority, self._tenant(sequence).counter, sequence.number

    def _preempt(self, sequence: Sequence) -> None:
        """Take a sequence's pages; those that are published stay cached for its return."""
        self._leave(sequence)
        self._chunks.pop(sequence, None)
        sequence.computed = 0
        sequence.pooled = None
        self.preemptions += 1
        self._wait(self._tenant(sequence), sequence)

    def _leave(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        sequence.running = False
        self.cache.close(sequence.number)

    def _drop_cancelled(self) -> tuple[Sequence, ...]:
        dropped = [sequence for sequence in self.running if sequence.cancelled]
        for sequence in dropped:
            self._leave(sequence)
        for tenant in self._tenants.values():
            gone = [sequence for sequence in tenant.waiting if sequence.cancelled]
            if gone:
                tenant.waiting = [sequence for sequence in tenant.waiting if not sequence.cancelled]
                dropped.extend(gone)
                self.queued -= sum(sequence.queued for sequence in gone)
                self.queued_tokens -= sum(sequence.queue_tokens for sequence in gone if sequence.queued)
        self._cancelled = 0
        self._forget_tenants()
        return tuple(dropped)

    # ---- tenants and the queue

    def _check_queue(self, sequence: Sequence, tokens_per_second: float) -> None:
        tokens = self.queued_tokens + sequence.queue_tokens
        if self.queued and tokens > self.max_queued_tokens:
            waits, allowed = f"{self.queued_tokens} prompt tokens wait", self.max_queued_tokens
        elif self.queued >= self.max_queued:
            waits, allowed = f"{self.queued} requests wait", self.max_queued
        else:
            return
        raise LimitError(
            f"The queue is full: {waits}, {allowed} are allowed.",
            retry_after=min(60.0, max(1.0, self.queued_tokens / max(tokens_per_second, 1.0))),
        )

    def _wait(self, tenant: Tenant, sequence: Sequence) -> None:
        bisect.insort(tenant.waiting, sequence, key=lambda other: (-other.request.priority, other.number))

    def _charge(self, sequence: Sequence, done: int) -> None:
        """Count the tokens up to `done`, each once however often it is computed."""
        if done <= sequence.charged:
            return
        prompt = max(0, min(done, sequence.prompt_tokens) - sequence.charged)
        output = done - sequence.charged - prompt
        tenant = self._tenant(sequence)
        tenant.counter += PROMPT_WEIGHT * prompt + OUTPUT_WEIGHT * output
        sequence.charged = done

    def _tenant(self, sequence: Sequence) -> Tenant:
        return self._tenants[sequence.request.tenant]

    def _busy(self) -> set[str]:
        busy = {sequence.request.tenant for sequence in self.running}
        return busy | {name for name, tenant in self._tenants.items() if tenant.waiting}

    def _level(self, busy: set[str]) -> int:
        return min((self._tenants[name].counter for name in busy), default=0)

    def _activate(self, name: str) -> Tenant:
        tenant = self._tenants.setdefault(name, Tenant())
        busy = self._busy()
        if name not in busy:
            # A tenant that comes back has saved up no credit: it starts level with the least served one.
            tenant.counter = max(tenant.counter, self._level(busy))
        return tenant

    def _forget_tenants(self) -> None:
        """Forget who is away and would start at the level of the least served one anyway."""
        busy = self._busy()
        level = self._level(busy)
        self._tenants = {
            name: tenant
            for name, tenant in self._tenants.items()
            if name in busy or (busy and tenant.counter > level)
        }


def _common(ids: Tokens[int], others: Tokens[int]) -> int:
    """How many tokens of whole pages both begin with, the last token of `ids` left out."""
    end = 0
    while end + PAGE < len(ids) and ids[end : end + PAGE] == others[end : end + PAGE]:
        end += PAGE
    return end
