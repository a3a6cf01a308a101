"""`lapis serve` as a process: its one line, its refusals, and how it ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from lapis.db import open_database
from lapis.errors import ConfigError, ConflictError, IntegrityError, NotFoundError
from lapis.home import Home
from lapis.inference.fake import FakeEngine
from lapis.model import manifest
from lapis.release.registry import Registry
from lapis.release.release import State
from lapis.server import RunningServer, running_server
from lapis.tenants.keys import ApiKeys
from tests.served import fake_server, model_folder

# What cli/serve.py does, with the FakeEngine in the model's place.
SERVE = """
import sys
from lapis.cli import main, serve
from lapis import server
from lapis.inference.fake import FakeEngine
real = server.serve
server.serve = lambda *given, **options: real(
    *given, **{**options, "load": lambda _, name: FakeEngine(name, seconds_per_token=0.02)}
)
sys.argv[0] = "lapis"
main.main()
"""


@contextmanager
def serving(home: Home, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A `lapis serve` process and the first line it prints."""
    command = [sys.executable, "-W", "error", "-c", SERVE, "serve", *arguments]
    environment = {**os.environ, "LAPIS_HOME": str(home.root)}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        yield process, process.stdout.readline().strip()
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def lapis(home: Home, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lapis.cli.main", *arguments]
    environment = {**os.environ, "LAPIS_HOME": str(home.root)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_it_prints_one_line_and_answers(home: Home) -> None:
    model_folder(home.models / "b-model")
    model_folder(home.models / "a-model", "other weights")
    with serving(home, "--port", "0") as (process, line):
        assert line.startswith("Lapis serves a-model, b-model at http://127.0.0.1:")
        url = line.rpartition(" ")[2]
        models = httpx.get(f"{url}/models").json()["data"]
        assert [model["loaded"] for model in models] == [False, False]
        body = {"model": "a-model", "prompt": "x", "max_tokens": 2}
        assert httpx.post(f"{url}/completions", json=body).status_code == 200
        models = httpx.get(f"{url}/models").json()["data"]
        assert [model["loaded"] for model in models] == [True, False]
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=20)
        assert (process.returncode, out, err) == (0, "", "")


def test_sigterm_lets_answers_end_and_takes_no_new_ones(home: Home) -> None:
    model_folder(home.models / "tiny")
    with serving(home, "tiny", "--port", "0") as (process, line):
        url = line.rpartition(" ")[2]
        body = {"model": "tiny", "prompt": "x", "max_tokens": 40, "stream": True, "stop": ["never"]}
        with httpx.stream("POST", f"{url}/completions", json=body, timeout=30) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            while (refused := httpx.get(f"{url}/models")).status_code == 200:
                time.sleep(0.01)
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "unavailable"
            assert refused.headers["retry-after"]
            assert [text for text in lines if text][-1] == "data: [DONE]"
        assert process.wait(timeout=20) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/models")


def test_ctrl_c_ends_at_once_with_130_though_an_answer_is_under_way(home: Home) -> None:
    model_folder(home.models / "tiny")
    with serving(home, "tiny", "--port", "0") as (process, line):
        url = line.rpartition(" ")[2]
        body = {"model": "tiny", "prompt": [5], "max_tokens": 2000, "logit_bias": {}, "stream": True}
        with httpx.stream("POST", f"{url}/completions", json=body, timeout=30) as answer:
            next(answer.iter_lines())
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=10) == 130


def test_a_killed_server_serves_again(home: Home) -> None:
    model_folder(home.models / "tiny")
    with serving(home, "tiny", "--port", "0") as (process, line):
        url = line.rpartition(" ")[2]
        body = {"model": "tiny", "prompt": "x", "max_tokens": 2000, "stream": True}
        with httpx.stream("POST", f"{url}/completions", json=body, timeout=30) as stream:
            next(stream.iter_lines())
            process.kill()
            process.wait()
    with fake_server(home) as server:
        answer_again = httpx.post(
            f"{server.url}/completions", json={**body, "stream": False, "max_tokens": 2}
        )
        assert answer_again.status_code == 200


