"""Files through the official client: what is sent comes back, nobody else sees it, half a file is no file."""

from __future__ import annotations

import io
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import openai
import pytest

from lapis.api import form as forms
from lapis.api.routes import files as routes
from lapis.home import Home
from lapis.server import RunningServer
from tests.integration.test_api_limits import until
from tests.served import fake_server

LINES = b'{"custom_id": "1"}\n{"custom_id": "2"}\n'


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with fake_server(Home(tmp_path_factory.mktemp("files")), load=False) as running:
        yield running


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=server.url, api_key="unused", max_retries=0, _strict_response_validation=True
    ) as made:
        yield made


def post(server: RunningServer, body: bytes, boundary: str = "b") -> httpx.Response:
    kind = {"content-type": f"multipart/form-data; boundary={boundary}"}
    return httpx.post(f"{server.url}/files", content=body, headers=kind)


def part(disposition: str, content: bytes = b"x") -> bytes:
    return b"--b\r\ncontent-disposition: form-data; " + disposition.encode() + b"\r\n\r\n" + content + b"\r\n"


FILE, PURPOSE, END = part('name="file"; filename="a.txt"'), part('name="purpose"', b"user_data"), b"--b--\r\n"


def stored(server: RunningServer) -> list[Path]:
    return [path for path in server.services.home.files.rglob("*") if path.is_file()]


def test_a_file_goes_there_and_back(client: openai.OpenAI) -> None:
    made = client.files.create(file=("größe.jsonl", LINES), purpose="batch")
    assert (made.bytes, made.filename, made.purpose) == (len(LINES), "größe.jsonl", "batch")
    assert made.expires_at == made.created_at + 30 * 86_400
    assert client.files.wait_for_processing(made.id, max_wait_seconds=1) == made
    assert client.files.retrieve(made.id) == made
    answer = client.files.content(made.id)
    assert answer.content == LINES
    assert answer.response.headers["content-type"] == "application/jsonl"
    assert "gr%C3%B6%C3%9Fe" in answer.response.headers["content-disposition"]
    assert client.files.delete(made.id).deleted
    for act in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError) as caught:
            act(made.id)
        assert caught.value.param == "file_id"


def test_files_are_listed_in_pages_that_tell_the_truth(client: openai.OpenAI) -> None:
    made = [client.files.create(file=(f"{n}.txt", b"x"), purpose="vision").id for n in range(5)]
    page = client.files.list(purpose="vision", limit=2)
    assert len(page.data) == 2
    assert page.has_more
    walked = [file.id for file in client.files.list(purpose="vision", limit=2, order="asc")]
    assert sorted(walked) == sorted(made)
    assert len(client.files.list(purpose="vision").data) == 5
    with pytest.raises(openai.BadRequestError, match="go on after"):
        client.files.list(after="file-unknown")
    with pytest.raises(openai.BadRequestError, match="limit"):
        client.files.list(limit=0)


def test_a_file_lives_as_long_as_was_asked_for(client: openai.OpenAI) -> None:
    made = client.files.create(
        file=("a.txt", b"x"), purpose="user_data", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert made.expires_at == made.created_at + 3600
    assert client.files.create(file=("a.txt", b"x"), purpose="user_data").expires_at is None
    with pytest.raises(openai.BadRequestError, match="3600 to 2592000"):
        client.files.create(
            file=("a.txt", b"x"), purpose="user_data", expires_after={"anchor": "created_at", "seconds": 60}
        )


@pytest.mark.parametrize(
    ("name", "content", "purpose", "why"),
    [
        ("a.txt", LINES, "batch", "jsonl"),
        ("a.jsonl", b"", "fine-tune", "empty"),
        ("a.jsonl", b"prompt,completion\n", "fine-tune", "not a JSON object"),
        ("a.txt", b"x", "anything", "purpose"),
        ("..", b"x", "user_data", "no name"),
        ("a" * 300, b"x", "user_data", "255"),
    ],
)
def test_what_cannot_be_used_is_refused_at_once(
    client: openai.OpenAI, server: RunningServer, name: str, content: bytes, purpose: str, why: str
) -> None:
    before = stored(server)
    with pytest.raises(openai.BadRequestError, match=why) as caught:
        client.files.create(file=(name, content), purpose=purpose)  # type: ignore[arg-type]
    assert caught.value.param in ("file", "purpose")
    assert stored(server) == before


def test_a_path_for_a_name_is_only_a_name(client: openai.OpenAI, server: RunningServer) -> None:
    made = client.files.create(file=("../../x.txt", b"x"), purpose="user_data")
    assert made.filename == "x.txt"
    inside = server.services.home.files.resolve()
    assert all(inside in path.resolve().parents for path in stored(server))


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (FILE + PURPOSE + END, 200),  # the file first
        (PURPOSE + FILE, 400),  # no end
        (PURPOSE + END, 400),  # no file
        (FILE + END, 400),  # no purpose
        (FILE + FILE + PURPOSE + END, 400),
        (FILE + PURPOSE + PURPOSE + END, 400),
        (FILE + PURPOSE + part('name="colour"') + END, 400),
        (part('name="data"; filename="a.txt"') + PURPOSE + END, 400),
        (part('filename="a.txt"') + PURPOSE + END, 400),
        (part('name="file"; filename="a\0.txt"') + PURPOSE + END, 400),
        (FILE + part('name="purpose"', b"\xff\xfe") + END, 400),
        (FILE + part('name="purpose"', b"x" * 70_000) + END, 413),
        (b"nonsense", 400),
        (b"", 400),
        (b"--b\r\n" + b"a: " + b"x" * 100_000 + b"\r\n\r\n", 400),
        (b"--b\r\n" + b"a: b\r\n" * 1000 + b"\r\nx\r\n" + END, 400),
    ],
)
def test_a_form_is_read_strictly(server: RunningServer, body: bytes, status: int) -> None:
    before = len(stored(server))
    answer = post(server, body)
    assert answer.status_code == status, answer.text
    assert len(stored(server)) == before + (status == 200)
    if status != 200:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_another_kind_of_body_is_refused(server: RunningServer) -> None:
    assert httpx.post(f"{server.url}/files", json={"purpose": "batch"}).status_code == 415
    assert post(server, b"", boundary="").status_code == 415
    assert post(server, b"", boundary="x" * 500).status_code == 400


