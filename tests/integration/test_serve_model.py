"""A real model (small, random weights) through every door: engine, HTTP, chat. Greedy text is the same everywhere."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from click.testing import CliRunner

from lapis.cli import chat
from lapis.errors import IntegrityError
from lapis.gateway.memory import MemoryBudget
from lapis.home import Home
from lapis.inference.engine import LocalEngine, prompt_ids
from lapis.inference.footprint import engine_bytes
from lapis.inference.request import Request, SamplingParams
from lapis.model.manifest import Source
from lapis.model.weights import write_model
from lapis.server import RunningServer, running_server
from lapis.tokenizer.chat import CHATML
from tests import small_models

PROMPT = "the quick brown"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    made = Home(tmp_path_factory.mktemp("model"))
    shape = small_models.config()
    for name, template in (("talker", CHATML), ("writer", None)):
        write_model(
            made.models / name,
            shape,
            small_models.random_state(shape),
            small_models.tokenizer(),
            source=Source("run", "test", "MIT"),
            chat_template=template,
            add_bos=True,
        )
    return made


@pytest.fixture(scope="module")
def server(home: Home) -> Iterator[RunningServer]:
    with running_server(home, ["talker", "writer"]) as running:
        yield running


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url, api_key="unused", max_retries=0) as made:
        yield made


def test_text_is_the_same_from_the_engine_over_http_and_in_the_terminal(
    client: openai.OpenAI, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = LocalEngine.load(home.models / "writer", "writer")
    request = Request("x", prompt_ids(engine, PROMPT), SamplingParams(max_tokens=12, temperature=0))
    text = engine.submit(request).result().text
    engine.close()
    over_http = client.completions.create(model="writer", prompt=PROMPT, max_tokens=12, temperature=0)
    streamed = client.completions.create(
        model="writer", prompt=PROMPT, max_tokens=12, temperature=0, stream=True
    )
    monkeypatch.setenv("LAPIS_HOME", str(home.root))
    arguments = ["writer", "--once", PROMPT, "--max-tokens", "12", "--temperature", "0", "--json"]
    printed = CliRunner().invoke(chat.command, arguments, catch_exceptions=False).output
    assert text
    assert over_http.choices[0].text == text
    assert "".join(chunk.choices[0].text for chunk in streamed) == text
    assert json.loads(printed)["answer"] == text


def test_a_model_with_a_template_chats_and_one_without_says_so(client: openai.OpenAI) -> None:
    ask = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 4}
    assert client.chat.completions.create(model="talker", **ask).choices[0].message.content  # type: ignore[call-overload]
    with pytest.raises(openai.BadRequestError, match="no chat template"):
        client.chat.completions.create(model="writer", **ask)  # type: ignore[call-overload]


def test_its_facts_are_listed(client: openai.OpenAI) -> None:
    facts = client.models.retrieve("talker").model_extra or {}
    assert facts["licence"] == "MIT"
    assert facts["context"] == 256
    assert facts["kernels"]
    assert isinstance(facts["bit_exact"], bool)
    metrics = httpx.get(str(client.base_url).removesuffix("/v1/") + "/metrics").text
    for name in ("bit_exact", "replay"):
        assert f'lapis_engine_{name}{{model="talker"}} {int(facts[name])}' in metrics


def test_a_model_that_makes_room_leaves_no_memory_behind(home: Home) -> None:
    size = engine_bytes(small_models.config(), "bf16")
    memory = MemoryBudget(size + size // 2, lambda servable: size)
    with (
        running_server(home, memory=memory) as running,
        openai.OpenAI(base_url=running.url, api_key="unused", max_retries=0) as client,
    ):

        def text(name: str) -> str:
            answer = client.completions.create(model=name, prompt=PROMPT, max_tokens=12, temperature=0)
            return answer.choices[0].text

        first = text("talker")
        engine = running.services.router.find("talker").loaded
        assert isinstance(engine, LocalEngine)
        model = weakref.ref(engine._runner.model)  # type: ignore[attr-defined]
        del engine
        assert text("writer")
        gc.collect()
        assert model() is None
        assert text("talker") == first


def test_a_flipped_bit_is_refused_with_the_files_name(home: Home, tmp_path: Path) -> None:
    folder = Home(tmp_path).models / "broken"
    shutil.copytree(home.models / "writer", folder)
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-9] ^= 1
    weights.write_bytes(data)
    with (
        pytest.raises(IntegrityError, match=r"model\.safetensors"),
        running_server(Home(tmp_path), ["broken"]),
    ):
        pass
