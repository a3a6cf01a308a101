"""Limits beyond a project's tokens: per model, at once, batches, money, GPU time, storage; and which models at all."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Engine

from lapis.db import open_database
from lapis.errors import ConfigError, ConflictError, InputError, LimitError, NotFoundError
from lapis.jobs.job import JobSpec, Resources, State
from lapis.jobs.queue import JobQueue
from lapis.tenants.keys import LOCAL, ApiKeys, Identity
from lapis.tenants.limits import Limits
from lapis.tenants.policy import EVERY_MODEL, ModelPolicy
from lapis.tenants.prices import Prices
from lapis.tenants.quota import NANO, LimitState, Quota
from lapis.tenants.tenant import Tenants
from lapis.tenants.usage import Usage, UsageLedger

ANA = "os:ana"
NOON = 1_764_417_620.0  # 2025-11-29 12:00:20 UTC
PRICES = """
[models.tiny]
prompt = 1.0
cached = 0.5
completion = 4.0
[models.default]
prompt = 2.0
[compute]
gpu_hour = 3.6
"""


class Clock:
    def __init__(self) -> None:
        self.now = NOON

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Engine]:
    engine = open_database(f"sqlite:///{tmp_path / 'lapis.db'}")
    yield engine
    engine.dispose()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def ledger(db: Engine, clock: Clock, tmp_path: Path) -> UsageLedger:
    (tmp_path / "prices.toml").write_text(PRICES)
    return UsageLedger(db, clock, Prices(tmp_path / "prices.toml"))


def of(project_id: str, *, batch: bool = False) -> Identity:
    return replace(LOCAL, project_id=project_id, background=batch)


def refused(
    ledger: UsageLedger, identity: Identity, model: str, tokens: int, why: str, **more: int
) -> LimitError:
    with pytest.raises(LimitError, match=why) as caught:
        ledger.reserve(identity, model, tokens, **more)
    return caught.value


def test_a_models_limit_binds_that_model_only_and_the_projects_binds_all(
    db: Engine, ledger: UsageLedger, clock: Clock
) -> None:
    Tenants(db).set_quota("default", Quota(tokens_per_minute=100), ANA)
    Limits(db).set_model("default", "tiny", Quota(requests_per_minute=2, tokens_per_day=50), ANA)
    first = ledger.reserve(LOCAL, "tiny", 30)
    assert first.limits == (
        LimitState("tokens_per_minute", "", 100, 70, 40.0),
        LimitState("tokens_per_day", "tiny", 50, 20, 12 * 3600 - 20.0),
        LimitState("requests_per_minute", "tiny", 2, 1, 40.0),
    )
    error = refused(ledger, LOCAL, "tiny", 21, "50 tokens per day for the model 'tiny'")
    assert (error.param, error.retry_after) == ("tokens_per_day", 12 * 3600 - 20)
    ledger.settle(first, Usage(5, 5))
    ledger.settle(ledger.reserve(LOCAL, "tiny", 20), Usage(10, 5))
    refused(ledger, LOCAL, "tiny", 1, "2 requests per minute for the model 'tiny'")
    ledger.reserve(LOCAL, "big", 75)
    refused(ledger, LOCAL, "big", 1, "100 tokens per minute is reached: 100 used, 1 asked")
    clock.now += 40
    ledger.reserve(LOCAL, "tiny", 25)
    assert ledger.consumption("default", "tiny").tokens_day == 50
    Limits(db).set_model("default", "tiny", Quota(), ANA)
    ledger.reserve(LOCAL, "tiny", 75)


@pytest.mark.parametrize(
    ("model", "version"), [("tiny", "tiny:1"), ("ft:tiny:x:y:1", "ft:tiny:x:y:1:ckpt-step-5")]
)
def test_a_models_limits_are_not_passed_by_asking_for_a_version_of_it(
    db: Engine, ledger: UsageLedger, model: str, version: str
) -> None:
    limits, also = Limits(db), f"{model.replace('tiny', 'tini')}:1"
    limits.set_model("default", model, Quota(requests_per_minute=3, concurrent_requests=2), ANA)
    first, second = ledger.reserve(LOCAL, model, 1), ledger.reserve(LOCAL, version, 1)
    assert first.limits[0].remaining - 1 == second.limits[0].remaining == 1
    refused(ledger, LOCAL, version, 1, f"2 concurrent requests for the model '{model}'")
    ledger.settle(second, Usage(1, 0))
    ledger.reserve(LOCAL, version, 1)
    refused(ledger, LOCAL, version, 1, "3 requests per minute")
    ledger.reserve(LOCAL, also, 1)  # another model
    assert ledger.summary("model")[0].group == version  # the ledger knows what was asked for
    with pytest.raises(InputError, match="versions and checkpoints together"):
        limits.set_model("default", version, Quota(requests_per_minute=9), ANA)


def test_a_version_costs_as_its_release_unless_it_has_a_price(tmp_path: Path) -> None:
    path = tmp_path / "prices.toml"
    path.write_text(PRICES + '[models."tiny:2"]\nprompt = 9.0\n[models."ft:tiny:x:y:1"]\nprompt = 3.0\n')
    costs = Prices(path).current()
    names = ("tiny", "tiny:1", "tiny:2", "ft:tiny:x:y:1:ckpt-step-5", "ft:tiny:x:y:2:ckpt-step-5", "other:1")
    assert [costs.tokens(name, 1000, 0) * 1000 // NANO for name in names] == [1, 1, 9, 3, 1, 2]


def test_a_limit_that_is_set_later_knows_what_was_used_before(db: Engine, ledger: UsageLedger) -> None:
    ledger.settle(ledger.reserve(LOCAL, "tiny", 30), Usage(20, 10))
    Limits(db).set_model("default", "tiny", Quota(tokens_per_day=35), ANA)
    refused(ledger, LOCAL, "tiny", 6, "30 used")
    ledger.reserve(LOCAL, "tiny", 5)


def test_requests_at_once_are_counted_until_they_end_or_their_process_died(
    db: Engine, ledger: UsageLedger, clock: Clock
) -> None:
    Tenants(db).set_quota("default", Quota(concurrent_requests=3), ANA)
    Limits(db).set_model("default", "tiny", Quota(concurrent_requests=1), ANA)
    tiny = ledger.reserve(LOCAL, "tiny", 1)
    error = refused(ledger, LOCAL, "tiny", 1, "1 concurrent requests for the model 'tiny'")
    assert error.retry_after == 1.0
    others = [ledger.reserve(LOCAL, "big", 1) for _ in range(2)]
    refused(ledger, LOCAL, "big", 1, "3 concurrent requests is reached")
    ledger.settle(tiny, Usage(1, 0))
    ledger.release(others[0])
    ledger.reserve(LOCAL, "tiny", 1)
    clock.now += 600
    for _ in range(2):
        ledger.reserve(LOCAL, "big", 1)


def test_batches_have_a_limit_of_their_own_and_leave_the_minute_to_live_traffic(
    db: Engine, ledger: UsageLedger
) -> None:
    quota = Quota(requests_per_minute=1, tokens_per_minute=10, tokens_per_day=1000, batch_tokens_per_day=100)
    Tenants(db).set_quota("default", quota, ANA)
    batch = of("default", batch=True)
    made = ledger.reserve(batch, "tiny", 120, generated=60)
    ledger.settle(made, Usage(50, 5))
    ledger.reserve(batch, "tiny", 60, generated=10)
    refused(ledger, batch, "tiny", 1, "100 batch tokens per day is reached: 100 used")
    ledger.reserve(LOCAL, "tiny", 10)
    assert ledger.consumption("default").tokens_day == 55 + 60 + 10


def test_money_is_reserved_at_its_most_and_settled_by_the_prices_of_then(
    db: Engine, ledger: UsageLedger, tmp_path: Path
) -> None:
    Tenants(db).set_quota(
        "default", Quota(spend_per_month=1), ANA
    )  # a cent is 10,000 of tiny's prompt tokens
    made = ledger.reserve(LOCAL, "tiny", 4000, generated=2000)  # 0.2 + 0.8 cents
    refused(ledger, LOCAL, "tiny", 1, r"1 cents spent per month is reached: 1 used, 0\.0001 asked")
    ledger.settle(made, Usage(2000, 100, cached_tokens=1000))  # 0.1 + 0.05 + 0.04 cents
    spent = sa.text("SELECT sum(cost) FROM usage_entries")
    with db.connect() as connection:
        assert connection.execute(spent).scalar() == 0.0019 * NANO
    ledger.reserve(LOCAL, "ft:tiny:org:x:1", 8000)  # costs as its base
    refused(ledger, LOCAL, "other", 100, "cents")
    (tmp_path / "prices.toml").write_text(PRICES.replace("prompt = 1.0", "prompt = 9.0"))
    refused(ledger, LOCAL, "tiny", 100, "cents")
    with db.connect() as connection:
        assert connection.execute(spent).scalar() == 0.0099 * NANO  # what was is as it was
    (tmp_path / "prices.toml").write_text("prices = 'none'")
    refused(ledger, LOCAL, "tiny", 100, "cents")  # the last list that could be read stays in force


def test_an_organizations_limit_is_on_the_sum_of_its_projects(db: Engine, ledger: UsageLedger) -> None:
    tenants = Tenants(db)
    one, two = (tenants.create_project(name, ANA).id for name in ("one", "two"))
    acme = tenants.create_organization("acme", ANA).id
    foreign = tenants.create_project("theirs", ANA, acme).id
    Limits(db).set_spend("default", 1, ANA)
    ledger.reserve(of(one), "tiny", 6000)
    refused(ledger, of(two), "tiny", 4001, "cents")
    ledger.reserve(of(two), "tiny", 4000)
    ledger.reserve(of(foreign), "tiny", 10**6)


def test_a_jobs_time_is_booked_once_as_it_ends(db: Engine, ledger: UsageLedger, clock: Clock) -> None:
    assert ledger.work_left() == {}
    Tenants(db).set_quota("default", Quota(gpu_seconds_per_month=5000), ANA)
    for _ in range(2):  # the second time by who took over
        ledger.book("default", "job_1:1", "train", cpu_seconds=10.0, gpu_seconds=2000.5)
    assert ledger.work_left()["default"].gpu_seconds == 2999.5
    ledger.book("default", "job_1:2", "train", cpu_seconds=0.0, gpu_seconds=4000.0)
    assert ledger.work_left()["default"].gpu_seconds == -1000.5  # what ran went on
    with db.connect() as connection:
        row = connection.execute(
            sa.text("SELECT gpu_ms, cpu_ms, cost FROM usage_entries ORDER BY id")
        ).first()
    assert row == (2_000_500, 10_000, 2_000_500_000)  # 3.6 an hour is a thousandth a second
    assert ledger.balance().balanced
    clock.now += 3 * 86_400  # December
    assert ledger.work_left()["default"].gpu_seconds == 5000.0


def test_each_attempt_of_a_job_is_entered_as_it_ends_for_who_asked(
    db: Engine, ledger: UsageLedger, clock: Clock
) -> None:
    queue = JobQueue(db, clock, ledger=ledger)
    job = queue.submit(JobSpec("train", ("true",), Resources(2.0, 1), ranks=2), "key:key_1")
    for seconds, end in ((100.0, "lost"), (150.0, "done")):
        lease = queue.claim(queue.get(job.id), "local@here")
        assert lease is not None
        clock.now += 7.0  # starting is nobody's
        queue.started(lease)
        clock.now += seconds
        if end == "lost":
            queue.requeue(lease, "lost", 1)
        else:
            queue.finish(lease, State.SUCCEEDED)
    rows = sa.text("SELECT key_id, gpu_ms, cpu_ms, cost FROM usage_entries ORDER BY id")
    with db.connect() as connection:
        assert connection.execute(rows).all() == [
            ("key_1", 200_000, 400_000, NANO // 5),
            ("key_1", 300_000, 600_000, 3 * NANO // 10),
        ]


@pytest.mark.parametrize("of_organization", [False, True])
def test_requests_do_not_spend_what_running_jobs_have_reserved(
    db: Engine, ledger: UsageLedger, clock: Clock, of_organization: bool
) -> None:
    queue = JobQueue(db, clock, ledger=ledger)
    if of_organization:
        Limits(db).set_spend("default", 100, ANA)
    else:
        Tenants(db).set_quota("default", Quota(spend_per_month=100), ANA)
    spec = JobSpec("train", ("true",), Resources(1.0, 1), time_limit=600.0)  # 60 cents
    job = queue.submit(spec, ANA)
    for end in ("lost before it began", "done"):
        lease = queue.claim(queue.get(job.id), "local@here")
        assert lease is not None
        ledger.release(ledger.reserve(LOCAL, "tiny", 400_000))
        refused(ledger, LOCAL, "tiny", 400_001, "cents spent per month is reached: 60 used")
        if end == "done":
            break
        queue.requeue(lease, end, 1)
        ledger.release(ledger.reserve(LOCAL, "tiny", 1_000_000))
    queue.started(lease)
    clock.now += 3 * 86_400  # December, and it runs on
    refused(ledger, LOCAL, "tiny", 400_001, "60 used")
    left = ledger.work_left()["default"]
    # The queue takes what its own jobs may use off by itself.
    assert (left.organization_cost if of_organization else left.cost) == NANO
    queue.finish(lease, State.SUCCEEDED, seconds=100.0)
    ledger.reserve(LOCAL, "tiny", 900_000)
    refused(ledger, LOCAL, "tiny", 1, "100 used")
    assert ledger.balance().balanced


def test_a_project_that_is_archived_does_no_work(db: Engine, ledger: UsageLedger) -> None:
    project = Tenants(db).create_project("old", ANA)
    open_ = ledger.reserve(of(project.id), "tiny", 5)
    Tenants(db).archive("old", ANA)
    with pytest.raises(ConflictError, match="archived"):
        ledger.reserve(of(project.id), "tiny", 5)
    ledger.settle(open_, Usage(1, 1))  # what had begun still counts
    assert ledger.balance(project.id).used == 2


def test_a_key_knows_which_models_its_project_may_use(db: Engine) -> None:
    keys, limits = ApiKeys(db), Limits(db)
    _, text = keys.create("laptop", ANA)
    assert keys.verify(text).models == EVERY_MODEL
    limits.set_policy("default", ModelPolicy("allow_list", frozenset({"poems", "ft:tiny:acme:x:1"})), ANA)
    policy = keys.verify(text).models
    allowed = ["poems", "poems:2", "ft:tiny:acme:x:1", "ft:tiny:acme:x:1:ckpt-step-5"]
    assert all(policy.allows(name) for name in allowed)
    assert not any(
        policy.allows(name) for name in ("tiny", "poems2", "ft:tiny:acme:x:12", "ft:poems:acme:x:1")
    )
    limits.set_policy("default", ModelPolicy("deny_list", frozenset({"poems"})), ANA)
    assert not keys.verify(text).models.allows("poems:2")
    limits.set_policy("default", EVERY_MODEL, ANA)
    assert keys.verify(text).models.allows("poems")


def test_limits_that_make_no_sense_are_refused(db: Engine) -> None:
    with pytest.raises(InputError, match="of a project"):
        Limits(db).set_model("default", "tiny", Quota(spend_per_month=5), ANA)
    with pytest.raises(NotFoundError):
        Limits(db).set_model("proj_none", "tiny", Quota(tokens_per_day=5), ANA)
    with pytest.raises(ConfigError, match="from 0"):
        Quota(tokens_per_day=2**60)
    for wrong in (Quota(requests_per_minute=2**31), Quota(concurrent_requests=2**40)):
        with pytest.raises(ConfigError, match="to 2\\^31"):
            Tenants(db).set_quota("default", wrong, ANA)
        with pytest.raises(ConfigError, match="to 2\\^31"):
            Limits(db).set_model("default", "tiny", wrong, ANA)
    most = Quota(requests_per_minute=2**31 - 1, tokens_per_day=2**53 - 1)
    assert Tenants(db).set_quota("default", most, ANA).quota == most
    assert Limits(db).storage("default") is None
    Tenants(db).set_quota("default", Quota(storage_bytes=10), ANA)
    assert Limits(db).storage("default") == 10


def test_a_models_limit_holds_to_the_token_from_two_ledgers_at_once(db: Engine) -> None:
    Limits(db).set_model("default", "tiny", Quota(tokens_per_day=1000), ANA)
    used, refusals = [0] * 8, [0] * 8

    def client(number: int) -> None:
        ledger = UsageLedger(db, lambda: NOON)
        for _ in range(8):
            try:
                made = ledger.reserve(LOCAL, "tiny", 70, generated=40)
            except LimitError:
                refusals[number] += 1
                continue
            ledger.settle(made, Usage(20, number))
            used[number] += 20 + number

    threads = [threading.Thread(target=client, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ledger = UsageLedger(db, lambda: NOON)
    assert ledger.consumption("default", "tiny").tokens_day == sum(used) == ledger.balance().used
    assert sum(used) <= 1000
    assert sum(refusals) > 0
