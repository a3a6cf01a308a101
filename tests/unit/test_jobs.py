"""Jobs: legal moves, pure decisions, and a queue in which only the holder of a lease changes anything."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from lapis.audit import AuditLog
from lapis.db import open_database
from lapis.errors import ConflictError, InputError, NotFoundError
from lapis.jobs.controller import Controller, decide
from lapis.jobs.executor import Status
from lapis.jobs.job import (
    ENDED,
    MOVES,
    Job,
    JobSpec,
    Node,
    Place,
    Priority,
    Resources,
    State,
    check_move,
)
from lapis.jobs.queue import ABSENT_SECONDS, JobQueue
from lapis.jobs.shares import HALF_LIFE, set_weight, shares
from lapis.jobs.waits import waits
from lapis.tables.usage import usage_entries
from lapis.tenants.limits import Limits
from lapis.tenants.prices import Prices
from lapis.tenants.quota import Quota
from lapis.tenants.tenant import Tenants
from lapis.tenants.usage import UsageLedger

SPEC = JobSpec("train", ("lapis", "train", "recipe.toml"), Resources(2, 1), {"A": "b"}, retries=3)
JOB = Job(
    "job_1",
    "default",
    SPEC,
    State.RUNNING,
    "",
    1,
    0,
    "local@here",
    None,
    10.0,
    None,
    0.0,
    "os:ana",
    1.0,
    None,
)


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def queue(database_url: str, clock: Clock) -> Iterator[JobQueue]:
    db = open_database(database_url)
    yield JobQueue(db, clock, lease_seconds=10)
    db.dispose()


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("to", State)
def test_illegal_moves_are_refused_with_the_legal_ones(state: State, to: State) -> None:
    if to in MOVES[state]:
        check_move("job_1", state, to)
        return
    with pytest.raises(ConflictError, match="cannot become") as caught:
        check_move("job_1", state, to)
    assert all(legal in caught.value.message for legal in MOVES[state])


@pytest.mark.parametrize(
    "values",
    [
        {"argv": ()}, {"argv": ("",)}, {"argv": ("echo", "a\0b")}, {"env": {"A=B": "c"}}, {"retries": -1},
        {"ranks": 0}, {"time_limit": 0.0}, {"time_limit": float("nan")},
    ],
)  # fmt: skip
def test_what_no_process_can_have_is_refused(values: dict[str, object]) -> None:
    with pytest.raises(InputError):
        replace(SPEC, **values)  # type: ignore[arg-type]


@pytest.mark.parametrize(("cpus", "gpus"), [(-1.0, 0), (float("nan"), 0), (float("inf"), 0), (1.0, -1)])
def test_impossible_resources_are_refused(cpus: float, gpus: int) -> None:
    with pytest.raises(InputError):
        Resources(cpus, gpus)


def test_a_job_is_read_back_as_it_was_submitted(queue: JobQueue) -> None:
    job = queue.submit(SPEC, "os:ana")
    assert queue.get(job.id) == job == queue.list()[0]
    assert (job.spec, job.state, job.attempt) == (SPEC, State.QUEUED, 0)
    with pytest.raises(NotFoundError):
        queue.get("job_none")


def test_only_one_of_many_claims_a_job(queue: JobQueue) -> None:
    job = queue.submit(SPEC, "os:ana")
    leases = []
    threads = [threading.Thread(target=lambda: leases.append(queue.claim(job, "e"))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(lease is not None for lease in leases) == 1
    assert queue.get(job.id).attempt == 1


def test_who_lost_the_lease_changes_nothing(queue: JobQueue, clock: Clock) -> None:
    job = queue.submit(SPEC, "os:ana")
    stale = queue.claim(job, "e")
    assert stale is not None
    queue.started(stale)
    clock.now += 9.9
    assert queue.orphans("e") == []
    clock.now += 0.1
    orphan = queue.orphans("e")[0]
    fresh = queue.take_over(orphan)
    assert fresh is not None
    assert queue.take_over(orphan) is None  # taken over once
    before = queue.get(job.id)
    for act in (
        lambda: queue.heartbeat(stale),
        lambda: queue.finish(stale, State.SUCCEEDED),
        lambda: queue.requeue(stale, "lost", 1),
        lambda: queue.started(stale),
    ):
        with pytest.raises(ConflictError, match="lease"):
            act()
    assert queue.get(job.id) == before
    assert queue.finish(fresh, State.SUCCEEDED, exit_code=0).state is State.SUCCEEDED
    with pytest.raises(ConflictError, match="lease"):
        queue.heartbeat(fresh)


def test_a_lost_job_is_requeued_once(queue: JobQueue, clock: Clock) -> None:
    job = queue.submit(SPEC, "os:ana")
    lease = queue.claim(job, "e")
    assert lease is not None
    queue.started(lease)
    again = queue.requeue(lease, "lost", 1)
    assert (again.state, again.started_at) == (State.QUEUED, None)  # the lost attempt's start is not its own
    with pytest.raises(ConflictError):
        queue.requeue(lease, "lost", 1)
    assert queue.claim(job, "e") is None  # what was read before the loss is out of date
    assert queue.claim(queue.get(job.id), "e") is not None
    assert queue.get(job.id).attempt == 2


def test_another_machine_s_jobs_are_left_to_it(queue: JobQueue, clock: Clock) -> None:
    queue.claim(queue.submit(SPEC, "os:ana"), "local@there")
    clock.now += 100
    assert queue.orphans("local@here") == []


def test_cancelling_ends_what_waits_and_asks_what_runs(queue: JobQueue) -> None:
    waiting, running = queue.submit(SPEC, "os:ana"), queue.submit(SPEC, "os:ana")
    lease = queue.claim(running, "e")
    assert lease is not None
    assert queue.cancel(waiting.id, "os:bo").state is State.CANCELLED
    asked = queue.cancel(running.id, "os:bo")
    assert (asked.state, asked.cancel_at) == (State.STARTING, 1000.0)
    assert queue.heartbeat(lease).cancel_at == 1000.0
    with pytest.raises(ConflictError, match="ended already"):
        queue.cancel(waiting.id, "os:bo")
    actions = [entry.action for entry in AuditLog(queue.db).entries()]
    assert actions == ["job.submit", "job.submit", "job.cancel", "job.cancel"]


def test_what_runs_goes_on_until_somebody_cancels_it() -> None:
    running, asked = Status("running"), replace(JOB, cancel_at=100.0)
    assert decide(JOB, running, 1e9, warned=False).act == "wait"
    assert decide(asked, running, 100.0, warned=False, grace=5).act == "terminate"
    assert decide(asked, running, 104.9, warned=True, grace=5).act == "wait"
    assert decide(asked, running, 105.0, warned=True, grace=5).act == "kill"


def test_what_ran_into_its_limit_is_ended_and_fails() -> None:
    job = replace(JOB, spec=replace(SPEC, time_limit=60), started_at=100.0)
    running = Status("running")
    assert decide(job, running, 159.9, warned=False).act == "wait"
    assert decide(job, running, 160.0, warned=False, grace=5).act == "terminate"
    assert decide(job, running, 165.0, warned=True, grace=5).act == "kill"
    for status in (Status("lost"), Status("exited", 143)):
        decision = decide(job, status, 166.0, warned=True)
        assert (decision.state, decision.reason) == (State.FAILED, "it ran into its time limit of 60 s")
    assert decide(job, Status("exited", 0), 166.0, warned=True).state is State.SUCCEEDED


def test_what_stops_for_another_has_time_to_save_and_comes_back() -> None:
    job = replace(JOB, preempt_at=100.0, preempt_for="job_2")
    running = Status("running")
    assert decide(job, running, 100.0, warned=False).act == "terminate"
    assert decide(job, running, 159.0, warned=True, checkpoint_grace=60).act == "wait"
    assert decide(job, running, 160.0, warned=True, checkpoint_grace=60).act == "kill"
    for status in (Status("lost"), Status("exited", 130)):
        decision = decide(job, status, 120.0, warned=True)
        assert decision.act == "preempt" and "stopped for another" in decision.reason
    assert decide(job, Status("exited", 0), 120.0, warned=True).state is State.SUCCEEDED  # it was done
    cancelled = replace(job, cancel_at=110.0)
    assert decide(cancelled, running, 121.0, warned=True, grace=10).act == "kill"
    assert decide(cancelled, Status("lost"), 121.0, warned=True).state is State.CANCELLED


@pytest.mark.parametrize(
    ("status", "cancelled", "losses", "state", "reason"),
    [
        (Status("exited", 0), False, 1, State.SUCCEEDED, ""),
        (Status("exited", 3), False, 1, State.FAILED, "exit status 3"),
        (Status("exited", 143), True, 1, State.CANCELLED, "on request"),
        (Status("lost"), True, 1, State.CANCELLED, "on request"),
        (Status("lost"), False, 2, None, "process was lost"),
        (Status("lost"), False, 3, State.FAILED, "process was lost"),
        (Status("fenced"), False, 3, None, "before it began"),
    ],
)
def test_what_ended_is_settled(
    status: Status, cancelled: bool, losses: int, state: State | None, reason: str
) -> None:
    job = replace(JOB, losses=losses, cancel_at=1.0 if cancelled else None)
    decision = decide(job, status, 2.0, warned=cancelled)
    assert (decision.act, decision.state) == ("requeue" if state is None else "finish", state)
    assert reason in decision.reason
    assert state is None or state in ENDED


NODES = (Node("a", Resources(4, 2, 100)),)


def test_gpus_of_running_jobs_are_disjoint_and_come_back_at_the_end(queue: JobQueue) -> None:
    spec = replace(SPEC, resources=Resources(1, 1), ranks=1)
    one, two, three = (queue.submit(spec, "os:ana") for _ in range(3))
    leases = [queue.claim(job, "e", {"a": 1}, NODES, first=job is one) for job in (one, two)]
    assert shares(queue.db, 1000.0)["default"].first_at == 1000.0
    assert [queue.get(job.id).places for job in (one, two)] == [
        (Place("a", 1, (0,)),),
        (Place("a", 1, (1,)),),
    ]
    assert queue.claim(three, "e", {"a": 1}, NODES) is None  # both GPUs are taken
    assert leases[0] is not None
    queue.started(leases[0])
    queue.finish(leases[0], State.SUCCEEDED)
    assert queue.claim(three, "e", {"a": 1}, NODES) is not None
    assert queue.get(three.id).places == (Place("a", 1, (0,)),)


@pytest.mark.parametrize(
    ("resources", "ranks"),
    [(Resources(3), 2), (Resources(1, 0, 101), 1), (Resources(1, 2), 2), (Resources(0, 3), 1)],
)
def test_what_no_longer_fits_is_not_claimed(queue: JobQueue, resources: Resources, ranks: int) -> None:
    job = queue.submit(replace(SPEC, resources=resources, ranks=ranks), "os:ana")
    assert queue.claim(job, "e", {"a": ranks}, NODES) is None
    assert queue.get(job.id).state is State.QUEUED


def test_a_preempted_job_comes_back_to_its_place_and_its_use_is_counted(
    queue: JobQueue, clock: Clock
) -> None:
    spec = replace(SPEC, resources=Resources(2, 1, 10), ranks=2, preemptible=True)
    job = queue.submit(spec, "os:ana")
    lease = queue.claim(job, "e")
    assert lease is not None
    assert not queue.preempt(queue.get(job.id), "job_2")  # it does not run yet
    running = queue.started(lease)
    assert queue.preempt(running, "job_2")
    assert not queue.preempt(running, "job_3")  # it has been asked
    assert (queue.get(job.id).preempt_at, queue.get(job.id).preempt_for) == (1000.0, "job_2")
    clock.now += HALF_LIFE
    stopped = queue.preempted(lease, "stopped for job_2", 143)
    assert (stopped.state, stopped.preempt_at, stopped.exit_code) == (State.PREEMPTED, None, 143)
    assert stopped.started_at is None
    queue.queue_preempted()
    assert queue.list(State.QUEUED)[0].id == job.id
    unit = HALF_LIFE / math.log(2) / 2  # the integral of 2^(-t / half-life) over one half-life
    share = shares(queue.db, clock.now)["default"]
    assert share.used == pytest.approx((4 * unit, 2 * unit, 20 * unit))
    assert share.first_at is None
    assert booked(queue) == [(f"{job.id}:1", "train", 4 * HALF_LIFE, 2 * HALF_LIFE)]
    later = shares(queue.db, clock.now + HALF_LIFE)["default"].used
    assert later == pytest.approx((2 * unit, unit, 10 * unit))


def booked(queue: JobQueue) -> list[tuple[Any, ...]]:
    """The ledger's entries for attempts: id, name, CPU-seconds, GPU-seconds."""
    columns = usage_entries.c
    query = sa.select(columns.reservation_id, columns.model, columns.cpu_ms / 1000, columns.gpu_ms / 1000)
    with queue.db.connect() as connection:
        return [tuple(row) for row in connection.execute(query.order_by(columns.id))]


