"""What tenants may rely on, whatever the others send: an equal share of tokens, and a place soon."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import hypothesis.strategies as st
from hypothesis import given, settings

from lapis.inference.kv_cache import PAGE, KVCache, pages_for
from lapis.inference.request import Request, SamplingParams
from lapis.inference.scheduler import (
    LEAD_STEPS,
    OUTPUT_WEIGHT,
    PROMPT_WEIGHT,
    Scheduler,
    Sequence,
    Step,
)

CONTEXT = 6 * PAGE


@dataclass
class Traffic:
    """A scheduler whose tenants never run out of requests of the given (prompt, new tokens) in turn."""

    scheduler: Scheduler
    kinds: dict[str, list[tuple[int, int]]]
    served: Counter[str] = field(default_factory=Counter)
    done: dict[Sequence, int] = field(default_factory=dict)
    sent: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)

    def send(self, tenant: str) -> Sequence:
        kinds = self.kinds[tenant]
        prompt, new = kinds[self.sent[tenant] % len(kinds)]
        self.sent[tenant] += 1
        ids = [self.sent[tenant] % 250 + 1] * prompt  # no prompt is cached
        request = Request("", ids, SamplingParams(max_tokens=new), tenant)
        return self.scheduler.add(request, CONTEXT, 0, 100.0)

    def step(self) -> Step:
        step = self.scheduler.schedule()
        for chunk in step.chunks:
            sequence, end = chunk.sequence, chunk.start + chunk.count
            new = range(self.done.get(sequence, sequence.cached), end)  # computing again is no service
            for position in new:
                prompt = position < sequence.prompt_tokens
                self.served[sequence.request.tenant] += PROMPT_WEIGHT if prompt else OUTPUT_WEIGHT
            self.done[sequence] = max(end, self.done.get(sequence, 0))
        self.scheduler.commit(step, [(7,) if chunk.samples else () for chunk in step.chunks])
        for chunk in step.chunks:
            if len(chunk.sequence.ids) >= chunk.sequence.limit:
                self.scheduler.finish(chunk.sequence)
        return step


kinds = st.lists(st.tuples(st.integers(1, 4 * PAGE), st.integers(1, 2 * PAGE)), min_size=1, max_size=4)


@settings(max_examples=60)
@given(
    kinds=st.tuples(kinds, kinds, kinds),
    pages=st.integers(pages_for(CONTEXT), 20),
    step_tokens=st.integers(8, 80),
    running=st.integers(1, 8),
)
def test_tenants_that_always_want_more_get_the_same(
    kinds: tuple[list[tuple[int, int]], ...], pages: int, step_tokens: int, running: int
) -> None:
    scheduler = Scheduler(
        KVCache(pages), step_tokens=step_tokens, max_running=running, max_queued_tokens=10**9
    )
    traffic = Traffic(scheduler, dict(zip("abc", kinds, strict=True)))
    # The paper's bound for two backlogged tenants is a constant of the batch; ours is one of the step.
    bound = (LEAD_STEPS + 2 * OUTPUT_WEIGHT) * step_tokens
    for _ in range(300):
        for tenant in "abc":
            while sum(s.request.tenant == tenant for s in waiting(scheduler)) < 2:
                traffic.send(tenant)
        traffic.step()
        served = [traffic.served[tenant] for tenant in "abc"]
        assert max(served) - min(served) <= bound


def waiting(scheduler: Scheduler) -> list[Sequence]:
    return [sequence for tenant in scheduler._tenants.values() for sequence in tenant.waiting]


@settings(max_examples=60)
@given(
    flood=kinds,
    newcomer=st.tuples(st.integers(1, 4 * PAGE), st.integers(1, PAGE)),
    before=st.integers(0, 60),
    pages=st.integers(pages_for(CONTEXT), 40),
    running=st.integers(1, 8),
)
def test_a_newcomer_has_a_place_soon_and_is_done_in_due_time(
    flood: list[tuple[int, int]], newcomer: tuple[int, int], before: int, pages: int, running: int
) -> None:
    step_tokens = 32
    scheduler = Scheduler(
        KVCache(pages), step_tokens=step_tokens, max_running=running, max_queued_tokens=10**9
    )
    traffic = Traffic(scheduler, {"flood": flood, "new": [newcomer]})
    for _ in range(40):
        traffic.send("flood")
    for _ in range(before):
        traffic.step()
    sequence = traffic.send("new")
    bound = 1 + LEAD_STEPS * step_tokens  # at worst one long text has all the pages and grows token by token
    for _ in range(bound):
        if sequence.running or sequence.computed:
            break
        traffic.step()
    assert sequence.running or sequence not in waiting(scheduler)
    for _ in range(4 * sum(newcomer) + 4 * bound):
        if len(sequence.ids) >= sequence.limit:
            break
        traffic.step()
    assert len(sequence.ids) == sequence.limit
