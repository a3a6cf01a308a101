"""Idempotency keys: one request, one thing, however often and from wherever it is sent."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import httpx
import openai
import pytest

from lapis.api import idempotency as middleware
from lapis.gateway.idempotency import KEPT_SECONDS, LEASE_SECONDS, Claim
from lapis.home import Home
from lapis.server import RunningServer
from lapis.tenants.keys import ApiKeys
from lapis.tenants.tenant import Tenants
from tests.served import fake_server, model_folder


@pytest.fixture
def server(home: Home) -> Iterator[RunningServer]:
    with fake_server(home, load=False) as running:
        yield running


def begin(server: RunningServer, key: str, size: int = 6, name: str = "a.bin") -> httpx.Response:
    body = {"bytes": size, "filename": name, "mime_type": "text/plain", "purpose": "user_data"}
    return httpx.post(f"{server.url}/uploads", json=body, headers={"Idempotency-Key": key}, timeout=60)


def test_the_same_request_is_done_once(server: RunningServer) -> None:
    first, again = begin(server, "k1"), begin(server, "k1")
    assert first.status_code == again.status_code == 200
    assert again.json() == first.json()
    assert again.headers["idempotency-replayed"] == "true"
    assert "idempotency-replayed" not in first.headers
    assert again.headers["x-request-id"] != first.headers["x-request-id"]
    assert begin(server, "k2").json()["id"] != first.json()["id"]
    assert server.services.files.used("default") == 12


def test_another_request_may_not_use_the_key(server: RunningServer) -> None:
    begin(server, "k1")
    other = begin(server, "k1", size=7)
    assert other.status_code == 400
    assert other.json()["error"]["code"] == "idempotency_key_reused"
    headers = {"Idempotency-Key": "k1"}
    elsewhere = httpx.post(f"{server.url}/uploads/upload_x/cancel", headers=headers)
    assert elsewhere.json()["error"]["code"] == "idempotency_key_reused"
    for key in ("", "x" * 256):
        assert begin(server, key).status_code == 400


def test_a_request_that_failed_gives_its_key_back(server: RunningServer) -> None:
    assert begin(server, "k1", size=0).status_code == 400
    assert begin(server, "k1").status_code == 200


def test_requests_at_once_make_one_thing(server: RunningServer) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: begin(server, "k1"), range(16)))
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert server.services.files.used("default") == 6


def test_a_file_sent_twice_by_the_client_is_one_file(server: RunningServer) -> None:
    with openai.OpenAI(base_url=server.url, api_key="x", _strict_response_validation=True) as client:
        ids = [
            client.files.create(
                file=("a.txt", content), purpose="user_data", extra_headers={"Idempotency-Key": "f"}
            ).id
            for content in (b"x" * 3_000_000, b"x" * 3_000_000)
        ]
        assert len(set(ids)) == 1  # though each form has another boundary
        with pytest.raises(openai.BadRequestError, match="another request"):
            client.files.create(
                file=("a.txt", b"y"), purpose="user_data", extra_headers={"Idempotency-Key": "f"}
            )
        assert len(client.files.list().data) == 1


def test_a_body_that_does_not_come_is_not_waited_for(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(middleware, "IDLE_SECONDS", 0.3)
    address = urlsplit(server.url)
    head = b"POST /v1/uploads HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += b"Content-Length: 10\r\nIdempotency-Key: k1\r\n\r\n"

    def slow() -> bytes:
        with socket.create_connection((address.hostname, address.port), timeout=20) as connection:
            connection.sendall(head)
            return b"".join(iter(lambda: connection.recv(4096), b""))

    answer = slow()
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"request_timeout" in answer
    assert begin(server, "k1").status_code == 200  # it did nothing: the key is free
    assert slow().startswith(b"HTTP/1.1 408 ")  # nor is the body waited for that asks for an answer again


def test_each_project_has_its_own_keys(server: RunningServer) -> None:
    services = server.services
    second = Tenants(services.db).create_project("second", "test")
    services.admission.keys_required = True
    ids = set()
    for project in ("default", second.id):
        _, key = ApiKeys(services.db).create("k", "test", project=project)
        headers = {"Idempotency-Key": "same", "Authorization": f"Bearer {key}"}
        body = {"bytes": 1, "filename": "a", "mime_type": "text/plain", "purpose": "user_data"}
        ids.add(httpx.post(f"{server.url}/uploads", json=body, headers=headers).json()["id"])
    assert len(ids) == 2
    refused = httpx.post(f"{server.url}/uploads", json=body, headers={"Idempotency-Key": "same"})
    assert refused.status_code == 401


def test_an_answer_is_not_repeated_to_who_may_not_ask(server: RunningServer) -> None:
    services = server.services
    services.admission.keys_required = True
    keys = ApiKeys(services.db)
    made = keys.create("worker", "test")[1]
    other, reader = keys.create("other", "test")[1], keys.create("r", "test", scopes=["models.read"])[1]
    body = {"bytes": 5, "filename": "secret.txt", "mime_type": "text/plain", "purpose": "user_data"}
    answers = [
        httpx.post(
            f"{server.url}/uploads",
            json=body,
            headers={"Idempotency-Key": "same", "Authorization": f"Bearer {key}"},
        )
        for key in (made, other, reader)
    ]
    assert [answer.status_code for answer in answers] == [200, 200, 400]
    assert answers[1].headers["idempotency-replayed"] == "true"
    assert answers[2].json()["error"]["code"] == "idempotency_key_reused"
    assert "secret.txt" not in answers[2].text


def test_administrators_have_theirs_and_secrets_are_told_once(server: RunningServer) -> None:
    url = f"{server.url}/organization/projects"
    headers = {"Idempotency-Key": "p"}
    made = [httpx.post(url, json={"name": "new"}, headers=headers).json() for _ in range(2)]
    assert made[0]["id"] == made[1]["id"]
    assert begin(server, "p").status_code == 200  # a project's keys are others
    url = f"{url}/{made[0]['id']}/service_accounts"
    first, again = (httpx.post(url, json={"name": "ci"}, headers={"Idempotency-Key": "s"}) for _ in range(2))
    assert first.json()["api_key"]["value"]
    assert again.status_code == 409
    assert first.json()["api_key"]["value"] not in again.text


def test_models_answer_as_if_there_were_no_key(server: RunningServer) -> None:
    for words in ("one", "two"):
        body = {"model": "tiny", "prompt": words, "max_tokens": 2}
        answer = httpx.post(f"{server.url}/completions", json=body, headers={"Idempotency-Key": "k"})
        assert answer.status_code == 200


def test_a_secret_is_not_kept_for_those_who_ask_again(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(middleware, "SECRETS", ("uploads",))
    assert begin(server, "k1").status_code == 200
    again = begin(server, "k1")
    assert again.status_code == 409
    assert "only once" in again.json()["error"]["message"]
    assert again.headers["x-should-retry"] == "false"
    monkeypatch.undo()
    monkeypatch.setattr(middleware, "MAX_ANSWER", 10)
    assert begin(server, "k2").status_code == 200
    assert "are not kept" in begin(server, "k2").json()["error"]["message"]


def test_what_a_dead_server_left_is_told_apart(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = server.services.idempotency
    reading, working = keys.claim("default", "reading"), keys.claim("default", "working")
    assert isinstance(reading, Claim)
    assert isinstance(working, Claim)
    keys.work(working, "unknown")
    now = keys._clock()
    monkeypatch.setattr(keys, "_clock", lambda: now + LEASE_SECONDS)
    assert begin(server, "reading").status_code == 200  # nothing had been done
    monkeypatch.setattr(middleware, "_fingerprint", lambda scope, may: Same())
    lost = begin(server, "working")
    assert lost.status_code == 409
    assert "look whether it was done" in lost.json()["error"]["message"]
    monkeypatch.undo()
    assert begin(server, "kept").status_code == 200
    monkeypatch.setattr(keys, "_clock", lambda: now + KEPT_SECONDS + 60)
    assert keys.expire() == 3


class Same:
    def update(self, data: bytes) -> None: ...

    def digest(self) -> str:
        return "unknown"


SERVER = """
import sys
from pathlib import Path
from lapis.home import Home
from lapis.inference.fake import FakeEngine
from lapis.server import serve
serve(Home(Path(sys.argv[1])), port=0, console=False, load=lambda _, name: FakeEngine(name),
      ready=lambda running: print(running.url, flush=True))
"""


def test_a_killed_and_restarted_server_answers_the_same(home: Home) -> None:
    model_folder(home.models / "tiny")
    answers = []
    for _ in range(2):
        command = [sys.executable, "-c", SERVER, str(home.root)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        body = {"bytes": 1, "filename": "a", "mime_type": "text/plain", "purpose": "user_data"}
        answers.append(httpx.post(f"{url}/uploads", json=body, headers={"Idempotency-Key": "k"}).json())
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    assert answers[0]["object"] == "upload"
    assert answers[0] == answers[1]