def test_each_attempt_is_booked_as_it_ends_and_what_never_ran_is_not(queue: JobQueue, clock: Clock) -> None:
    job = queue.submit(SPEC, "os:ana")
    lease = queue.claim(job, "e")
    assert lease is not None
    queue.requeue(lease, "fenced", 0)
    for attempt, seconds in ((2, 5.0), (3, 7.0)):
        lease = queue.claim(queue.get(job.id), "e")
        assert lease is not None
        queue.started(lease)
        clock.now += seconds
        if attempt == 2:
            queue.requeue(lease, "lost", 1)
        else:
            queue.finish(lease, State.FAILED, exit_code=1)
    assert booked(queue) == [(f"{job.id}:2", "train", 10.0, 5.0), (f"{job.id}:3", "train", 14.0, 7.0)]
    assert queue.ledger.balance().balanced


def test_a_project_whose_gpu_time_is_used_up_waits_with_its_gpu_jobs_only(
    queue: JobQueue, clock: Clock
) -> None:
    Tenants(queue.db).set_quota("default", Quota(gpu_seconds_per_month=100), "os:ana")
    running, waiting = queue.submit(SPEC, "os:ana"), queue.submit(SPEC, "os:ana")
    plain = queue.submit(replace(SPEC, resources=Resources(1)), "os:ana")
    lease = queue.claim(running, "e")
    assert lease is not None
    queue.started(lease)
    queue.note_executor("e", (Node("n", Resources(8, 8)),))
    assert "turn has come" in waits(queue)[waiting.id].reason
    clock.now += 100.0  # one GPU for 100 seconds: it goes on, nothing else starts
    queue.note_executor("e", (Node("n", Resources(8, 8)),))
    why = waits(queue)
    assert "its project's GPU time of this month is used up" in why[waiting.id].reason
    assert "turn has come" in why[plain.id].reason
    queue.finish(lease, State.SUCCEEDED)
    assert waits(queue)[waiting.id].reason == why[waiting.id].reason


