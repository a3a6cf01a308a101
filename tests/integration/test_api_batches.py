"""Batches through the official client: every line once, whatever is killed, behind whoever is waiting."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import httpx
import openai
import pytest
from openai.types import Batch

from lapis.db import open_database
from lapis.gateway import batch_runner
from lapis.gateway import batches as store
from lapis.home import Home
from lapis.server import RunningServer
from lapis.tenants.keys import ApiKeys
from lapis.tenants.quota import Quota
from lapis.tenants.tenant import Tenants
from tests.integration.test_api_limits import engine_is_free, until
from tests.served import fake_server, model_folder

CHAT = "/v1/chat/completions"
ENDED = ("completed", "failed", "expired", "cancelled")


@pytest.fixture
def server(home: Home) -> Iterator[RunningServer]:
    with fake_server(home) as running:
        yield running


def connect(url: str, key: str = "unused") -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key=key, max_retries=0, _strict_response_validation=True)


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with connect(server.url) as made:
        yield made


def chat(id: str, **more: object) -> dict[str, Any]:
    body = {"model": "tiny", "messages": [{"role": "user", "content": id}], "max_tokens": 4, **more}
    return {"custom_id": id, "method": "POST", "url": CHAT, "body": body}


def begin(client: openai.OpenAI, lines: Sequence[object], endpoint: str = CHAT, **more: Any) -> Batch:
    content = "\n".join(json.dumps(line) for line in lines).encode()
    file = client.files.create(file=("in.jsonl", content), purpose="batch")
    return client.batches.create(
        input_file_id=file.id,
        endpoint=endpoint,  # type: ignore[arg-type]
        completion_window="24h",
        **more,
    )


def finished(client: openai.OpenAI, batch: Batch, seconds: float = 60.0) -> Batch:
    until(lambda: client.batches.retrieve(batch.id).status in ENDED, seconds)
    return client.batches.retrieve(batch.id)


def completed(client: openai.OpenAI, batch: Batch) -> int:
    counts = client.batches.retrieve(batch.id).request_counts
    assert counts is not None
    return counts.completed


def content(client: openai.OpenAI, file_id: str | None) -> list[dict[str, Any]]:
    assert file_id is not None
    return [json.loads(line) for line in client.files.content(file_id).text.splitlines()]


def test_a_batch_answers_every_line_in_order(client: openai.OpenAI) -> None:
    batch = begin(client, [chat(f"r{n}", seed=n) for n in range(40)], metadata={"of": "mine"})
    assert (batch.status, batch.metadata) == ("validating", {"of": "mine"})
    assert batch.expires_at == batch.created_at + 86_400
    done = finished(client, batch)
    assert done.status == "completed"
    assert done.request_counts is not None
    assert vars(done.request_counts) == {"total": 40, "completed": 40, "failed": 0}
    assert (done.model, done.error_file_id) == ("tiny", None)
    lines = content(client, done.output_file_id)
    assert [line["custom_id"] for line in lines] == [f"r{n}" for n in range(40)]
    assert {line["response"]["status_code"] for line in lines} == {200}
    assert len({line["id"] for line in lines} | {line["response"]["request_id"] for line in lines}) == 80
    live = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "r7"}], max_tokens=4, seed=7
    )
    assert lines[7]["response"]["body"]["choices"][0]["message"]["content"] == live.choices[0].message.content
    assert done.usage is not None
    assert done.usage.total_tokens == sum(line["response"]["body"]["usage"]["total_tokens"] for line in lines)
    file = client.files.retrieve(done.output_file_id or "")
    assert (file.purpose, file.filename) == ("batch_output", f"{batch.id}_output.jsonl")
    stamps = (done.created_at, done.in_progress_at, done.finalizing_at, done.completed_at)
    assert list(stamps) == sorted(stamps)  # type: ignore[type-var]
    assert [one.id for one in client.batches.list()] == [batch.id]


@pytest.mark.parametrize(
    ("endpoint", "body"),
    [
        ("/v1/completions", {"prompt": "x", "max_tokens": 2}),
        ("/v1/embeddings", {"input": "x"}),
        ("/v1/responses", {"input": "x", "max_output_tokens": 2}),
    ],
)
def test_other_endpoints_too(client: openai.OpenAI, endpoint: str, body: dict[str, Any]) -> None:
    line = {"custom_id": "a", "method": "POST", "url": endpoint, "body": {"model": "tiny", **body}}
    done = finished(client, begin(client, [line], endpoint))
    answer = content(client, done.output_file_id)[0]["response"]
    assert answer["status_code"] == 200
    assert done.usage is not None
    assert done.usage.total_tokens == answer["body"]["usage"]["total_tokens"] > 0


def test_a_line_that_fails_stands_in_the_error_file(client: openai.OpenAI) -> None:
    lines = [chat("good"), chat("bad", temperature=99), chat("unknown", model="nobody")]
    done = finished(client, begin(client, lines))
    assert done.status == "completed"
    assert done.request_counts is not None
    assert (done.request_counts.completed, done.request_counts.failed) == (1, 2)
    wrong = content(client, done.error_file_id)
    assert [line["custom_id"] for line in wrong] == ["bad", "unknown"]
    assert [line["response"]["status_code"] for line in wrong] == [400, 404]
    assert wrong[0]["response"]["body"]["error"]["param"] == "temperature"
    assert [line["custom_id"] for line in content(client, done.output_file_id)] == ["good"]


def test_wrong_input_fails_before_anything_runs(client: openai.OpenAI, server: RunningServer) -> None:
    done = finished(client, begin(client, [chat("a"), chat("a"), {"custom_id": "b"}]))
    assert done.status == "failed"
    assert done.errors is not None
    assert [(error.line, error.code) for error in done.errors.data or []] == [
        (2, "duplicate_custom_id"),
        (3, "missing_required_parameter"),
    ]
    assert (done.output_file_id, done.error_file_id) == (None, None)
    assert server.services.meter._ledger.balance().used == 0


def test_what_cannot_be_a_batch_is_refused(client: openai.OpenAI) -> None:
    other = client.files.create(file=("a.txt", b"x"), purpose="user_data")
    with pytest.raises(openai.BadRequestError, match="purpose"):
        client.batches.create(input_file_id=other.id, endpoint=CHAT, completion_window="24h")
    with pytest.raises(openai.NotFoundError):
        client.batches.create(input_file_id="file-x", endpoint=CHAT, completion_window="24h")
    with pytest.raises(openai.BadRequestError, match="endpoint"):
        client.batches.create(input_file_id=other.id, endpoint="/v1/images/edits", completion_window="24h")
    with pytest.raises(openai.NotFoundError):
        client.batches.retrieve("batch_unknown")


def test_a_cancelled_batch_stops_and_gives_what_was_finished(home: Home) -> None:
    endless = "word " * 3000
    with fake_server(home, reply=lambda prompt, seed: endless, seconds_per_token=0.01, running=64) as server:
        client = connect(server.url)
        short = [chat(f"s{n}", max_tokens=1) for n in range(8)]
        batch = begin(client, [*short, *[chat(f"l{n}", max_tokens=1900) for n in range(30)]])
        until(lambda: completed(client, batch) >= 8, 60)
        asked = client.batches.cancel(batch.id)
        assert asked.status == "cancelling"
        assert client.batches.cancel(batch.id).cancelling_at == asked.cancelling_at
        done = finished(client, batch)
        assert done.status == "cancelled"
        lines = content(client, done.output_file_id)
        assert [line["custom_id"] for line in lines][:8] == [f"s{n}" for n in range(8)]
        assert done.request_counts is not None
        assert done.request_counts.completed == len(lines) < 38
        until(lambda: engine_is_free(server))
        with pytest.raises(openai.ConflictError, match="is cancelled"):
            client.batches.cancel(batch.id)
        client.close()


def test_live_requests_pass_a_batch_that_fills_the_engine(home: Home) -> None:
    endless = "word " * 3000
    with fake_server(home, reply=lambda prompt, seed: endless, seconds_per_token=0.01, running=4) as server:
        client = connect(server.url)
        batch = begin(client, [chat(f"l{n}", max_tokens=1500) for n in range(40)])
        engine = server.services.router.find("tiny").load()
        until(lambda: bool(engine.stats()["running"] == 4 and engine.stats()["waiting"]), 60)
        for _ in range(5):
            client.chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": "x"}], max_tokens=3
            )
        counts = client.batches.retrieve(batch.id).request_counts
        assert counts is not None
        assert counts.completed + counts.failed == 0  # none of its 15 s long lines had to end first
        assert engine.stats()["waiting"] <= 16  # nor fills it the queue
        client.batches.cancel(batch.id)
        finished(client, batch)
        client.close()


def test_the_minutes_limits_are_for_live_requests_and_the_days_are_waited_for(home: Home) -> None:
    with fake_server(home) as server, connect(server.url) as client:
        tenants = Tenants(server.services.db)
        tenants.set_quota("default", Quota(requests_per_minute=1, requests_per_day=9), "test")
        assert finished(client, begin(client, [chat(f"r{n}") for n in range(6)])).status == "completed"
        batch = begin(client, [chat(f"r{n}") for n in range(6)])
        until(lambda: completed(client, batch) == 3, 60)
        counts = client.batches.retrieve(batch.id).request_counts
        assert counts is not None
        assert counts.failed == 0
        client.batches.cancel(batch.id)
        assert finished(client, batch).error_file_id is None


def test_batches_that_wait_for_a_limit_stop_no_other_project_and_can_be_cancelled(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_runner, "BATCHES", 2)
    with fake_server(home) as server:
        services = server.services
        tenants = Tenants(services.db)
        keys = [ApiKeys(services.db).create("k", "test", project=tenants.create_project(name, "test").id)[1]
                for name in ("spent", "other")]  # fmt: skip
        tenants.set_quota("spent", Quota(requests_per_day=1), "test")
        with connect(server.url, keys[0]) as spent, connect(server.url, keys[1]) as other:
            waiting = [begin(spent, [chat("a"), chat("b")]) for _ in range(3)]
            until(lambda: sum(completed(spent, batch) for batch in waiting) == 1)
            assert finished(other, begin(other, [chat("a")])).status == "completed"
            assert {spent.batches.retrieve(batch.id).status for batch in waiting} <= {
                "validating",
                "in_progress",
            }
            spent.batches.cancel(waiting[0].id)
            assert finished(spent, waiting[0]).status == "cancelled"


def test_what_is_not_run_within_a_day_is_named(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    endless = "word " * 3000
    with fake_server(home, reply=lambda prompt, seed: endless, seconds_per_token=0.01, running=64) as server:
        client = connect(server.url)
        batch = begin(
            client, [chat("short", max_tokens=1), *[chat(f"l{n}", max_tokens=1900) for n in range(9)]]
        )
        until(lambda: completed(client, batch) == 1, 60)
        files = server.services.files
        later = batch.created_at + store.WINDOW_SECONDS + 1
        monkeypatch.setattr(files, "clock", lambda: later)
        done = finished(client, batch)
        assert done.status == "expired"
        unfinished = content(client, done.error_file_id)
        assert [line["error"]["code"] for line in unfinished] == ["batch_expired"] * 9
        assert {line["response"] for line in unfinished} == {None}
        assert [line["custom_id"] for line in content(client, done.output_file_id)] == ["short"]
        assert done.request_counts is not None
        assert vars(done.request_counts) == {"total": 10, "completed": 1, "failed": 9}
        client.close()


def test_an_input_that_is_deleted_before_it_is_read_fails_the_batch(
    client: openai.OpenAI, server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.services.batches, "claim", lambda running, projects: None)
    batch = begin(client, [chat("a")])
    client.files.delete(batch.input_file_id)
    monkeypatch.undo()
    done = finished(client, batch)
    assert done.status == "failed"
    assert done.errors is not None
    assert [error.code for error in done.errors.data or []] == ["input_file_gone"]


def test_a_batch_is_its_projects_and_runs_in_its_name(home: Home) -> None:
    db = open_database(home.database_url)
    second = Tenants(db).create_project("second", "test")
    keys = [ApiKeys(db).create("k", "test", project=name)[1] for name in ("default", second.id)]
    weak = ApiKeys(db).create("k", "test", scopes=["work.read", "work.write"])[1]
    db.dispose()
    with fake_server(home) as server:
        mine, other, weaker = (connect(server.url, key) for key in (*keys, weak))
        batch = begin(other, [chat("a")])
        assert finished(other, batch).status == "completed"
        server.services.meter.flush()
        ledger = server.services.meter._ledger
        assert (ledger.balance("default").used, ledger.balance(second.id).used > 0) == (0, True)
        assert list(mine.batches.list()) == []
        for act in (mine.batches.retrieve, mine.batches.cancel):
            with pytest.raises(openai.NotFoundError):
                act(batch.id)
        with pytest.raises(openai.NotFoundError):
            mine.batches.create(input_file_id=batch.input_file_id, endpoint=CHAT, completion_window="24h")
        with pytest.raises(openai.PermissionDeniedError, match=r"models\.use"):
            begin(weaker, [chat("a")])
        for each in (mine, other, weaker):
            each.close()


def test_a_batch_ends_with_the_key_that_began_it(home: Home) -> None:
    endless = "word " * 3000
    db = open_database(home.database_url)
    keys = ApiKeys(db)
    made, text = keys.create("leaves", "test")
    stays = keys.create("stays", "test")[1]
    with (
        fake_server(home, reply=lambda prompt, seed: endless, seconds_per_token=0.01, running=64) as server,
        connect(server.url, text) as client,
        connect(server.url, stays) as colleague,
    ):
        lines = [chat("short", max_tokens=1), *[chat(f"l{n}", max_tokens=1900) for n in range(9)]]
        batch = begin(client, lines)
        until(lambda: completed(client, batch) == 1, 60)
        keys.revoke(made.prefix, "test")
        done = finished(colleague, batch)
        assert done.status == "failed"
        assert done.errors is not None
        assert [error.code for error in done.errors.data or []] == ["invalid_api_key"]
        assert [line["custom_id"] for line in content(colleague, done.output_file_id)] == ["short"]
        unfinished = content(colleague, done.error_file_id)
        assert [line["error"]["code"] for line in unfinished] == ["invalid_api_key"] * 9
        until(lambda: engine_is_free(server))
    db.dispose()


SERVER = """
import sys
from pathlib import Path
from lapis.gateway import batches
from lapis.home import Home
from lapis.inference.fake import FakeEngine
from lapis.server import serve
batches.LEASE_SECONDS = 1.0
load = lambda _, name: FakeEngine(name, seconds_per_token=0.001, running=4)
serve(Home(Path(sys.argv[1])), ["tiny"], port=0, console=False, load=load,
      ready=lambda running: print(running.url, flush=True))
