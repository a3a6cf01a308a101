"""`lapis chat` and `lapis serve` from the command line, with the FakeEngine in the model's place."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from click.testing import CliRunner, Result

from lapis.cli import chat, serve
from lapis.cli.chat import Conversation, Settings
from lapis.errors import ConfigError, InputError, LapisError, NotFoundError
from lapis.home import Home
from lapis.inference.fake import FakeEngine

REAL = chat.loaded_engine
GREEDY = Settings(max_tokens=50, temperature=0.0, seed=None)


def echo(prompt: str, seed: int) -> str:
    """Answers with the prompt as the model saw it."""
    return f"<{prompt}>"


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    made = FakeEngine("tiny", reply=echo, context=256)
    yield made
    made.close()


@pytest.fixture(autouse=True)
def _fake_model(monkeypatch: pytest.MonkeyPatch, engine: FakeEngine) -> None:
    @contextmanager
    def load(home: Home, name: str) -> Iterator[FakeEngine]:
        yield engine

    monkeypatch.setattr(chat, "loaded_engine", load)


def run(*arguments: str, stdin: str = "") -> Result:
    return CliRunner().invoke(chat.command, list(arguments), input=stdin, catch_exceptions=False)


def test_one_prompt_is_answered_and_nothing_else_printed() -> None:
    ended = run("tiny", "--once", "Hello", "--temperature", "0")
    assert ended.exit_code == 0
    assert ended.output.startswith("<")
    assert "Hello" in ended.output
    assert ended.output.count("\n") == ended.output.rstrip().count("\n") + 1


def test_text_that_is_piped_in_is_one_prompt() -> None:
    assert "two\nlines" in run("tiny", "--temperature", "0", stdin="two\nlines\n").output


def test_json_has_answer_and_counts() -> None:
    facts = json.loads(run("tiny", "--once", "Hello", "--max-tokens", "5", "--json").output)
    assert facts["model"] == "tiny"
    assert facts["prompt"] == "Hello"
    assert facts["answer"]
    assert (facts["completion_tokens"], facts["finish_reason"]) == (5, "length")


def test_an_empty_prompt_is_refused() -> None:
    for arguments in (("tiny",), ("tiny", "--once", "  ")):
        with pytest.raises(InputError, match="empty"):
            run(*arguments)


def test_the_system_text_and_the_history_reach_the_model(engine: FakeEngine) -> None:
    conversation = Conversation(engine, Settings(150, 0.0, None), system="Be brief.")
    conversation.ask("First", lambda text: None)
    answer = conversation.ask("Second", lambda text: None).text
    assert answer.index("Be brief.") < answer.index("First") < answer.index("Second")
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"] * 2


def test_an_answer_is_shown_as_it_comes(engine: FakeEngine) -> None:
    shown: list[str] = []
    answer = Conversation(engine, GREEDY).ask("Hello", shown.append)
    assert "".join(shown) == answer.text


def test_old_messages_make_room_for_new_ones_and_are_counted(engine: FakeEngine) -> None:
    conversation = Conversation(engine, Settings(8, 0.0, None), system="Stay.")
    for number in range(12):
        answer = conversation.ask(f"Question {number} is not short", lambda text: None)
    assert conversation.forgotten > 0
    assert conversation.messages[-2]["content"] == "Question 11 is not short"
    assert answer.prompt_tokens + 8 <= engine.context


def test_a_prompt_that_never_fits_is_an_error_and_is_not_kept(engine: FakeEngine) -> None:
    conversation = Conversation(engine, GREEDY)
    with pytest.raises(InputError, match="tokens"):
        conversation.ask("long " * 500, lambda text: None)
    assert conversation.messages == []
    assert conversation.ask("Hi", lambda text: None).text


def test_a_model_without_a_template_continues_each_text(engine: FakeEngine) -> None:
    engine.chat = None  # type: ignore[assignment]
    conversation = Conversation(engine, GREEDY)
    conversation.ask("First", lambda text: None)
    assert conversation.ask("Once upon", lambda text: None).text == "<Once upon>"


def test_ctrl_c_stops_the_answer_and_the_conversation_goes_on(engine: FakeEngine) -> None:
    def interrupt(text: str) -> None:
        raise KeyboardInterrupt

    conversation = Conversation(engine, GREEDY)
    with pytest.raises(KeyboardInterrupt):
        conversation.ask("First", interrupt)
    assert conversation.messages == []
    assert "First" not in conversation.ask("Second", lambda text: None).text
    while engine.stats()["pages_used"]:
        pass


def test_an_engine_that_ends_is_an_error(engine: FakeEngine) -> None:
    conversation = Conversation(engine, GREEDY)
    engine.close()
    with pytest.raises(LapisError, match="closed"):
        conversation.ask("Hello", lambda text: None)


def test_a_talk_in_the_terminal(
    engine: FakeEngine, home: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed: list[str | type[BaseException]] = [
        "",
        "Hello",
        KeyboardInterrupt,
        "long " * 500,
        "Again",
        EOFError,
    ]

    def read(prompt: str) -> str:
        text = typed.pop(0)
        if isinstance(text, str):
            return text
        raise text

    monkeypatch.setattr("builtins.input", read)
    chat._converse(Conversation(engine, GREEDY), home)
    printed = capsys.readouterr().out
    assert printed.index("tiny chats") < printed.index("Hello") < printed.index("Ctrl-C again ends")
    assert "error: The prompt has" in printed
    assert "Again" in printed


def test_ctrl_c_twice_ends(engine: FakeEngine, home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(prompt: str) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", read)
    with pytest.raises(KeyboardInterrupt):
        chat._converse(Conversation(engine, GREEDY), home)


def test_json_needs_one_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lapis.cli.chat._is_typed", lambda: True)
    with pytest.raises(ConfigError, match="--once"):
        run("tiny", "--json")


def test_a_wrong_model_name_says_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "loaded_engine", REAL)
    with pytest.raises(NotFoundError, match="lapis pull"):
        run("nothing", "--once", "Hi")


def test_serve_says_what_it_needs() -> None:
    helped = CliRunner().invoke(serve.command, ["--help"]).output
    for word in ("--host", "--port", "--no-console", "lapis keys create NAME", "lapis[console]"):
        assert word in helped
