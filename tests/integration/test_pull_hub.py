"""`lapis pull hf:owner/name` against a stand-in of the hub on a loopback port."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from lapis.errors import AuthError, InputError, IntegrityError, LapisError, NotFoundError, UnavailableError
from lapis.home import Home
from lapis.model.manifest import verify
from lapis.model.pull import pull
from lapis.model.weights import to_hf_state
from tests import small_models

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves one repository, `acme/tiny`, the way the hub does: large files by a redirect that states their digest."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.folder = folder
        self.token: str | None = None  # a private repository wants this one
        self.wrong_digest = self.cut = self.broken = False
        self.asked: list[str] = []
        self.storage_saw: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        hub, (_, *parts) = self.server, self.path.split("/")
        if parts[0] == "storage":
            hub.storage_saw.append(self.headers.get("Authorization"))
            return self._send(parts[1])
        hub.asked.append(self.path)
        if hub.broken:
            return self._refuse(500)
        if hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self._refuse(401)
        owner, name, resolve, revision, file = parts
        if (owner, name, resolve) != ("acme", "tiny", "resolve") or revision not in (
            "main",
            "v1%2F0",
            COMMIT,
        ):
            return self._refuse(404)
        if not (hub.folder / file).exists():
            return self._refuse(404)
        if not file.endswith(".safetensors"):
            return self._send(file)
        data = (hub.folder / file).read_bytes()
        self.send_response(302)
        self.send_header("Location", f"/storage/{file}")
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("X-Linked-Size", str(len(data)))
        digest = "0" * 64 if hub.wrong_digest else hashlib.sha256(data).hexdigest()
        self.send_header("X-Linked-Etag", f'"{digest}"')
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send(self, file: str) -> None:
        data = (self.server.folder / file).read_bytes()
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[:-7] if self.server.cut else data)

    def _refuse(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    shape = small_models.config()
    tensors = to_hf_state(shape, small_models.random_state(shape))
    server = Hub(small_models.write_hf_folder(tmp_path / "repository", shape, tensors, shards=2))
    (server.folder / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", server.url + "/")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def left(home: Home) -> list[str]:
    found = home.models.iterdir() if home.models.exists() else ()
    return sorted(path.name for path in found if not path.name.endswith(".lock"))


def test_a_sharded_repository_comes_in_whole_and_from_one_commit(home: Home, hub: Hub) -> None:
    shown: list[str] = []
    model = pull("hf:acme/tiny", home, progress=lambda done, total=None, text="": shown.append(text))
    assert verify(model.folder).parameters == small_models.config().parameters
    assert (model.name, model.licence) == ("tiny", "mit")
    assert model.source.kind == "hub"
    assert model.source.digest == COMMIT
    assert f"hf:acme/tiny@{COMMIT}" in model.source.reference
    assert hub.asked[0].split("/")[4] == "main"
    assert {path.split("/")[4] for path in hub.asked[1:]} == {COMMIT}
    assert not any(path.endswith(".bin") for path in hub.asked)
    assert any("model-00002-of-00002.safetensors" in text for text in shown)
    asked = len(hub.asked)
    pull("hf:acme/tiny", home)
    assert len(hub.asked) == asked
    assert left(home) == ["tiny"]


def test_a_revision_may_be_asked_for(home: Home, hub: Hub) -> None:
    pull("hf:acme/tiny@v1/0", home, name="old")
    assert hub.asked[0].split("/")[4] == "v1%2F0"


def test_a_token_opens_a_private_repository_and_stays_with_the_hub(
    home: Home, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.token = "secret"
    with pytest.raises(AuthError, match="acme/tiny") as caught:
        pull("hf:acme/tiny", home)
    assert "HF_TOKEN" in caught.value.hint
    monkeypatch.setenv("HF_TOKEN", "secret")
    pull("hf:acme/tiny", home)
    assert hub.storage_saw == [None, None]


@pytest.mark.parametrize(
    ("trouble", "kind", "said"),
    [
        ("wrong_digest", IntegrityError, "does not match the SHA-256"),
        ("cut", IntegrityError, "bytes instead of"),
        ("broken", UnavailableError, "HTTP 500"),
    ],
)
def test_what_comes_damaged_is_refused_and_leaves_nothing(
    home: Home, hub: Hub, trouble: str, kind: type[LapisError], said: str
) -> None:
    setattr(hub, trouble, True)
    with pytest.raises(kind, match=said):
        pull("hf:acme/tiny", home)
    assert left(home) == []


def test_what_is_not_there_is_named(home: Home, hub: Hub) -> None:
    with pytest.raises(NotFoundError, match=r"config\.json in acme/nothing"):
        pull("hf:acme/nothing", home)
    with pytest.raises(NotFoundError, match="revision v9"):
        pull("hf:acme/tiny@v9", home)
    (hub.folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(NotFoundError, match="model-00002-of-00002"):
        pull("hf:acme/tiny", home)
    (hub.folder / "model.safetensors.index.json").unlink()
    with pytest.raises(InputError, match="no safetensors"):
        pull("hf:acme/tiny", home)
    assert left(home) == []


def test_without_network_the_next_step_is_told(home: Home, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(UnavailableError, match="cannot be fetched") as caught:
        pull("hf:acme/tiny", home)
    assert "lapis pull FOLDER" in caught.value.hint