"""


def test_killed_servers_lose_no_line_and_run_none_twice(home: Home) -> None:
    model_folder(home.models / "tiny")
    lines = 300
    counts: list[int] = []
    batch: Batch | None = None
    recorded: dict[str, str] = {}
    for life in range(3):
        command = [sys.executable, "-c", SERVER, str(home.root)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        with connect(process.stdout.readline().strip()) as client:
            if batch is None:
                batch = begin(client, [chat(f"r{n}") for n in range(lines)])
            before = counts[-1] if counts else 0

            def went_on(client: openai.OpenAI = client, id: str = batch.id, before: int = before) -> bool:
                now = client.batches.retrieve(id)
                return now.status in ENDED or bool(
                    now.request_counts and now.request_counts.completed > before + 20
                )

            until(went_on, 60)
            if life == 2:
                done = finished(client, batch)
                output = content(client, done.output_file_id)
            else:
                now = client.batches.retrieve(batch.id).request_counts
                assert now is not None
                counts.append(now.completed)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        db = open_database(home.database_url)
        with db.connect() as connection:
            for row in connection.execute(store.batch_lines.select()):
                id = json.loads(row.result)["id"]
                assert recorded.setdefault(str(row.line), id) == id  # what was recorded stays as it was
        db.dispose()
    assert done.status == "completed"
    assert [line["custom_id"] for line in output] == [f"r{n}" for n in range(lines)]
    assert done.request_counts is not None
    assert done.request_counts.completed == lines
    written = {str(number + 1): line["id"] for number, line in enumerate(output)}
    assert recorded.items() <= written.items()  # and stands in the output, not another run of it
    assert counts == sorted(set(counts))


def test_a_server_that_lost_its_lease_changes_nothing(server: RunningServer, client: openai.OpenAI) -> None:
    batches = server.services.batches
    held = batches.claim
    batches.claim = lambda running, projects: None  # type: ignore[method-assign]
    time.sleep(0.6)  # one that was asked before is back
    made = begin(client, [chat("a"), chat("b")])
    from collections import Counter

    first = held([], Counter())
    assert first is not None
    now = server.services.files.clock
    server.services.files.clock = lambda: now() + store.LEASE_SECONDS + 1
    second = held([], Counter())
    assert second is not None
    for act in (
        lambda: batches.renew(*first),
        lambda: batches.record(*first, [store.LineResult(1, True, "{}")]),
        lambda: batches.finish(*first, "completed"),
    ):
        with pytest.raises(store.ConflictError, match="Another server"):
            act()
    assert batches.recorded(second[0]) == set()
    batches.release(*first)
    assert held([], Counter()) is None
    assert client.batches.retrieve(made.id).status == "validating"
    assert httpx.get(f"{server.url}/batches/{made.id}").json()["request_counts"]["completed"] == 0