def test_a_job_starts_only_if_its_time_limit_can_be_paid_for(
    database_url: str, clock: Clock, tmp_path: Path
) -> None:
    db = open_database(database_url)
    prices = tmp_path / "prices.toml"
    prices.write_text("compute = { gpu_hour = 36.0 }\n")  # a hundredth a GPU-second
    queue = JobQueue(db, clock, ledger=UsageLedger(db, clock, prices=Prices(prices)))
    Tenants(db).set_quota("default", Quota(spend_per_month=500), "os:ana")  # 500 GPU-seconds
    queue.note_executor("e", (Node("n", Resources(8, 8)),))
    limited = replace(SPEC, time_limit=300.0)
    first = queue.submit(limited, "os:ana")
    clock.now += 1.0  # of two jobs of one moment either may be first
    second = queue.submit(limited, "os:ana")
    free = queue.submit(replace(limited, resources=Resources(1)), "os:ana")
    why = waits(queue)
    assert "turn has come" in why[first.id].reason
    assert "turn has come" in why[free.id].reason
    assert "3 USD until its time limit" in why[second.id].reason
    assert "2 are left" in why[second.id].reason
    lease = queue.claim(first, "another")  # of whichever executor: it reserves its three
    assert lease is not None
    queue.started(lease)
    assert "2 are left" in waits(queue)[second.id].reason
    clock.now += 100.0
    queue.finish(lease, State.SUCCEEDED)  # one was used, two are free again
    queue.note_executor("e", (Node("n", Resources(8, 8)),))
    assert "turn has come" in waits(queue)[second.id].reason
    other = Tenants(db).create_project("other", "os:ana").id
    Limits(db).set_spend("default", 350, "os:ana")  # of the organization: 2.5 are left
    foreign = queue.submit(limited, "os:ana", project_id=other)
    assert "its organization's money" in waits(queue)[foreign.id].reason
    db.dispose()


