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
from lapis.inference.scheduler import Scheduler, Sequence

CONTEXT = 5 * PAGE
PAGES = 8
STEP_TOKENS = 40
RUNNING = 5
QUEUED = 20 * PAGE


def next_token(ids: list[int]) -> int:
    """The token that the model would give: any function of all tokens before."""
    return 10 + zlib.crc32(bytes(ids)) % 7


class SchedulerMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.scheduler = Scheduler(
            KVCache(PAGES), step_tokens=STEP_TOKENS, max_running=RUNNING, max_queued_tokens=QUEUED
        )
        self.memory: dict[tuple[int, int], tuple[str, int]] = {}
        self.live: list[Sequence] = []

    @rule(
        pages=st.lists(st.sampled_from([1, 2]), min_size=1, max_size=3),
        tail=st.integers(0, PAGE - 1),
        max_tokens=st.integers(1, 2 * PAGE),
        tenant=st.sampled_from(["a", "b", "c"]),
    )
    def add(self, pages: list[int], tail: int, max_tokens: int, tenant: str) -> None:
        prompt = [kind for kind in pages for _ in range(PAGE)] + [3] * tail
        request = Request("", prompt, SamplingParams(max_tokens=max_tokens), tenant)
        queued = self.scheduler.queued_tokens
        if queued and queued + pages_for(len(prompt)) * PAGE > QUEUED:
            with pytest.raises(LimitError):
                self.scheduler.add(request, CONTEXT, 0, 100.0)
        else:
            self.live.append(self.scheduler.add(request, CONTEXT, 0, 100.0))

    @rule(index=st.integers(0, 30))
    def cancel(self, index: int) -> None:
        if index < len(self.live):
            self.scheduler.cancel(self.live[index])

    @rule()
    def step(self) -> None:
        cancelled = {sequence for sequence in self.live if sequence.cancelled}
        before = set(self.scheduler.running)
        oldest = min((sequence.number for sequence in before), default=None)
        step = self.scheduler.schedule()
        assert set(step.dropped) == cancelled
        self.live = [sequence for sequence in self.live if sequence not in cancelled]
        running = {sequence.number for sequence in self.scheduler.running}
        assert oldest is None or oldest in running or oldest in {s.number for s in cancelled}
        for new in set(self.scheduler.running) - before:
            in_line = [
                s for s in self.live if s.number not in running and s.request.tenant == new.request.tenant
            ]
            assert all(new.number < other.number for other in in_line), "a younger one of a tenant went first"
        assert step.tokens <= STEP_TOKENS
        assert step.chunks or not self.live, "nothing is computed though something waits"
        for chunk in step.chunks:
            self.compute(chunk.sequence, chunk.start, chunk.count, chunk.samples)
        tokens = [next_token(chunk.sequence.ids) if chunk.samples else None for chunk in step.chunks]
        self.scheduler.commit(step, tokens)
        for chunk in step.chunks:
            sequence = chunk.sequence
            if len(sequence.ids) >= sequence.limit:
                self.scheduler.finish(sequence)
                self.live.remove(sequence)
                self.check_text(sequence)

    def compute(self, sequence: Sequence, start: int, count: int, samples: bool) -> None:
        assert count > 0
        assert start == sequence.computed
        assert samples == (start + count == len(sequence.ids))
        table = self.scheduler.cache.table(sequence.number)
        tenant = sequence.request.tenant
        digest = 0
        for position in range(start + count):
            place = (table[position // PAGE], position % PAGE)
            digest = zlib.crc32(bytes([sequence.ids[position]]), digest)  # of the whole prefix
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
        queued = sum(sequence.queue_tokens for sequence in self.live if sequence.queued)
        assert scheduler.queued_tokens == queued

    def teardown(self) -> None:
        bound = 1 + sum(2 * sequence.limit for sequence in self.live)
        for _ in range(bound):
            if not self.live:
                break
            self.step()
        assert not self.live, "a request starves"
        assert self.scheduler.idle
        assert self.scheduler.cache.used == 0


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(derandomize=True, max_examples=60, stateful_step_count=40, deadline=None)
