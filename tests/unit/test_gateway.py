"""The gateway without HTTP: names to engines, one load for all, tokens settled however a request ends."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from lapis.db import open_database
from lapis.errors import AuthError, InputError, IntegrityError, LapisError, LimitError, NotFoundError
from lapis.gateway.admission import Admission
from lapis.gateway.counters import Counters
from lapis.gateway.deployment import Deployment
from lapis.gateway.generation import Ask, Generation, Prompt
from lapis.gateway.metering import Meter
from lapis.gateway.prompt import Conversation, answer_tokens, chat_prompt
from lapis.gateway.router import Router
from lapis.home import Home
from lapis.inference.fake import FakeEngine
from lapis.inference.request import SamplingParams
from lapis.model.manifest import read_manifest
from lapis.release.registry import Servable
from lapis.tenants.keys import LOCAL, ApiKeys
from lapis.tenants.quota import Quota
from lapis.tenants.tenant import Tenants
from lapis.tenants.usage import UsageLedger
from tests.served import model_folder


def servable(folder: Path, name: str) -> Servable:
    if not folder.exists():
        model_folder(folder, folder.name)
    return Servable(name, folder, read_manifest(folder).digest, "pulled", "Apache-2.0")


@dataclass
class Built:
    """Counts what is built, and builds fakes."""

    names: list[str] = field(default_factory=list)
    engines: list[FakeEngine] = field(default_factory=list)

    def __call__(self, item: Servable) -> FakeEngine:
        self.names.append(item.name)
        self.engines.append(
            FakeEngine(item.name, seconds_per_token=0.002, reply=lambda prompt, seed: "word " * 900)
        )
        return self.engines[-1]

    def close(self) -> None:
        for engine in self.engines:
            engine.close()


@pytest.fixture
def built() -> Iterator[Built]:
    made = Built()
    yield made
    made.close()


@pytest.fixture
def ledger(home: Home) -> Iterator[UsageLedger]:
    db = open_database(home.database_url)
    yield UsageLedger(db)
    db.dispose()


def test_many_who_come_at_once_share_one_load(tmp_path: Path, built: Built) -> None:
    deployment = Deployment(servable(tmp_path / "m", "m"), built)

    async def all_at_once() -> set[int]:
        return {id(engine) for engine in await asyncio.gather(*[deployment.engine() for _ in range(20)])}

    assert len(asyncio.run(all_at_once())) == 1
    assert built.names == ["m"]


def test_a_client_that_leaves_during_the_load_does_not_stop_it_for_others(tmp_path: Path) -> None:
    begun, may_end = threading.Event(), threading.Event()

    def build(item: Servable) -> FakeEngine:
        begun.set()
        may_end.wait(10)
        return FakeEngine(item.name)

    deployment = Deployment(servable(tmp_path / "m", "m"), build)

    async def leave() -> None:
        first = asyncio.create_task(deployment.engine())
        second = asyncio.create_task(deployment.engine())
        await asyncio.to_thread(begun.wait, 10)
        first.cancel()
        may_end.set()
        assert (await second).name == "m"

    asyncio.run(leave())
    deployment.close()


def test_weights_that_are_not_the_registered_ones_are_not_loaded(tmp_path: Path, built: Built) -> None:
    wrong = replace(servable(tmp_path / "m", "m"), digest="0" * 64)
    deployment = Deployment(wrong, built)
    for _ in range(2):
        with pytest.raises(IntegrityError, match="'m'"):
            deployment.load()
    assert built.names == []


def test_two_names_of_the_same_weights_share_an_engine(tmp_path: Path, built: Built) -> None:
    one = servable(tmp_path / "m", "poems")
    router = Router(lambda: [one, replace(one, name="poems:1")], built)
    assert router.find("poems") is router.find("poems:1")
    assert [item.name for item, _ in router.models()] == ["poems"]


def test_a_wrong_name_is_answered_with_the_nearest(tmp_path: Path, built: Built) -> None:
    router = Router(lambda: [servable(tmp_path / "m", "poems")], built)
    with pytest.raises(NotFoundError, match="Did you mean 'poems'") as caught:
        router.find("peoms")
    assert caught.value.param == "model"


def test_the_catalog_is_followed_and_what_left_it_is_ended(
    tmp_path: Path, built: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lapis.gateway.router.FRESH", 0.0)
    catalog = [servable(tmp_path / "a", "a")]
    router = Router(lambda: catalog, built)
    deployment = router.find("a")
    engine = deployment.load()
    catalog[:] = [servable(tmp_path / "b", "b")]
    deployment.active = 1
    with pytest.raises(NotFoundError):
        router.find("a")
    assert deployment.loaded is engine  # it still answers somebody
    deployment.active = 0
    assert router.find("b").servable.name == "b"
    assert deployment.loaded is None


def test_a_model_that_leaves_the_catalog_while_it_loads_stops_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lapis.gateway.router.FRESH", 0.0)
    begun, may_end, waited = threading.Event(), threading.Event(), []

    def build(item: Servable) -> FakeEngine:
        begun.set()
        waited.append(may_end.wait(2))
        return FakeEngine(item.name)

    catalog = [servable(tmp_path / "a", "a")]
    router = Router(lambda: catalog, build)
    deployment = router.find("a")

    async def leave() -> None:
        waiting = asyncio.create_task(deployment.engine())
        await asyncio.to_thread(begun.wait, 10)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        catalog.clear()
        assert router.models() == []
        may_end.set()
        while deployment.loading:
            await asyncio.sleep(0.001)
        assert waited == [True]
        assert router.models() == []
        assert deployment.loaded is None

    asyncio.run(leave())


def test_the_door_knows_keys_and_lets_in_the_local_user_only_where_none_is_needed(
    ledger: UsageLedger,
) -> None:
    keys = ApiKeys(ledger.db)
    made, text = keys.create("k", "test")
    strict, open_door = Admission(keys, keys_required=True), Admission(keys, keys_required=False)
    assert strict.identify(text).key_id == made.id
    assert open_door.identify(text).key_id == made.id
    assert open_door.identify(None) == open_door.identify("unused") == LOCAL
    for wrong in (None, "", "unused", text + "x"):
        with pytest.raises(AuthError):
            strict.identify(wrong)
    with pytest.raises(AuthError):
        open_door.identify(text + "x")


@dataclass
class Bench:
    """A deployment and a meter to generate with."""

    deployment: Deployment
    ledger: UsageLedger
    counters: Counters = field(default_factory=Counters)

    def __post_init__(self) -> None:
        self.meter = Meter(self.ledger)

    async def start(self, prompt: tuple[int, ...] = (5, 6, 7), choices: int = 1, **params: int) -> Generation:
        ask = Ask("x", LOCAL, "m", [Prompt(prompt, SamplingParams(**{"max_tokens": 4, **params}))], choices)
        return await Generation.start(ask, self.deployment, self.meter, self.counters)


@pytest.fixture
def bench(tmp_path: Path, built: Built, ledger: UsageLedger) -> Iterator[Bench]:
    made = Bench(Deployment(servable(tmp_path / "m", "m"), built), ledger)
    yield made
    made.meter.close()
    balance = ledger.balance()
    assert balance.balanced
    assert balance.open == 0
    assert made.deployment.active == 0


def test_a_whole_answer_is_settled_with_what_it_used(bench: Bench) -> None:
    async def run() -> None:
        generation = await bench.start(choices=2)
        outputs = await generation.whole()
        generation.close()
        generation.close()
        assert [output.completion_tokens for output in outputs] == [4, 4]

    asyncio.run(run())
    bench.meter.flush()
    used = bench.ledger.summary("model")[0].usage
    assert (used.prompt_tokens, used.completion_tokens) == (3, 8)
    assert bench.counters.completion_tokens["m"] == 8
    assert bench.counters.cancelled["m"] == 0


def test_a_broken_stream_is_settled_with_what_was_given_out(bench: Bench) -> None:
    async def run() -> int:
        generation = await bench.start(max_tokens=800)
        async for piece in generation.pieces():
            if piece.output.completion_tokens >= 5:
                break
        generation.close()
        return generation.usage.completion_tokens

    given = asyncio.run(run())
    bench.meter.flush()
    assert 5 <= bench.ledger.summary("model")[0].usage.completion_tokens == given < 800
    assert bench.counters.cancelled["m"] == 1


def test_what_the_model_cannot_run_reserves_nothing(bench: Bench) -> None:
    for prompt in ((), (999_999,), (1,) * 5000):
        with pytest.raises(InputError):
            asyncio.run(bench.start(prompt))
    assert bench.ledger.consumption("default").requests_minute == 0


def test_what_a_quota_refuses_costs_nothing(bench: Bench) -> None:
    Tenants(bench.ledger.db).set_quota("default", Quota(tokens_per_minute=10), "test")
    with pytest.raises(LimitError) as caught:
        asyncio.run(bench.start(max_tokens=8))
    assert 0 < caught.value.retry_after <= 60
    balance = bench.ledger.balance("default")
    assert (balance.entries, balance.open) == (0, 0)


def test_after_a_refusal_the_engine_waits_for_the_ledger(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    Tenants(bench.ledger.db).set_quota("default", Quota(tokens_per_minute=20), "test")
    engine = bench.deployment.load()
    asked = []
    submit = engine.submit
    monkeypatch.setattr(engine, "submit", lambda request: asked.append(request) or submit(request))  # type: ignore[func-returns-value]

    async def run() -> None:
        for expected in (1, 1, 1):  # the first refusal is noticed after the engine began, the others before
            with pytest.raises(LimitError):
                await bench.start(max_tokens=100)
            assert len(asked) == expected
        generation = await bench.start()
        assert len(await generation.whole()) == 1
        generation.close()
        with pytest.raises(LimitError):
            await bench.start(max_tokens=100)
        assert len(asked) == 3

    asyncio.run(run())
    while engine.stats()["running"] or engine.stats()["waiting"]:
        threading.Event().wait(0.005)
    assert engine.stats()["pages_used"] == 0
    bench.meter.flush()
    assert bench.ledger.summary("model")[0].usage.total_tokens == 7


def test_a_client_that_leaves_while_tokens_are_reserved_gets_them_back(bench: Bench) -> None:
    async def run() -> None:
        await bench.deployment.engine()
        task = asyncio.create_task(bench.start())
        await asyncio.sleep(0)  # it now waits for the ledger
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())


def test_a_full_queue_gives_back_what_was_reserved_for_all_choices(
    tmp_path: Path, ledger: UsageLedger
) -> None:
    deployment = Deployment(
        servable(tmp_path / "m", "m"),
        lambda item: FakeEngine(item.name, queued_tokens=8, running=1, seconds_per_token=0.01),
    )
    bench = Bench(deployment, ledger)
    with pytest.raises(LimitError):
        asyncio.run(bench.start(choices=30))
    bench.meter.close()
    deployment.close()
    assert ledger.balance().open == 0
    assert deployment.active == 0


def test_an_engine_that_ends_raises_and_settles(bench: Bench) -> None:
    async def run() -> None:
        generation = await bench.start(max_tokens=800)
        try:
            async for _ in generation.pieces():
                await asyncio.to_thread(bench.deployment.close)
        finally:
            generation.close()

    with pytest.raises(LapisError, match="ended the request"):
        asyncio.run(run())


def test_the_room_for_an_answer_is_what_the_context_leaves(built: Built, tmp_path: Path) -> None:
    engine = built(servable(tmp_path / "m", "m"))
    assert answer_tokens(engine, [5] * 48, None) == 2000
    assert answer_tokens(engine, [5] * 48, 2000) == 2000
    with pytest.raises(InputError, match="leaves 2,000") as caught:
        answer_tokens(engine, [5] * 48, 2001, "max_completion_tokens")
    assert caught.value.param == "max_completion_tokens"


def test_a_model_without_a_template_does_not_chat(built: Built, tmp_path: Path) -> None:
    engine = built(servable(tmp_path / "m", "m"))
    engine.chat = None  # type: ignore[assignment]
    with pytest.raises(InputError, match="/v1/completions"):
        chat_prompt(engine, Conversation([{"role": "user", "content": "Hi"}]))


def test_counters_are_prometheus_text() -> None:
    counters = Counters()
    counters.request('/a"b\\', 200, 0.5)
    text = counters.prometheus({"m": {"running": 1, "kernels": "cpu", "bit_exact": True}})
    assert 'lapis_http_requests_total{route="/a\\"b\\\\",status="200"} 1' in text
    assert 'lapis_engine_running{model="m"} 1' in text
    assert "kernels" not in text
    names = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(names) == len(set(names))