def test_a_weight_is_kept_and_audited(queue: JobQueue, clock: Clock) -> None:
    set_weight(queue.db, "default", 2.5, "os:ana", clock.now)
    assert shares(queue.db, clock.now)["default"].weight == 2.5
    assert [entry.action for entry in AuditLog(queue.db).entries()] == ["share.set"]
    for weight in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InputError):
            set_weight(queue.db, "default", weight, "os:ana", clock.now)


class Still:
    """An executor whose jobs run until they are cancelled."""

    def __init__(self, name: str, *nodes: Node) -> None:
        self.name = name
        self.nodes: tuple[Node, ...] | None = nodes or None

    def start(self, job: Job) -> None:
        pass

    def fence(self, job: Job) -> bool:
        return False

    def poll(self, job: Job) -> Status:
        return Status("running")

    terminate = kill = start


def states(queue: JobQueue, *jobs: Job) -> list[State]:
    return [queue.get(job.id).state for job in jobs]


@pytest.mark.parametrize("nodes", [(Node("n", Resources(8, 1)),), ()])  # () has a queue of its own
def test_of_what_can_be_paid_for_the_higher_priority_starts(
    queue: JobQueue, clock: Clock, nodes: tuple[Node, ...]
) -> None:
    Tenants(queue.db).set_quota("default", Quota(gpu_seconds_per_month=1000), "os:ana")
    controller = Controller(queue, Still("e", *nodes))
    low = queue.submit(replace(SPEC, time_limit=900, priority=Priority.LOW), "os:ana")
    clock.now += 1
    high = queue.submit(replace(SPEC, time_limit=900, priority=Priority.HIGH), "os:ana")
    queue.note_executor("e", nodes or None)
    if not nodes:
        assert waits(queue)[high.id].reason == "e gets it next"
        assert "900 GPU-seconds until its time limit" in waits(queue)[low.id].reason
    controller.tick()
    assert states(queue, low, high) == [State.QUEUED, State.STARTING if not nodes else State.RUNNING]
    assert "100 are left" in waits(queue)[low.id].reason


