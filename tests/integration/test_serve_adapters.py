"""A base and its adapter, pulled and served: the official client asks both at once, and each answers as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import openai
import pytest
from click.testing import CliRunner

from lapis.cli.main import lapis
from lapis.errors import InputError
from lapis.home import Home
from lapis.inference.engine import LocalEngine, prompt_ids
from lapis.inference.request import Request, SamplingParams
from lapis.model.adapters import write_adapter
from lapis.model.pull import pull
from lapis.model.store import ModelStore
from lapis.model.weights import to_hf_state
from lapis.server import RunningServer, running_server
from lapis.tokenizer.chat import CHATML
from tests import small_models

PROMPT = "the quick brown"
MESSAGES = [{"role": "user", "content": "the lazy dog"}]
NAMES = ("base", "poet", "pirate")
LENGTH = {"max_tokens": 16, "temperature": 0}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """A base model and two adapters of it, fetched from folders as others write them."""
    made = tmp_path_factory.mktemp("adapters")
    shape = small_models.config()
    base = small_models.write_hf_folder(
        made / "base", shape, to_hf_state(shape, small_models.random_state(shape))
    )
    (base / "chat_template.jinja").write_text(CHATML)
    for seed, name in enumerate(NAMES[1:]):
        write_adapter(made / name, shape, small_models.random_adapter(shape, seed), "base")
    for name in NAMES:
        runner = CliRunner(env={"LAPIS_HOME": str(made / "home")})
        assert runner.invoke(lapis, ["pull", str(made / name)], catch_exceptions=False).exit_code == 0
    return Home(made / "home")


@pytest.fixture(scope="module")
def server(home: Home) -> Iterator[RunningServer]:
    with running_server(home, ["base", "poet", "pirate"]) as running:
        yield running


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url, api_key="unused", max_retries=0) as made:
        yield made


def expected(home: Home) -> tuple[dict[str, str], dict[str, str]]:
    """What an engine without a server says under each name: texts, then answers in chats."""
    store = ModelStore(home)
    with closing(LocalEngine.load(store.get("base").folder, "base")) as engine:
        for name in NAMES[1:]:
            engine.add_adapter(name, store.get(name).folder)
        assert engine.chat is not None
        asked = engine.chat.prompt(MESSAGES, engine.tokenizer)
        params = SamplingParams(**LENGTH)  # type: ignore[arg-type]

        def text(ids: list[int], name: str) -> str:
            adapter = None if name == "base" else name
            return engine.submit(Request("x", ids, params, adapter=adapter)).result().text

        return (
            {name: text(prompt_ids(engine, PROMPT), name) for name in NAMES},
            {name: text(asked, name) for name in NAMES},
        )


def at_once(ask: Callable[[str], str]) -> dict[str, str]:
    """The answers of all models, asked for together, several times over."""
    names = NAMES * 3
    with ThreadPoolExecutor(len(names)) as pool:
        answers = list(pool.map(ask, names))
    assert answers == answers[: len(NAMES)] * 3
    return dict(zip(names, answers, strict=False))


def test_base_and_adapters_answer_together_as_each_does_alone(client: openai.OpenAI, home: Home) -> None:
    texts, chats = expected(home)
    assert len(set(texts.values())) == len(set(chats.values())) == 3

    def complete(name: str) -> str:
        return client.completions.create(model=name, prompt=PROMPT, **LENGTH).choices[0].text  # type: ignore[call-overload]

    def chat(name: str) -> str:
        answer = client.chat.completions.create(model=name, messages=MESSAGES, **LENGTH)  # type: ignore[call-overload]
        assert answer.model == name
        return answer.choices[0].message.content

    def streamed(name: str) -> str:
        chunks = client.chat.completions.create(model=name, messages=MESSAGES, stream=True, **LENGTH)  # type: ignore[call-overload]
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    assert at_once(complete) == texts
    assert at_once(chat) == chats
    assert at_once(streamed) == chats


def test_both_are_listed_and_one_engine_answers(client: openai.OpenAI, server: RunningServer) -> None:
    listed = {model.id: model.model_extra or {} for model in client.models.list()}
    assert {name: facts["parent"] for name, facts in listed.items()} == {
        "base": None,
        "poet": "base",
        "pirate": "base",
    }
    assert len({facts["digest"] for facts in listed.values()}) == 3
    assert len({id(server.services.router.find(name)) for name in NAMES}) == 1


def test_an_adapter_that_does_not_fit_its_base_is_refused(home: Home, tmp_path: Path) -> None:
    wide = small_models.config(width=64, heads=2, kv_heads=1)
    write_adapter(tmp_path / "wide", wide, small_models.random_adapter(wide, 3), "base")
    deep = small_models.config(layers=3)
    write_adapter(tmp_path / "deep", deep, small_models.random_adapter(deep, 3), "base")
    for name in ("wide", "deep"):
        with pytest.raises(InputError, match=r"No adapter of 'base'.*(shapes|adapt nothing)") as caught:
            pull(str(tmp_path / name), home)
        assert "made for another model" in caught.value.hint
    assert sorted(model.name for model in ModelStore(home).list()) == sorted(NAMES)