def test_a_file_that_is_too_large_is_refused(
    client: openai.OpenAI, server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routes, "FILE_LIMIT", 1000)
    before = stored(server)
    client.files.create(file=("a.txt", b"x" * 1000), purpose="vision")
    with pytest.raises(openai.APIStatusError) as caught:
        client.files.create(file=("a.txt", b"x" * 1001), purpose="vision")
    assert caught.value.status_code == 413
    assert len(stored(server)) == len(before) + 1


def test_a_full_storage_is_not_tried_again(client: openai.OpenAI, server: RunningServer) -> None:
    limit, server.services.files.storage_limit = server.services.files.storage_limit, lambda project: 0
    try:
        with pytest.raises(openai.RateLimitError, match="storage is full") as caught:
            client.with_options(max_retries=5).files.create(file=("a.txt", b"x"), purpose="vision")
        assert caught.value.response.headers["x-should-retry"] == "false"
    finally:
        server.services.files.storage_limit = limit


def test_an_upload_that_breaks_off_or_dawdles_leaves_nothing(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = stored(server)
    address = urlsplit(server.url)
    head = (
        b"POST /v1/files HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9000000\r\n"
        b"content-type: multipart/form-data; boundary=b\r\n\r\n"
    )
    with socket.create_connection((address.hostname, address.port), timeout=20) as broken:
        broken.sendall(head + PURPOSE + FILE[:-3] + b"x" * 3_000_000)
        until(lambda: len(stored(server)) > len(before))
    until(lambda: stored(server) == before)
    monkeypatch.setattr(forms, "IDLE_SECONDS", 0.2)
    with socket.create_connection((address.hostname, address.port), timeout=20) as slow:
        slow.sendall(head + PURPOSE + FILE[:-3])
        answer = b"".join(iter(lambda: slow.recv(4096), b""))
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert stored(server) == before


def test_a_large_file_never_is_whole_in_memory(client: openai.OpenAI, server: RunningServer) -> None:
    size = 64 << 20
    status = Path("/proc/self/status")

    def peak() -> int:
        return int(next(line for line in status.read_text().splitlines() if "VmHWM" in line).split()[1]) << 10

    class Zeros(io.RawIOBase):
        left = size

        def read(self, count: int = -1) -> bytes:
            given = min(self.left, 65536 if count < 0 else count)
            self.left -= given
            return bytes(given)

    before = peak()
    body = (data for data in _stream(PURPOSE + FILE[: -len(b"x\r\n")], Zeros(), b"\r\n" + END))
    kind = {"content-type": "multipart/form-data; boundary=b", "content-length": str(size + _extra())}
    answer = httpx.post(f"{server.url}/files", content=body, headers=kind, timeout=60)
    assert answer.json()["bytes"] == size
    got = 0
    with httpx.stream("GET", f"{server.url}/files/{answer.json()['id']}/content") as sent:
        for data in sent.iter_bytes():
            got += len(data)
    assert got == size
    assert peak() - before < size / 2  # client and server are in this process
    os.sync()


def _extra() -> int:
    return len(PURPOSE + FILE[: -len(b"x\r\n")] + b"\r\n" + END)


def _stream(head: bytes, content: io.RawIOBase, tail: bytes) -> Iterator[bytes]:
    yield head
    while data := content.read(65536):
        yield data
    yield tail
