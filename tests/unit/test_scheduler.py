"""The scheduler's rules one by one; random use is in tests/property."""

from __future__ import annotations

from collections import Counter

import pytest

from lapis.errors import LimitError
from lapis.inference.kv_cache import PAGE, KVCache
from lapis.inference.request import Request, SamplingParams
from lapis.inference.scheduler import Scheduler, Sequence, Step


def scheduler(pages: int = 64, step_tokens: int = 64, running: int = 8, queued: int = 10000) -> Scheduler:
    return Scheduler(KVCache(pages), step_tokens=step_tokens, max_running=running, max_queued_tokens=queued)


def add(
    scheduler: Scheduler, prompt: int, max_tokens: int = 10, tenant: str = "a", kind: int = 1
) -> Sequence:
    request = Request("", [kind] * prompt, SamplingParams(max_tokens=max_tokens), tenant)
    return scheduler.add(request, context=2048, seed=0, tokens_per_second=100.0)


def run(scheduler: Scheduler) -> Step:
    """One step whose every token is a 7."""
    step = scheduler.schedule()
    scheduler.commit(step, [(7,) if chunk.samples else () for chunk in step.chunks])
    for chunk in step.chunks:
        if len(chunk.sequence.ids) >= chunk.sequence.limit:
            scheduler.finish(chunk.sequence)
    return step


def plan(step: Step) -> list[tuple[int, int, int, bool]]:
    return [(chunk.sequence.number, chunk.start, chunk.count, chunk.samples) for chunk in step.chunks]


def test_decoding_goes_on_while_a_long_prompt_comes_in_chunks() -> None:
    work = scheduler(step_tokens=64)
    add(work, 10)
    run(work)
    add(work, 150, kind=2)
    assert plan(run(work)) == [(0, 10, 1, True), (1, 0, 63, False)]
    assert plan(run(work)) == [(0, 11, 1, True), (1, 63, 63, False)]
    assert plan(run(work)) == [(0, 12, 1, True), (1, 126, 24, True)]
    assert plan(run(work)) == [(0, 13, 1, True), (1, 150, 1, True)]


def test_prompts_share_a_step() -> None:
    work = scheduler(step_tokens=64)
    add(work, 20, kind=1)
    add(work, 30, kind=2)
    add(work, 30, kind=3)
    assert plan(run(work)) == [(0, 0, 20, True), (1, 0, 30, True), (2, 0, 14, False)]


def test_a_known_beginning_is_not_computed_again() -> None:
    work = scheduler(step_tokens=256)
    add(work, 100, max_tokens=1)
    run(work)
    second = add(work, 100)
    assert plan(run(work)) == [(1, 96, 4, True)]
    assert second.cached == 96


def test_the_youngest_gives_up_its_pages_and_comes_back() -> None:
    work = scheduler(pages=4, step_tokens=128)
    old = add(work, PAGE - 1, max_tokens=2 * PAGE, kind=1)
    young = add(work, PAGE - 1, max_tokens=2 * PAGE, kind=2)
    while not work.preemptions:
        run(work)
    assert (work.running, work.waiting) == ([old], 1)
    assert (young.computed, young.completion_tokens > 0) == (0, True)
    while not work.idle:
        run(work)
    assert work.preemptions == 1
    assert len(old.ids) == len(young.ids) == 3 * PAGE - 1
    assert work.cache.used == 0


def test_a_cancelled_sequence_is_gone_at_the_next_step() -> None:
    work = scheduler(running=1)
    running, waiting = add(work, 40), add(work, 40)
    run(work)
    assert work.cache.used == 2
    work.cancel(running)
    work.cancel(waiting)
    work.cancel(waiting)
    step = work.schedule()
    assert set(step.dropped) == {running, waiting}
    assert step.chunks == ()
    assert (work.idle, work.cache.used, work.queued_tokens) == (True, 0, 0)


def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    work = scheduler(queued=10 * PAGE)
    for _ in range(5):
        add(work, PAGE + 1)
    with pytest.raises(LimitError) as caught:
        add(work, 1)
    assert caught.value.retry_after == pytest.approx(3.2)  # 320 waiting tokens at 100 a second
    assert caught.value.http_status == 429
    run(work)
    add(work, 1)


def test_one_prompt_is_taken_however_long_it_is() -> None:
    work = scheduler(queued=PAGE)
    add(work, 20 * PAGE)
    with pytest.raises(LimitError):
        add(work, 1)


def test_tenants_take_turns_by_tokens_whatever_they_send() -> None:
    work = scheduler(pages=256, step_tokens=64, running=4, queued=10**6)
    for _ in range(50):
        add(work, 60, max_tokens=20, tenant="many")
    for _ in range(10):
        add(work, 60, max_tokens=20, tenant="few")
    served: Counter[str] = Counter()
    while any(sequence.request.tenant == "few" for sequence in work.running) or served["few"] == 0:
        for chunk in run(work).chunks:
            served[chunk.sequence.request.tenant] += chunk.count
    assert 0.6 < served["few"] / served["many"] < 1.6


def test_a_tenant_that_was_away_has_saved_up_nothing() -> None:
    work = scheduler(running=1, step_tokens=64)
    for _ in range(40):
        add(work, 30, max_tokens=5, tenant="steady")
    for _ in range(100):
        run(work)
    for _ in range(20):
        add(work, 30, max_tokens=5, tenant="newcomer")
    first = []
    while len(first) < 10:
        step = run(work)
        first += [chunk.sequence.request.tenant for chunk in step.chunks if chunk.start == 0]
    assert 4 <= first.count("newcomer") <= 6


def test_a_long_prompt_is_not_passed_by_short_ones_for_ever() -> None:
    work = scheduler(pages=8, step_tokens=64, running=8)
    for _ in range(3):
        add(work, 40, max_tokens=20, tenant="small")
    run(work)
    long = add(work, 7 * PAGE, max_tokens=2, tenant="large")
    for _ in range(200):
        if long.completion_tokens == 2:
            break
        if work.waiting < 5:
            add(work, 40, max_tokens=20, tenant="small")
        run(work)
    assert long.completion_tokens == 2
