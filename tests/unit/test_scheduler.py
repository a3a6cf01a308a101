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
    scheduler: Scheduler,
    prompt: int,
    max_tokens: int = 10,
    tenant: str = "a",
    kind: int = 1,
    priority: int = 0,
) -> Sequence:
    request = Request("", [kind] * prompt, SamplingParams(max_tokens=max_tokens), tenant, priority)
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


def test_a_newcomer_takes_the_place_of_a_flood() -> None:
    work = scheduler(running=4, step_tokens=64)
    flood = [add(work, 10, max_tokens=1000, tenant="flood") for _ in range(10)]
    for _ in range(5):
        run(work)
    newcomer = add(work, 10, max_tokens=3, tenant="newcomer")
    run(work)
    assert work.running == [*flood[:3], newcomer]
    for _ in range(3):
        run(work)
    assert work.running == flood[:4]
    assert flood[3].completion_tokens > 4


def test_a_place_is_not_taken_from_a_tenant_that_has_one_unless_it_is_far_ahead() -> None:
    work = scheduler(running=2, step_tokens=64)
    first = add(work, 10, max_tokens=1000, tenant="first")
    second = add(work, 10, max_tokens=1000, tenant="second")
    run(work)
    third = add(work, 10, max_tokens=1000, tenant="third")
    run(work)
    assert work.running == [first, second]
    steps = 0
    while third not in work.running:
        run(work)
        steps += 1
    assert 50 < steps < 80  # 2 steps of 64 tokens ahead, a new token counting twice
    assert len(work.running) == 2


def test_urgent_work_displaces_the_rest_which_then_goes_on() -> None:
    work = scheduler(running=2, step_tokens=64)
    batch = [add(work, 10, max_tokens=20, tenant="a", priority=-1) for _ in range(3)]
    run(work)
    live = [add(work, 10, max_tokens=5, tenant="a") for _ in range(3)]
    run(work)
    assert work.running == live[:2]
    while not work.idle:
        run(work)
    assert {len(sequence.ids) for sequence in batch} == {30}


def test_prompts_of_several_tenants_share_a_step_by_turns() -> None:
    work = scheduler(step_tokens=64)
    for kind in (1, 2, 3):
        add(work, 40, tenant="many", kind=kind)
    add(work, 20, tenant="few")
    assert plan(run(work)) == [(0, 0, 40, True), (3, 0, 20, True), (1, 0, 4, False)]


def test_prompts_leave_time_for_the_others_tokens() -> None:
    work = scheduler(step_tokens=64)
    add(work, 10)
    add(work, 100, kind=2)
    run(work)
    step = work.schedule(prompt_tokens=32)
    assert plan(step) == [(0, 10, 1, True), (1, 54, 32, False)]


def test_answers_to_one_prompt_compute_it_once() -> None:
    work = scheduler(step_tokens=64)
    answers = [add(work, 100) for _ in range(4)]
    other = add(work, 20, kind=2)
    steps = [run(work) for _ in range(3)]
    assert plan(steps[0]) == [(0, 0, 64, False)]
    assert plan(steps[1]) == [(0, 64, 36, True), (4, 0, 20, True)]
    assert plan(steps[2])[2:] == [(1, 96, 4, True), (2, 96, 4, True), (3, 96, 4, True)]
    assert [answer.cached for answer in answers] == [0, 96, 96, 96]
    assert other.completion_tokens == 2


def test_the_number_of_waiting_requests_is_bounded_as_well() -> None:
    work = Scheduler(KVCache(64), step_tokens=8, max_running=1, max_queued_tokens=10**6, max_queued=2)
    add(work, 1)
    run(work)
    add(work, 1)
    last = add(work, 1)
    with pytest.raises(LimitError, match="2 requests wait"):
        add(work, 1)
    work.cancel(last)
    work.schedule()
    add(work, 1)


def test_pages_for_rejected_drafts_are_given_back() -> None:
    work = Scheduler(
        KVCache(8), step_tokens=64, max_running=2, max_queued_tokens=1000, max_drafts=4, draft_rows=8
    )
    sequence = add(work, PAGE - 2, max_tokens=20, kind=7)  # a run of 7s: 7 7 7 is what comes next
    run(work)
    step = work.schedule()
    assert plan(step) == [(0, PAGE - 2, 3, True)]
    assert step.chunks[0].drafts == (7, 7)
    assert work.cache.used == 2
    work.commit(step, [(5,)])
    assert (work.cache.used, sequence.ids[-2:], sequence.computed) == (1, [7, 5], PAGE - 1)
