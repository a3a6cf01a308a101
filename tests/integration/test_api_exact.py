"""Limits and the ledger are exact to the token: 32 clients at once, streams broken in the middle, two servers."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field

import httpx
import pytest
import sqlalchemy as sa

from lapis.db import open_database
from lapis.home import Home
from lapis.server import RunningServer
from lapis.tenants.keys import ApiKeys
from lapis.tenants.limits import Limits
from lapis.tenants.quota import Quota
from lapis.tenants.tenant import Tenants
from lapis.tenants.usage import UsageLedger
from tests.integration.test_api_limits import until
from tests.served import fake_server

CLIENTS = 32
ROUNDS = 3
REPLY = "word " * 40


@dataclass
class Told:
    """What the clients were told that they used, and how often they were refused."""

    tokens: int = 0
    requests: int = 0
    refused: int = 0
    broken: int = 0
    failures: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


@pytest.fixture
def servers(home: Home) -> Iterator[list[RunningServer]]:
    """Two servers on one database."""
    with ExitStack() as stack:
        yield [
            stack.enter_context(
                fake_server(
                    home, load=False, reply=lambda prompt, seed: REPLY, seconds_per_token=0.001, running=64
                )
            )
            for _ in range(2)
        ]


def work(server: RunningServer, key: str, number: int, told: Told) -> None:
    """Some whole answers, some streams read to their end, some streams that are left in the middle."""
    head = {"authorization": f"Bearer {key}"}
    with httpx.Client(base_url=server.url, headers=head, timeout=60) as client:
        for round_ in range(ROUNDS):
            body = {"model": "tiny", "prompt": f"client {number} round {round_}", "max_tokens": 20}
            kind = (number + round_) % 3
            if kind == 0:
                answer = client.post("/completions", json=body)
                count(told, answer.status_code, answer.json())
                continue
            body |= {"stream": True, "stream_options": {"include_usage": True}}
            with client.stream("POST", "/completions", json=body) as stream:
                if stream.status_code != 200:
                    count(told, stream.status_code, json.loads(stream.read()))
                    continue
                lines = (line for line in stream.iter_lines() if line.startswith("data: "))
                if kind == 1:
                    events = [json.loads(line[6:]) for line in lines if line != "data: [DONE]"]
                    count(told, 200, events[-1])
                else:
                    next(lines)
                    with told.lock:
                        told.broken += 1


def count(told: Told, status: int, body: dict[str, object]) -> None:
    with told.lock:
        if status == 429:
            told.refused += 1
        elif status == 200:
            told.requests += 1
            told.tokens += body["usage"]["total_tokens"]  # type: ignore[index]
        else:
            told.failures.append(f"{status}: {body}")


def run(servers: list[RunningServer], keys: list[str]) -> Told:
    told = Told()
    threads = [
        threading.Thread(
            target=work, args=(servers[number % len(servers)], keys[number % len(keys)], number, told)
        )
        for number in range(CLIENTS)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert told.failures == []
    for server in servers:
        until(lambda server=server: server.services.router.find("tiny").active == 0)  # type: ignore[misc]
        server.services.meter.flush()
    return told


def test_the_ledger_is_the_sum_of_what_was_answered(home: Home, servers: list[RunningServer]) -> None:
    db = servers[0].services.db
    projects = [Tenants(db).create_project(name, "test").id for name in ("one", "two")]
    keys = [ApiKeys(db).create(f"k{project}", "test", project=project)[1] for project in projects]
    told = run(servers, keys)
    assert told.refused == 0 and told.broken > 0
    ledger = UsageLedger(db)
    balance = ledger.balance()
    assert balance.open == 0 and balance.balanced
    # Of a broken stream counts what was given out before it broke; the others are known to the token.
    whole = sa.text(
        "SELECT count(*), sum(tokens) FROM usage_entries WHERE kind = 'use' AND completion_tokens = 20"
    )
    parts = sa.text("SELECT count(*) FROM usage_entries WHERE kind = 'use' AND completion_tokens < 20")
    given_back = sa.text("SELECT count(*) FROM usage_entries WHERE kind = 'reverse' AND reason = 'released'")
    with db.connect() as connection:
        requests, tokens = connection.execute(whole).one()
        left = connection.execute(parts).scalar_one() + connection.execute(given_back).scalar_one()
    assert told.requests + told.broken == CLIENTS * ROUNDS == requests + left
    ran_on = requests - told.requests  # left in the middle, after the last token had been given out
    assert 0 <= ran_on <= told.broken
    assert ran_on or tokens == told.tokens
    assert tokens >= told.tokens
    for project in projects:
        windows = ledger.consumption(project)
        assert (
            windows.tokens_day
            == ledger.balance(project).used
            == ledger.consumption(project, "tiny").tokens_day
        )
    assert sum(ledger.balance(project).used for project in projects) == balance.used


def test_a_limit_is_never_passed_by_a_token_whoever_asks_where(
    home: Home, servers: list[RunningServer]
) -> None:
    db = servers[0].services.db
    key = ApiKeys(db).create("k", "test")[1]
    Tenants(db).set_quota("default", Quota(tokens_per_day=2000), "test")
    Limits(db).set_model("default", "tiny", Quota(tokens_per_day=1500, requests_per_day=70), "test")
    told = run(servers, [key])
    ledger = UsageLedger(db)
    balance = ledger.balance()
    assert balance.open == 0 and balance.balanced
    assert told.tokens <= balance.used <= 1500
    assert told.refused > 0
    entries = sa.text("SELECT count(*) FROM usage_entries WHERE kind = 'reserve'")
    with db.connect() as connection:
        assert connection.execute(entries).scalar_one() == told.requests + told.broken <= 70
    # At no moment was more reserved or used than the limit: replayed in the order in which it was written.
    with db.connect() as connection:
        rows = connection.execute(sa.text("SELECT kind, tokens FROM usage_entries ORDER BY id")).all()
    total, most = 0, 0
    for kind, tokens in rows:
        total += tokens
        most = max(most, total if kind == "reserve" else 0)
    assert total == balance.used
    assert most <= 1500


def test_requests_at_once_are_limited_across_servers(home: Home, servers: list[RunningServer]) -> None:
    db = servers[0].services.db
    key = ApiKeys(db).create("k", "test")[1]
    Tenants(db).set_quota("default", Quota(concurrent_requests=5), "test")
    told = run(servers, [key])
    assert told.refused > 0 and told.requests > 0
    with db.connect() as connection:
        rows = connection.execute(sa.text("SELECT kind FROM usage_entries ORDER BY id")).scalars()
        running, most = 0, 0
        for kind in rows:
            running += {"reserve": 1, "reverse": -1}.get(kind, 0)
            most = max(most, running)
    assert most <= 5
    assert running == 0


def test_what_a_killed_server_had_reserved_is_given_back(home: Home) -> None:
    db = open_database(home.database_url)
    now = [1_000_000_000.0]
    Tenants(db).set_quota("default", Quota(concurrent_requests=1, tokens_per_day=100), "test")
    from lapis.tenants.keys import LOCAL

    dead = UsageLedger(db, lambda: now[0])
    dead.reserve(LOCAL, "tiny", 100)  # and its process is gone
    now[0] += 601
    assert UsageLedger(db, lambda: now[0]).reserve(LOCAL, "tiny", 100).limits[0].remaining == 0
    assert UsageLedger(db).balance().balanced
    db.dispose()
