"""The engine's promises, over runners that compute nothing: everything but the model is the real thing."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lapis.errors import InputError, LimitError, NotFoundError, UnavailableError
from lapis.inference import loop
from lapis.inference.engine import prompt_ids
from lapis.inference.fake import FakeEngine, FakeRunner
from lapis.inference.kv_cache import PAGE, KVCache
from lapis.inference.loop import EngineLoop, Limits
from lapis.inference.request import Output, Request, SamplingParams
from lapis.inference.result import Result
from lapis.inference.scheduler import Chunk
from lapis.tokenizer.bpe import Tokenizer


class Gate:
    """Stands before every step of a FakeEngine until the test lets steps through."""

    def __init__(self, engine: FakeEngine) -> None:
        self.inside = threading.Semaphore(0)
        self.permits = threading.Semaphore(0)
        runner = engine._runner
        self._run = runner.run
        runner.run = self.run  # type: ignore[method-assign]

    def run(self, chunks: Sequence[Chunk], cache: KVCache) -> list[Result]:
        self.inside.release()
        self.permits.acquire()
        return self._run(chunks, cache)

    def step(self) -> None:
        """Let one step through and wait until the next one has begun."""
        self.permits.release()
        self.inside.acquire()

    def open(self) -> None:
        self.permits.release(100_000)


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    with closing(FakeEngine(reply=lambda prompt, seed: "one two three " * 50)) as engine:
        yield engine


def ask(engine: EngineLoop, text: str = "Hello", tenant: str = "default", **params: Any) -> Request:
    params.setdefault("max_tokens", 20)
    return Request("r", engine.tokenizer.encode(text), SamplingParams(**params), tenant)


def replying(text: str, **options: Any) -> FakeEngine:
    return FakeEngine(reply=lambda prompt, seed: text, **options)


def test_the_text_of_the_deltas_is_the_text_of_the_tokens(engine: FakeEngine) -> None:
    async def read() -> list[Output]:
        return [output async for output in engine.submit(ask(engine))]

    outputs = asyncio.run(read())
    ids = [token for output in outputs for token in output.token_ids]
    assert "".join(output.text for output in outputs) == engine.tokenizer.decode(ids)
    assert [output.finish_reason for output in outputs[:-1]] == [None] * (len(outputs) - 1)
    assert (outputs[-1].finish_reason, outputs[-1].completion_tokens, len(ids)) == ("length", 20, 20)
    assert outputs[-1].prompt_tokens == len(ask(engine).prompt_ids)


def test_blocking_and_asyncio_readers_get_the_same(engine: FakeEngine) -> None:
    async def both() -> tuple[Output, Output]:
        stream = engine.submit(ask(engine))
        return await stream.whole(), await asyncio.to_thread(engine.submit(ask(engine)).result)

    one, other = asyncio.run(both())
    assert one == other


def test_a_delta_comes_before_the_end() -> None:
    with closing(replying("one two three four")) as engine:
        gate = Gate(engine)
        stream = engine.submit(ask(engine))
        gate.inside.acquire()
        gate.step()

        async def first() -> Output:
            async for output in stream:
                gate.open()
                return output
            raise AssertionError

        assert asyncio.run(first()).finish_reason is None


def test_it_ends_at_the_context() -> None:
    with closing(replying("long " * 500, context=64)) as engine:
        request = Request("r", [5] * 60, SamplingParams(max_tokens=1000))
        output = engine.submit(request).result()
        assert (output.finish_reason, output.completion_tokens) == ("length", 4)


def test_it_ends_at_an_end_token_and_its_text_is_not_sent() -> None:
    with closing(replying("short")) as engine:
        output = engine.submit(ask(engine)).result()
        assert (output.text, output.finish_reason) == ("short", "stop")
        assert output.token_ids[-1] == engine.tokenizer.end_id
        assert output.completion_tokens == len(output.token_ids)
        stop = engine.tokenizer.encode("short")[1]
        assert engine.submit(ask(engine, stop_ids=frozenset({stop}))).result().text == "s"
        endless = engine.submit(ask(engine, stop_ids=frozenset())).result()
        assert (endless.text, endless.finish_reason, endless.completion_tokens) == ("short", "length", 20)


def test_a_stop_string_over_several_tokens_is_never_sent() -> None:
    with closing(replying("Paris is a city.\n\nUser: and")) as engine:
        request = ask(engine, stop=("\n\nUser:",), max_tokens=100)
        assert len(engine.tokenizer.encode("\n\nUser:")) > 2

        async def texts() -> list[str]:
            return [output.text async for output in engine.submit(request)]

        assert "".join(asyncio.run(texts())) == "Paris is a city."
        output = engine.submit(request).result()
        assert (output.text, output.finish_reason) == ("Paris is a city.", "stop")


def test_half_a_stop_string_at_the_end_is_text() -> None:
    with closing(replying("a STO")) as engine:
        output = engine.submit(ask(engine, stop=("STOP",))).result()
        assert (output.text, output.finish_reason) == ("a STO", "stop")


def test_characters_of_several_tokens_are_sent_whole() -> None:
    text = "grün 東京 🦊 é"
    with closing(replying(text)) as engine:

        async def texts() -> list[str]:
            return [output.text async for output in engine.submit(ask(engine, max_tokens=100))]

        pieces = asyncio.run(texts())
        assert "".join(pieces) == text
        assert "�" not in "".join(pieces)
        fox = len(engine.tokenizer.encode("grün 東京 ")) + 2  # the fox takes four tokens
        assert engine.submit(ask(engine, max_tokens=fox)).result().text == "grün 東京 �"


def test_cancelling_frees_the_pages_at_the_next_step(engine: FakeEngine) -> None:
    gate = Gate(engine)
    stream = engine.submit(ask(engine, "word " * 200, max_tokens=100))
    gate.inside.acquire()
    assert engine.stats()["pages_used"] > 5
    stream.cancel()
    gate.open()
    output = stream.result()
    assert (output.finish_reason, output.error) == ("error", "The request was cancelled.")
    stats = engine.stats()
    assert (stats["pages_used"], stats["running"], stats["cancelled"]) == (0, 0, 1)


@pytest.mark.parametrize("leave", ["break", "drop", "task"])
def test_a_reader_that_goes_away_cancels(engine: FakeEngine, leave: str) -> None:
    gate = Gate(engine)

    async def read_one() -> None:
        stream = engine.submit(ask(engine, max_tokens=500))
        gate.permits.release(2)
        if leave == "drop":
            del stream
            gc.collect()
        elif leave == "break":
            async for _ in stream:
                break
        else:
            task = asyncio.create_task(stream.whole())
            await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(read_one())
    other = engine.submit(ask(engine, max_tokens=1))
    gate.open()
    other.result()
    stats = engine.stats()
    assert (stats["cancelled"], stats["running"], stats["pages_used"]) == (1, 0, 0)
    assert stats["completion_tokens"] < 10


def test_a_reader_that_read_to_the_end_cancels_nothing(engine: FakeEngine) -> None:
    stream = engine.submit(ask(engine))
    stream.result()
    stream.cancel()
    del stream
    engine.submit(ask(engine)).result()
    assert engine.stats()["cancelled"] == 0


def test_a_full_queue_is_an_error_at_once() -> None:
    with closing(replying("yes", running=1, queued_tokens=320)) as engine:
        gate = Gate(engine)
        streams = [engine.submit(ask(engine, max_tokens=2))]
        gate.inside.acquire()  # the first one is running, the queue is empty
        streams += [engine.submit(ask(engine)) for _ in range(10)]
        with pytest.raises(LimitError) as caught:
            engine.submit(ask(engine))
        assert caught.value.retry_after >= 1
        gate.open()
        assert [stream.result().finish_reason for stream in streams[1:]] == ["stop"] * 10
        engine.submit(ask(engine)).result()


def test_a_prompt_that_is_too_long_is_refused(engine: FakeEngine) -> None:
    with pytest.raises(InputError) as caught:
        engine.submit(Request("r", [5] * engine.context, SamplingParams(max_tokens=1)))
    assert caught.value.param == "prompt"
    assert str(engine.context - 1) in caught.value.message


def run_with_fault(fault: Callable[[Chunk], bool]) -> tuple[EngineLoop, list[Output]]:
    """Four requests together, of which the runner raises for some."""

    class Faulty(FakeRunner):
        def run(self, chunks: Sequence[Chunk], cache: KVCache) -> list[Result]:
            for chunk in chunks:
                if fault(chunk):
                    raise RuntimeError("the bias is broken")
            return super().run(chunks, cache)

    helper = FakeEngine()
    helper.close()
    runner = Faulty(helper.tokenizer, lambda prompt, seed: f"I was asked: {prompt}", 0.0)
    engine = EngineLoop("faulty", runner, Limits(512, 64), helper.tokenizer, helper.stop_ids)
    with closing(engine):
        requests = [ask(engine, f"question {number}", max_tokens=60) for number in range(4)]
        return engine, [stream.result() for stream in [engine.submit(request) for request in requests]]


def test_a_request_that_fails_fails_alone(caplog: pytest.LogCaptureFixture) -> None:
    engine, outputs = run_with_fault(
        lambda chunk: chunk.sequence.number == 2 and chunk.sequence.completion_tokens == 3
    )
    assert [output.finish_reason for output in outputs] == ["stop", "stop", "error", "stop"]
    assert outputs[2].error == "The request failed: RuntimeError: the bias is broken"
    assert (outputs[2].completion_tokens, outputs[3].text) == (3, "I was asked: question 3")
    assert engine.stats()["pages_used"] == 0
    assert "request r failed" in caplog.text


def test_a_fault_of_one_moment_costs_nothing() -> None:
    faults = iter([True])
    _, outputs = run_with_fault(lambda chunk: chunk.sequence.completion_tokens == 2 and next(faults, False))
    assert [output.finish_reason for output in outputs] == ["stop"] * 4
    assert [output.text for output in outputs] == [f"I was asked: question {n}" for n in range(4)]


def test_text_that_fails_ends_its_request_only(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = engine.tokenizer.encode("one two three ")[3]
    token_bytes = Tokenizer.token_bytes

    def broken(self: Tokenizer, id: int) -> bytes:
        if id == bad:
            raise InputError("no such token")
        return token_bytes(self, id)

    monkeypatch.setattr(Tokenizer, "token_bytes", broken)
    output = engine.submit(ask(engine, max_tokens=100)).result()
    assert (output.finish_reason, output.error) == ("error", "The request failed: no such token")
    assert engine.submit(ask(engine, max_tokens=1)).result().finish_reason == "length"


def test_scores_come_beside_running_requests(engine: FakeEngine) -> None:
    stream = engine.submit(ask(engine, max_tokens=200))
    scores = engine.score([5, 6, 7])
    assert len(scores) == 2
    assert all(score < 0 for score in scores)
    assert scores == engine.score([5, 6, 7])
    stream.result()
    with pytest.raises(InputError):
        engine.score([5])


def test_close_ends_what_runs_and_refuses_what_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "DRAIN_SECONDS", 0.1)
    engine = FakeEngine(reply=lambda prompt, seed: "on and on " * 1000, seconds_per_token=0.02)
    streams = [engine.submit(ask(engine, max_tokens=2000)) for _ in range(3)]
    engine.close()
    outputs = [stream.result() for stream in streams]
    assert {output.finish_reason for output in outputs} == {"error"}
    assert all("closed" in str(output.error) and output.completion_tokens > 0 for output in outputs)
    assert not engine._thread.is_alive()
    with pytest.raises(UnavailableError):
        engine.submit(ask(engine))
    with pytest.raises(UnavailableError):
        engine.score([5, 6])
    engine.close()


def test_close_lets_short_requests_finish() -> None:
    engine = replying("a few words more", seconds_per_token=0.005)
    stream = engine.submit(ask(engine))
    engine.close()
    assert stream.result().finish_reason == "stop"


def test_a_step_that_hangs_does_not_hold_up_closing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert loop.DRAIN_SECONDS + loop.JOIN_SECONDS < 2
    monkeypatch.setattr(loop, "DRAIN_SECONDS", 0.1)
    monkeypatch.setattr(loop, "JOIN_SECONDS", 0.1)
    engine = replying("never")
    gate = Gate(engine)
    stream = engine.submit(ask(engine))
    engine.close()
    assert stream.result().finish_reason == "error"
    gate.open()
    engine._thread.join(5)
    assert not engine._thread.is_alive()


def test_wrong_books_are_reported_and_replaced(
    engine: FakeEngine, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lapis.inference.loop.CALM_SECONDS", 0.05)
    engine.submit(ask(engine)).result()
    engine._scheduler.cache._owners[3] = 1
    assert engine.submit(ask(engine)).result().finish_reason == "length"
    while engine.stats()["cache_faults"] == 0:  # the suite's time limit bounds it
        time.sleep(0.01)
    engine.close()
    assert "books are wrong" in caplog.text


def test_stats_add_up(engine: FakeEngine) -> None:
    for _ in range(2):
        engine.submit(ask(engine, "word " * 40)).result()
    stats = engine.stats()
    assert stats["completion_tokens"] == 40
    prompt = len(ask(engine, "word " * 40).prompt_ids)
    assert stats["prompt_tokens"] == 2 * prompt
    assert stats["cached_tokens"] == (prompt - 1) // PAGE * PAGE > 0
    assert (stats["finished"], stats["failed"], stats["running"], stats["waiting"]) == (2, 0, 0, 0)


def test_the_prompt_of_a_completion_starts_as_the_model_wants(engine: FakeEngine) -> None:
    assert prompt_ids(engine, "Hi") == [engine.tokenizer.end_id, *engine.tokenizer.encode("Hi")]


def test_an_adapter_answers_under_its_name_and_shares_no_pages_with_others(
    engine: FakeEngine, tmp_path: Path
) -> None:
    engine.add_adapter("pirate", tmp_path)
    request = ask(engine, "word " * 40, max_tokens=20)
    plain, adapted = (
        engine.submit(request).result(),
        engine.submit(replace(request, adapter="pirate")).result(),
    )
    assert adapted.text.startswith("pirate: one two")
    assert (plain.cached_tokens, adapted.cached_tokens) == (0, 0)
    assert engine.submit(replace(request, adapter="pirate")).result().cached_tokens > 0
    gate = Gate(engine)
    under_way = engine.submit(replace(request, adapter="pirate"))
    gate.inside.acquire()
    engine.remove_adapter("pirate")
    gate.open()
    assert under_way.result().text == adapted.text
    with pytest.raises(NotFoundError, match="pirate"):
        engine.submit(replace(request, adapter="pirate"))


def test_texts_are_embedded_beside_running_requests(engine: FakeEngine) -> None:
    stream = engine.submit(ask(engine, max_tokens=200))
    one, other, same = engine.embed([[5, 6, 7], [5, 6, 8], [5, 6, 7]])
    assert one == same != other
    assert sum(number * number for number in one) == pytest.approx(1)
    stream.result()
    assert engine.stats()["pages_used"] == 0


def test_many_texts_to_embed_that_find_the_queue_full_leave_nothing_behind() -> None:
    with closing(replying("yes", running=1, queued_tokens=320, step_tokens=16)) as engine:
        with pytest.raises(LimitError):
            engine.embed([[5] * 200] * 20)
        engine.submit(ask(engine)).result()
        assert engine.stats()["waiting"] == engine.stats()["pages_used"] == 0


def test_the_prompts_logprobs_come_once_even_after_a_preemption() -> None:
    with closing(replying("word " * 50, pages=4, context=128, step_tokens=8, running=2)) as engine:
        plain = engine.submit(ask(engine, "one two three", prompt_logprobs=1, max_tokens=1)).result()
        streams = [
            engine.submit(ask(engine, "one two three", prompt_logprobs=1, max_tokens=60)) for _ in range(4)
        ]
        outputs = [stream.result() for stream in streams]
        assert engine.stats()["preemptions"] > 0
    assert len(plain.prompt_logprobs) == plain.prompt_tokens - 1
    assert {output.prompt_logprobs for output in outputs} == {plain.prompt_logprobs}
    assert {output.completion_tokens for output in outputs} == {60}


def test_guessing_ahead_changes_no_text_and_no_count() -> None:
    reply = "one and two and three, but not four. " * 3 + "So one and two and three, and it ends"
    texts = []
    for drafts in (0, 5):
        with closing(replying(reply, drafts=drafts)) as engine:
            cases: list[dict[str, Any]] = [{}, {"stop": ("r. So",)}, {"max_tokens": 50}, {"logprobs": 1}]
            outputs = [engine.submit(ask(engine, **{"max_tokens": 150, **case})).result() for case in cases]
            stats = engine.stats()
            assert stats["completion_tokens"] == sum(output.completion_tokens for output in outputs)
            assert stats["pages_used"] == 0
            texts.append((outputs, stats["steps"]))
    assert texts[0][0] == texts[1][0]
    assert texts[1][1] < texts[0][1]
