"""Uploads in parts through the official client: the bytes in the order named, or nothing."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
from openai.types import Upload

from lapis.api.routes import uploads as routes
from lapis.gateway.uploads import LIFETIME, REMEMBERED
from lapis.home import Home
from lapis.server import RunningServer
from tests.served import fake_server

CONTENT = random.Random(1).randbytes(1_000_003)


@pytest.fixture
def server(home: Home) -> Iterator[RunningServer]:
    with fake_server(home, load=False) as running:
        yield running


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=server.url, api_key="unused", max_retries=0, _strict_response_validation=True
    ) as made:
        yield made


def begin(client: openai.OpenAI, size: int = 6, **more: object) -> Upload:
    wanted = {"bytes": size, "filename": "a.bin", "mime_type": "text/plain", "purpose": "user_data", **more}
    return client.uploads.create(**wanted)  # type: ignore[arg-type]


def stored(server: RunningServer) -> list[Path]:
    return [path for path in server.services.home.files.rglob("*") if path.is_file()]


def test_the_clients_own_chunks_become_the_same_file(
    client: openai.OpenAI, server: RunningServer, tmp_path: Path
) -> None:
    (tmp_path / "train.bin").write_bytes(CONTENT)
    done = client.uploads.upload_file_chunked(
        file=tmp_path / "train.bin", mime_type="application/octet-stream", purpose="user_data",
        part_size=300_000, md5=hashlib.md5(CONTENT).hexdigest(),
    )  # fmt: skip
    assert done.status == "completed"
    assert done.file is not None
    assert (done.file.bytes, done.file.filename) == (len(CONTENT), "train.bin")
    assert client.files.content(done.file.id).content == CONTENT
    assert client.files.retrieve(done.file.id) == done.file
    assert len(stored(server)) == 1  # the parts are gone


def test_parts_may_come_side_by_side_and_count_in_the_order_named(client: openai.OpenAI) -> None:
    upload = begin(client, size=30)
    assert (upload.status, upload.expires_at - upload.created_at, upload.file) == ("pending", 3600, None)

    def add(number: int) -> str:
        return client.uploads.parts.create(upload.id, data=bytes([48 + number]) * 3).id

    with ThreadPoolExecutor(5) as pool:
        ids = list(pool.map(add, range(10)))
    done = client.uploads.complete(upload.id, part_ids=ids[::-1])
    assert done.file is not None
    assert client.files.content(done.file.id).text == "".join(str(n) * 3 for n in range(9, -1, -1))


def test_what_does_not_add_up_makes_no_file(client: openai.OpenAI) -> None:
    upload = begin(client)
    one, two = (client.uploads.parts.create(upload.id, data=data).id for data in (b"abc", b"def"))
    other = client.uploads.parts.create(begin(client).id, data=b"ghi").id
    for parts, why in (
        ([one], "3 bytes"),
        ([one, one], "twice"),
        ([one, other], "no part"),
        ([], "0 bytes"),
    ):
        with pytest.raises(openai.BadRequestError, match=why) as caught:
            client.uploads.complete(upload.id, part_ids=parts)
        assert caught.value.param == "part_ids"
    with pytest.raises(openai.BadRequestError, match="MD5"):
        client.uploads.complete(upload.id, part_ids=[one, two], md5="0" * 32)
    with pytest.raises(openai.BadRequestError, match="more than the upload"):
        client.uploads.parts.create(upload.id, data=b"1234567")
    assert client.files.list().data == []
    done = client.uploads.complete(upload.id, part_ids=[one, two], md5=hashlib.md5(b"abcdef").hexdigest())
    assert done.file is not None


def test_an_upload_that_has_ended_takes_nothing_more(client: openai.OpenAI, server: RunningServer) -> None:
    upload = begin(client)
    part = client.uploads.parts.create(upload.id, data=b"abcdef").id
    assert client.uploads.cancel(upload.id).status == "cancelled"
    assert stored(server) == []
    for act in (
        lambda: client.uploads.parts.create(upload.id, data=b"x"),
        lambda: client.uploads.complete(upload.id, part_ids=[part]),
        lambda: client.uploads.cancel(upload.id),
    ):
        with pytest.raises(openai.ConflictError, match="is cancelled") as caught:
            act()
        assert caught.value.response.headers["x-should-retry"] == "false"
    with pytest.raises(openai.NotFoundError):
        client.uploads.cancel("upload_unknown")


def test_an_upload_is_over_after_an_hour(
    client: openai.OpenAI, server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = begin(client)
    client.uploads.parts.create(upload.id, data=b"abcdef")
    store = server.services.files
    later = store.clock() + LIFETIME
    monkeypatch.setattr(store, "clock", lambda: later)
    assert store.used("default") == 0
    with pytest.raises(openai.ConflictError, match="is expired"):
        client.uploads.parts.create(upload.id, data=b"x")
    assert server.services.uploads.expire() == 1
    assert stored(server) == []
    monkeypatch.setattr(store, "clock", lambda: later + REMEMBERED)
    server.services.uploads.expire()
    with pytest.raises(openai.NotFoundError):
        client.uploads.cancel(upload.id)


def test_two_who_complete_at_once_make_one_file(client: openai.OpenAI) -> None:
    upload = begin(client, size=len(CONTENT))
    part = client.uploads.parts.create(upload.id, data=CONTENT).id

    def complete(_: int) -> bool:
        try:
            return client.uploads.complete(upload.id, part_ids=[part]).status == "completed"
        except openai.ConflictError:
            return False

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(complete, range(4))) == 1
    assert len(client.files.list().data) == 1


def test_what_is_promised_counts_as_stored(client: openai.OpenAI, server: RunningServer) -> None:
    server.services.files.storage_limit = lambda project: 10
    upload = begin(client, size=8)
    with pytest.raises(openai.RateLimitError, match="storage is full"):
        begin(client, size=3)
    part = client.uploads.parts.create(upload.id, data=b"12345678").id
    client.uploads.complete(upload.id, part_ids=[part])
    assert server.services.files.used("default") == 8
    begin(client, size=2)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"size": 0}, "bytes"),
        ({"size": (8 << 30) + 1}, "bytes"),
        ({"filename": "a\0"}, "file"),
        ({"purpose": "fine-tune"}, "file"),
        ({"purpose": "none"}, "purpose"),
        ({"expires_after": {"anchor": "created_at", "seconds": 5}}, "expires_after.seconds"),
    ],
)
def test_an_upload_that_could_never_be_used_is_not_begun(
    client: openai.OpenAI, change: dict[str, object], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        begin(client, **change)  # type: ignore[arg-type]
    assert caught.value.param == param


def test_a_part_has_a_limit_and_one_field(
    client: openai.OpenAI, server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routes, "PART_LIMIT", 100)
    upload = begin(client, size=200)
    with pytest.raises(openai.APIStatusError) as caught:
        client.uploads.parts.create(upload.id, data=b"x" * 101)
    assert caught.value.status_code == 413
    url = f"{server.url}/uploads/{upload.id}/parts"
    assert httpx.post(url, files={"data": b"x"}, data={"more": "1"}).status_code == 400
    assert httpx.post(url, files={"file": b"x"}).status_code == 400
    assert stored(server) == []
