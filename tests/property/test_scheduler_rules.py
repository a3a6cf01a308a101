"""The scheduler under random use, over a memory that notes what each forward would have read and written."""

from __future__ import annotations

import zlib

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from lapis.errors import LimitError
from lapis.inference.kv_cache import PAGE, KVCache, pages_for
from lapis.inference.request import Request, SamplingParams
from lapis.inference.scheduler import Chunk, Scheduler, Sequence, Step

CONTEXT = 5 * PAGE
PAGES = 8
STEP_TOKENS = 40
RUNNING = 5
QUEUED = 20 * PAGE
WAITING = 12
DRAFT_ROWS = 10
BOUND = 12 * PAGE  # tokens that prompts may take in a step while others generate


def next_token(ids: list[int]) -> int:
    """The token that the model would give: any function of all tokens before."""
    return 10 + (zlib.crc32(bytes(ids)) % 7 if zlib.crc32(bytes(ids[-3:])) % 5 == 0 else ids[-1] % 3)


def new_tokens(chunk: Chunk) -> list[int]:
    """What sampling gives for a chunk: a token, and one more behind every draft that is right."""
    new: list[int] = []
    while chunk.samples and len(new) <= len(chunk.drafts):
        new.append(next_token([*chunk.sequence.ids, *new]))
        if new[-1:] != list(chunk.drafts[len(new) - 1 : len(new)]):
            break
    return new


class SchedulerMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.scheduler = Scheduler(
            KVCache(PAGES),
            step_tokens=STEP_TOKENS,
            max_running=RUNNING,
            max_queued_tokens=QUEUED,
            max_queued=WAITING,
            max_drafts=3,
            draft_rows=DRAFT_ROWS,
        )
        self.memory: dict[tuple[int, int], tuple[str, int]] = {}
        self.live: list[Sequence] = []

    @rule(
        pages=st.lists(st.sampled_from([1, 2]), min_size=1, max_size=3),
        tail=st.integers(0, PAGE - 1),
        max_tokens=st.integers(0, 2 * PAGE),
        tenant=st.sampled_from(["a", "b", "c"]),
        priority=st.sampled_from([0, 0, 0, -1]),
    )
    def add(self, pages: list[int], tail: int, max_tokens: int, tenant: str, priority: int) -> None:
        prompt = [kind for kind in pages for _ in range(PAGE)] + [3] * tail
        params = SamplingParams(max_tokens=max_tokens, prompt_logprobs=None if max_tokens else 0)
        request = Request("", prompt, params, tenant, priority)
        scheduler = self.scheduler
        tokens = scheduler.queued_tokens + pages_for(len(prompt)) * PAGE
        if scheduler.queued and (tokens > QUEUED or scheduler.queued >= WAITING):
            with pytest.raises(LimitError):
                scheduler.add(request, CONTEXT, 0, 100.0)
        else:
            self.live.append(scheduler.add(request, CONTEXT, 0, 100.0))

    @rule(index=st.integers(0, 30))
    def cancel(self, index: int) -> None:
        if index < len(self.live):
            self.scheduler.cancel(self.live[index])

    @rule()
    def step(self) -> None:
        cancelled = {sequence for sequence in self.live if sequence.cancelled}
        before = set(self.scheduler.running)
        step = self.scheduler.schedule(BOUND)
        assert set(step.dropped) == cancelled
        self.live = [sequence for sequence in self.live if sequence not in cancelled]
        self.check_order(before - cancelled)
        self.check_budget(step)
        for chunk in step.chunks:
            self.compute(chunk)
        self.scheduler.commit(step, [new_tokens(chunk) for chunk in step.chunks])
        for chunk in step.chunks:
            sequence = chunk.sequence
            if len(sequence.ids) >= sequence.limit and sequence.computed >= sequence.prompt_tokens:
                self.scheduler.finish(sequence)
                self.live.remove(sequence)
                self.check_text(sequence)

    def check_order(self, before: set[Sequence]) -> None:
        """Within a tenant and a priority the older one keeps its place, and nobody is passed."""
        running = set(self.scheduler.running)
        for tenant, priority in {(s.request.tenant, s.request.priority) for s in self.live}:
            same = [s for s in self.live if (s.request.tenant, s.request.priority) == (tenant, priority)]
            lost = [s.number for s in same if s in before - running]
            kept = [s.number for s in same if s in before & running]
            assert max(kept, default=-1) < min(lost, default=10**9), "an older one lost its place"
            for new in [s for s in same if s in running - before]:
                passed = [s for s in same if s not in running and s.number < new.number]
                assert all(self.may_wait(s) for s in passed), "a younger one of a tenant went first"

    def may_wait(self, sequence: Sequence) -> bool:
        """One whose beginning is being computed by another may wait for it."""
        return sequence.shares and any(
            other.salt == sequence.salt and other.ids[:PAGE] == sequence.ids[:PAGE]
            for other in self.scheduler.running
        )

    def check_budget(self, step: Step) -> None:
        assert step.tokens <= STEP_TOKENS
        assert step.chunks or not self.live, "nothing is computed though something waits"
        generating = {s for s in self.scheduler.running if s.pending == 1}
        assert generating <= {chunk.sequence for chunk in step.chunks}, "a next token was skipped"
        if any(chunk.drafts for chunk in step.chunks):
            rows = sum(chunk.count for chunk in step.chunks if chunk.sequence in generating)
            assert rows <= DRAFT_ROWS

    def compute(self, chunk: Chunk) -> None:
        sequence, start, count = chunk.sequence, chunk.start, chunk.count
        assert count > len(chunk.drafts)
        assert start == sequence.computed
        last = start + count == len(sequence.ids) + len(chunk.drafts)
        assert chunk.samples == (last and len(sequence.ids) < sequence.limit)
        assert len(sequence.ids) + len(chunk.drafts) < sequence.limit or not chunk.drafts
        table = self.scheduler.cache.table(sequence.number)
        tenant = sequence.request.tenant
        digest = 0
        for position, token in enumerate([*sequence.ids[:start], *chunk.ids]):
            place = (table[position // PAGE], position % PAGE)
            digest = zlib.crc32(bytes([token]), digest)  # of the whole prefix
            here = (tenant, digest)
            if position >= start:
                self.memory[place] = here
            assert self.memory[place] == here, "a forward would read another text's keys"

    def check_text(self, sequence: Sequence) -> None:
        """Whatever happened on the way, the text is the one that it gets alone."""
        ids = list(sequence.request.prompt_ids)
        while len(ids) < sequence.limit:
            ids.append(next_token(ids))
        assert sequence.ids == ids

    @invariant()
    def books(self) -> None:
        scheduler = self.scheduler
        scheduler.cache.check()
        assert len(scheduler.running) <= RUNNING
        assert len(scheduler.running) + scheduler.waiting == len(self.live)
        queued = [sequence.queue_tokens for sequence in self.live if sequence.queued]
        assert (scheduler.queued_tokens, scheduler.queued) == (sum(queued), len(queued))
        assert set(scheduler.running) == {sequence for sequence in self.live if sequence.running}

    def teardown(self) -> None:
        bound = 1 + sum(3 * sequence.limit for sequence in self.live)
        for _ in range(bound):
            if not self.live:
                break
            self.step()
        assert not self.live, "a request starves"
        assert self.scheduler.idle
        assert self.scheduler.cache.used == 0


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(derandomize=True, max_examples=60, stateful_step_count=40, deadline=None)