def test_a_port_in_use_is_named_with_a_free_one(home: Home) -> None:
    model_folder(home.models / "tiny")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ended = lapis(home, "serve", "--port", str(port))
    assert ended.returncode == 5
    assert f"Port {port} of 127.0.0.1 is in use." in ended.stderr
    free = int(ended.stderr.rpartition("--port ")[2])
    assert free > port or free == 0
    assert "Traceback" not in ended.stderr


def test_nobody_else_is_let_in_without_a_key(home: Home) -> None:
    model_folder(home.models / "tiny")
    for host in ("0.0.0.0", "::"):
        with pytest.raises(ConfigError, match="lapis keys create NAME"), running_server(home, host=host):
            pass


def test_with_a_key_every_address_may_be_served(home: Home) -> None:
    model_folder(home.models / "tiny")
    db = open_database(home.database_url)
    ApiKeys(db).create("laptop", "test")
    db.dispose()
    with running_server(home, host="0.0.0.0") as server:
        url = server.url.replace("0.0.0.0", "127.0.0.1")
        assert httpx.get(f"{url}/models").status_code == 401


def test_what_cannot_be_served_is_said(home: Home) -> None:
    with pytest.raises(NotFoundError, match="lapis pull"), running_server(home):
        pass
    model_folder(home.models / "tiny")
    with pytest.raises(NotFoundError, match="Did you mean 'tiny'"), running_server(home, ["tinny"]):
        pass
    with pytest.raises(ConfigError, match="not a host"), running_server(home, host="not a host"):
        pass


def test_a_release_goes_live_when_it_is_loaded_and_leaves_when_it_is_retired(
    home: Home, tmp_path: Path
) -> None:
    db = open_database(home.database_url)
    registry = Registry(home, db)
    registry.create("poems", model_folder(tmp_path / "model"), None, None, "test")
    with pytest.raises(ConflictError, match="draft"), running_server(home, ["poems"]):
        pass
    registry.approve("poems:1", "test", force=True, reason="a test")
    model_folder(home.models / "pulled", "other weights")
    with running_server(home, load=lambda _, name: FakeEngine(name)) as server:
        assert server.models == ("poems", "pulled")
        assert registry.show("poems").state is State.APPROVED
        for name in ("poems", "poems:1"):
            assert answer(server, name).status_code == 200
        assert registry.show("poems").state is State.LIVE
        assert server.services.router.find("poems") is server.services.router.find("poems:1")
        registry.retire("poems:1", "test")
        while answer(server, "poems").status_code != 404:
            time.sleep(0.05)
        assert answer(server, "pulled").status_code == 200
    db.dispose()


def test_weights_that_were_changed_are_refused_and_the_others_go_on(home: Home, tmp_path: Path) -> None:
    db = open_database(home.database_url)
    registry = Registry(home, db)
    release = registry.create("poems", model_folder(tmp_path / "model"), None, None, "test")
    registry.approve("poems:1", "test", force=True, reason="a test")
    db.dispose()
    text = (release.folder / manifest.NAME).read_text()
    (release.folder / manifest.NAME).write_text(text.replace("Apache-2.0", "public domain"))
    with pytest.raises(IntegrityError, match="digest"), running_server(home, ["poems"]):
        pass
    model_folder(home.models / "sound", "other weights")
    with running_server(home, load=lambda _, name: FakeEngine(name)) as server:
        refused = answer(server, "poems")
        assert refused.status_code == 500
        assert refused.json()["error"]["code"] == "corrupt"
        assert answer(server, "sound").status_code == 200


def answer(server: RunningServer, name: str) -> httpx.Response:
    body = {"model": name, "prompt": "x", "max_tokens": 2}
    return httpx.post(f"{server.url}/completions", json=body)