def test_what_cannot_start_takes_no_money_from_what_can(
    database_url: str, clock: Clock, tmp_path: Path
) -> None:
    db = open_database(database_url)
    (tmp_path / "prices.toml").write_text("compute = { gpu_hour = 1.0 }\n")
    queue = JobQueue(db, clock, ledger=UsageLedger(db, clock, prices=Prices(tmp_path / "prices.toml")))
    a, b = (Tenants(db).create_project(name, "os:ana").id for name in ("a", "b"))
    Limits(db).set_spend("default", 10_000, "os:ana")
    controller = Controller(queue, Still("e", Node("n", Resources(8, 2))))
    runs = queue.submit(replace(SPEC, time_limit=3600), "os:ana", a)
    controller.tick()
    big = queue.submit(replace(SPEC, resources=Resources(1, 2), time_limit=48 * 3600), "os:ana", a)
    clock.now += 1
    small = queue.submit(replace(SPEC, time_limit=600), "os:ana", b)
    queue.submit(replace(SPEC, time_limit=200 * 3600), "os:ana", b)
    controller.tick()
    assert states(queue, runs, big, small) == [State.RUNNING, State.QUEUED, State.RUNNING]
    db.dispose()


def test_a_host_leaves_to_another_what_only_that_can_hold(queue: JobQueue, clock: Clock) -> None:
    big = Still("local@gpu", Node("gpu", Resources(8, 8)))
    small = Still("local@web", Node("web", Resources(8, 0)))
    gpu, web = Controller(queue, big), Controller(queue, small)
    gpu.tick()
    eight = replace(SPEC, resources=Resources(1, 8))
    runs = queue.submit(eight, "os:ana")
    clock.now += 1.0  # of two jobs of one moment either may be first
    waits_ = queue.submit(eight, "os:ana")
    too_big = queue.submit(replace(SPEC, resources=Resources(1, 9)), "os:ana")
    gpu.tick()
    web.tick()
    assert states(queue, runs, waits_, too_big) == [State.RUNNING, State.QUEUED, State.FAILED]
    assert "goes next" in waits(queue)[waits_.id].reason
    clock.now += 3600.0  # it is being mended
    web.tick()
    assert states(queue, waits_) == [State.QUEUED]
    assert "it waits for local@gpu" in waits(queue)[waits_.id].reason
    clock.now += ABSENT_SECONDS
    web.tick()
    assert "asks for 1 CPU and 8 GPUs" in queue.get(waits_.id).reason
    assert states(queue, waits_) == [State.FAILED]


