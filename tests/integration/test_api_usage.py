"""Usage, costs and the audit log through the official client: what was used is told, to its own organization."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import httpx
import openai
import pytest

from lapis.db import open_database
from lapis.home import Home
from lapis.server import RunningServer
from lapis.tenants.admin_keys import AdminKeys
from lapis.tenants.keys import LOCAL, ApiKeys
from lapis.tenants.prices import Prices
from lapis.tenants.service_accounts import ServiceAccounts
from lapis.tenants.tenant import Role, Tenants
from lapis.tenants.usage import Usage, UsageLedger
from lapis.tenants.users import Users
from tests.served import fake_server

ACTOR = "test"
DAY = 86_400
TODAY = int(time.time()) // DAY * DAY
PRICES = "[models.tiny]\nprompt = 1.0\ncached = 0.5\ncompletion = 2.0\n[compute]\ngpu_hour = 3.0\n"


@dataclass
class Place:
    server: RunningServer
    owner: openai.OpenAI
    reader: openai.OpenAI
    foreign: openai.OpenAI
    key_id: str
    account_id: str
    project_id: str


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """Forty days with a request of 100 + 10 tokens each, batches and jobs among them, in two projects."""
    home = Home(tmp_path_factory.mktemp("usage"))
    home.root.mkdir(exist_ok=True)
    home.prices.write_text(PRICES)
    db = open_database(home.database_url)
    tenants = Tenants(db)
    acme = tenants.create_organization("acme", ACTOR).id
    project = tenants.create_project("search", ACTOR)
    account, key = ServiceAccounts(db).create("ci", project.id, ACTOR)
    assert key is not None
    identity = ApiKeys(db).verify(key[1])
    for age in range(40):
        now = TODAY - age * DAY + 3600.0 * (age % 24) + 30
        ledger = UsageLedger(db, lambda now=now: now, Prices(home.prices))
        who = identity if age % 2 else LOCAL
        batch = age % 4 == 1
        made = ledger.reserve(replace(who, background=batch), "tiny", 200, generated=100)
        ledger.settle(made, Usage(100, 10, cached_tokens=20))
        ledger.release(ledger.reserve(who, "tiny", 50))
    ledger = UsageLedger(db, lambda: TODAY + 7.0, Prices(home.prices))
    ledger.settle(ledger.reserve(LOCAL, "embedder", 7, operation="embeddings"), Usage(7, 0))
    ledger.book("default", "job_1:1", "train", cpu_seconds=5, gpu_seconds=1200)
    texts = [
        AdminKeys(db).create("owner", ACTOR)[1],
        AdminKeys(db).create("reader", ACTOR, role=Role.READER)[1],
        AdminKeys(db).create("foreign", ACTOR, organization_id=acme)[1],
    ]
    db.dispose()
    with fake_server(home, load=False) as server:
        clients = [
            openai.OpenAI(
                base_url=server.url,
                api_key=key[1],
                admin_api_key=text,
                max_retries=0,
                _strict_response_validation=True,
            )
            for text in texts
        ]
        yield Place(server, *clients, key[0].id, account.id, project.id)
        for client in clients:
            client.close()


def test_days_are_walked_in_pages_with_empty_ones_and_add_up_to_the_ledger(place: Place) -> None:
    usage = place.owner.admin.organization.usage
    start, buckets, page = TODAY - 41 * DAY, [], openai.omit
    for _ in range(100):
        answer = usage.completions(start_time=start, end_time=TODAY + DAY, limit=9, page=page)
        buckets += answer.data
        assert answer.has_more == (answer.next_page is not None)
        if not answer.has_more:
            break
        assert answer.next_page is not None and len(answer.data) == 9
        page = answer.next_page
    assert [bucket.start_time for bucket in buckets] == [start + day * DAY for day in range(42)]
    assert all(bucket.end_time == bucket.start_time + DAY for bucket in buckets)
    assert buckets[0].results == buckets[1].results == []
    results = [result for bucket in buckets for result in bucket.results]
    assert len(results) == 40
    first = results[0]
    assert first.object == "organization.usage.completions.result"
    assert (first.input_tokens, first.output_tokens, first.num_model_requests) == (100, 10, 1)
    assert (first.input_cached_tokens, first.project_id, first.model) == (20, None, None)


def test_groups_filters_and_widths(place: Place) -> None:
    usage = place.owner.admin.organization.usage
    whole = {"start_time": TODAY - 40 * DAY, "end_time": TODAY - 30 * DAY}

    def sums(**more: object) -> dict[tuple[object, ...], int]:
        found: dict[tuple[object, ...], int] = {}
        for bucket in usage.completions(**whole, limit=31, **more).data:  # type: ignore[arg-type]
            for one in bucket.results:
                assert one.object == "organization.usage.completions.result"
                key = (one.project_id, one.user_id, one.api_key_id, one.model, one.batch)
                found[key] = found.get(key, 0) + one.input_tokens + one.output_tokens
        return found

    assert sums() == {(None,) * 5: 990}
    mine = (place.project_id, place.account_id, place.key_id, "tiny")
    everything = ["project_id", "user_id", "api_key_id", "model", "batch"]
    assert sums(group_by=everything) == {
        ("default", None, None, "tiny", False): 440,
        (*mine, True): 220,
        (*mine, False): 330,
    }
    assert sums(group_by=["batch"], batch=True) == {(None, None, None, None, True): 220}
    assert sums(project_ids=[place.project_id]) == {(None,) * 5: 550}
    assert sums(api_key_ids=[place.key_id], batch=False) == {(None,) * 5: 330}
    assert sums(user_ids=[place.account_id], models=["tiny", "other"]) == {(None,) * 5: 550}
    assert sums(models=["other"]) == {}
    begun = TODAY - 3 * DAY  # that day's request came at 03:00:30
    hours = usage.completions(start_time=begun, bucket_width="1h", end_time=begun + DAY).data
    assert [number for number, hour in enumerate(hours) if hour.results] == [3]
    minutes = usage.completions(start_time=begun + 3 * 3600 - 60, bucket_width="1m", limit=3).data
    assert [bool(minute.results) for minute in minutes] == [False, True, False]
    part = usage.completions(start_time=begun + 3 * 3600 + 31, end_time=begun + DAY).data
    assert [(bucket.start_time, bucket.end_time, bucket.results) for bucket in part] == [
        (begun + 3 * 3600 + 31, begun + DAY, [])
    ]


def test_other_kinds_of_work_have_their_own_pages(place: Place) -> None:
    usage = place.owner.admin.organization.usage
    read = usage.embeddings(start_time=TODAY, end_time=TODAY + DAY, group_by=["model"]).data[0].results[0]
    assert read.object == "organization.usage.embeddings.result"
    assert (read.input_tokens, read.num_model_requests, read.model) == (7, 1, "embedder")
    assert usage.moderations(start_time=TODAY, end_time=TODAY + DAY).data[0].results == []
    assert len(usage.images(start_time=TODAY - 2 * DAY, end_time=TODAY).data) == 2
    for wrong in (
        {"bucket_width": "1d", "limit": 32},
        {"group_by": ["colour"]},
        {"page": "page_1"},
        {"page": "next"},
        {"end_time": TODAY - 9 * DAY},
    ):
        with pytest.raises(openai.BadRequestError):
            usage.completions(start_time=TODAY - DAY, **wrong)  # type: ignore[arg-type]


def test_costs_are_those_of_the_day_whatever_the_list_says_now(place: Place) -> None:
    usage = place.owner.admin.organization.usage
    asked = {"start_time": TODAY - 2 * DAY, "end_time": TODAY + DAY}
    days = usage.costs(**asked).data  # type: ignore[arg-type]
    each = (80 * 1.0 + 20 * 0.5 + 10 * 2.0) / 1e6
    found = [bucket.results[0].amount for bucket in days]  # type: ignore[union-attr]
    assert found[0] is not None and found[2] is not None
    assert (found[0].value, found[0].currency) == (pytest.approx(each), "usd")
    assert found[2].value == pytest.approx(each + 1.0)  # and a third of an hour of a GPU
    place.server.services.home.prices.write_text(PRICES.replace("1.0", "1000.0"))
    assert usage.costs(**asked).data == days  # type: ignore[arg-type]
    items = usage.costs(**asked, group_by=["line_item", "project_id"]).data[2].results  # type: ignore[arg-type]
    assert [(one.line_item, one.quantity, one.quantity_unit) for one in items] == [  # type: ignore[union-attr]
        ("compute", None, None),
        ("embedder, tokens", 7.0, "tokens"),
        ("tiny, tokens", 110.0, "tokens"),
    ]
    only = usage.costs(**asked, line_items=["compute"]).data  # type: ignore[arg-type]
    assert [len(bucket.results) for bucket in only] == [0, 0, 1]
    place.server.services.home.prices.write_text(PRICES)


def test_what_is_answered_now_is_there_at_once(place: Place) -> None:
    before = int(time.time())
    chat = place.owner.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "Hi"}], max_tokens=5
    )
    place.server.services.meter.flush()
    asked = place.owner.admin.organization.usage.completions(
        start_time=before - 60, bucket_width="1m", group_by=["api_key_id"], api_key_ids=[place.key_id]
    )
    [result] = [one for bucket in asked.data for one in bucket.results]
    assert chat.usage is not None and result.object == "organization.usage.completions.result"
    assert result.input_tokens + result.output_tokens == chat.usage.total_tokens
    assert result.api_key_id == place.key_id


def test_another_organization_sees_no_usage_no_cost_and_no_act(place: Place) -> None:
    foreign = place.foreign.admin.organization
    asked = {"start_time": TODAY - 20 * DAY, "end_time": TODAY + DAY, "project_ids": [place.project_id]}
    for read in (foreign.usage.completions, foreign.usage.embeddings, foreign.usage.costs):
        assert all(bucket.results == [] for bucket in read(**asked).data)  # type: ignore[operator]
    events = list(foreign.audit_logs.list())
    assert {event.type for event in events} == {"organization.updated", "api_key.created"}
    assert list(foreign.audit_logs.list(project_ids=[place.project_id])) == []


def test_the_audit_log_is_walked_both_ways_and_filtered(place: Place) -> None:
    organization = place.owner.admin.organization
    user = Users(place.server.services.db).add("ana@example.org", Role.OWNER, ACTOR)
    _, text = AdminKeys(place.server.services.db).create("hers", ACTOR, user_id=user.id)
    hers = place.owner.with_options(admin_api_key=text).admin.organization
    made = hers.projects.create(name="audited")
    account = hers.projects.service_accounts.create(made.id, name="ci")
    hers.projects.update(made.id, name="seen")
    hers.projects.users.create(made.id, user_id=user.id, role="member")
    hers.projects.service_accounts.delete(account.id, project_id=made.id)
    hers.projects.archive(made.id)

    events = list(organization.audit_logs.list(project_ids=[made.id], limit=2))
    assert [event.type for event in events] == [
        "project.archived", "service_account.deleted", "api_key.deleted", "role.assignment.created",
        "project.updated", "api_key.created", "service_account.created", "project.created",
    ]  # fmt: skip
    assert len({event.id for event in events}) == len(events)
    last = events[-1]
    assert last.project is not None and last.project.name == "seen"
    assert last.actor is not None and last.actor.api_key is not None and last.actor.api_key.user is not None
    assert (last.actor.type, last.actor.api_key.user.email) == ("api_key", "ana@example.org")
    assert last.project_created is not None and last.project_created.id == made.id
    born = events[5].api_key_created
    assert born is not None and born.data is not None and born.data.scopes
    log = organization.audit_logs
    newer = log.list(project_ids=[made.id], before=events[4].id, limit=2)
    assert [event.id for event in newer.data] == [event.id for event in events[2:4]]
    assert newer.has_more
    kinds = log.list(project_ids=[made.id], event_types=["api_key.created", "api_key.deleted"])
    assert [event.type for event in kinds.data] == ["api_key.deleted", "api_key.created"]
    assert (
        len(log.list(actor_ids=[user.id]).data) == len(log.list(actor_emails=["Ana@example.org"]).data) == 8
    )
    assert [event.type for event in log.list(resource_ids=[account.id]).data] == [
        "service_account.deleted", "service_account.created",
    ]  # fmt: skip
    at = events[0].effective_at
    assert {event.id for event in log.list(effective_at={"gte": at, "lte": at}, limit=100).data} >= {
        events[0].id
    }
    assert log.list(effective_at={"gt": at + 5}).data == []
    assert log.list(effective_at={"lt": TODAY - 50 * DAY}).data == []
    with pytest.raises(openai.BadRequestError, match="go on after"):
        log.list(after="event-1")


def test_every_load_of_a_model_is_an_act_that_can_be_exported(place: Place) -> None:
    place.owner.completions.create(model="tiny", prompt="x", max_tokens=1)
    everything = httpx.get(
        f"{place.server.url}/organization/audit_logs",
        params={"everything": "true", "event_types[]": "model.load"},
        headers={"authorization": f"Bearer {place.reader.admin_api_key}"},
    ).json()
    [load] = everything["data"]
    assert load["model.load"]["id"] == "tiny" and len(load["model.load"]["data"]["digest"]) == 64
    assert load["actor"]["session"]["user"]["id"] == "server"