def test_what_an_executor_with_a_queue_of_its_own_may_hold_is_left_to_it(queue: JobQueue) -> None:
    Controller(queue, Still("slurm")).tick()
    job = queue.submit(replace(SPEC, resources=Resources(1, 8)), "os:ana")
    Controller(queue, Still("local@web", Node("web", Resources(8, 0)))).tick()
    assert states(queue, job) == [State.QUEUED]


def test_a_clock_that_was_set_back_keeps_no_orphan(queue: JobQueue, clock: Clock) -> None:
    clock.now += 86_400.0
    job = queue.submit(SPEC, "os:ana")
    lease = queue.claim(job, "e")
    assert lease is not None
    queue.started(lease)
    clock.now -= 2.0  # two hosts' clocks differ
    assert queue.orphans("e") == []
    clock.now -= 86_400.0
    assert [orphan.id for orphan in queue.orphans("e")] == [job.id]
    assert queue.take_over(queue.get(job.id)) is not None
    assert queue.orphans("e") == []


def test_in_an_archived_project_nothing_is_queued_or_started(queue: JobQueue) -> None:
    closed = Tenants(queue.db).create_project("closed", "os:ana").id
    job = queue.submit(SPEC, "os:ana", closed)
    Tenants(queue.db).archive(closed, "os:ana")
    with pytest.raises(ConflictError, match="is archived"):
        queue.submit(SPEC, "os:ana", closed)
    controller = Controller(queue, Still("e", Node("n", Resources(8, 8))))
    controller.tick()
    assert states(queue, job) == [State.QUEUED]
    assert "its project is archived" in waits(queue)[job.id].reason
    assert queue.cancel(job.id, "os:ana").state is State.CANCELLED
