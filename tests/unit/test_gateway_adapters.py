"""Adapters under names of their own: pulled beside their base, answered by its one engine."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from lapis.cli.main import lapis
from lapis.db import open_database
from lapis.errors import ConflictError, InputError, NotFoundError
from lapis.gateway.counters import Counters
from lapis.gateway.embedding import embed
from lapis.gateway.generation import Ask, Generation, Prompt
from lapis.gateway.metering import Meter
from lapis.gateway.router import Router
from lapis.home import Home
from lapis.inference.fake import FakeEngine
from lapis.inference.request import SamplingParams
from lapis.model import peft
from lapis.model.adapters import Adapter, write_adapter
from lapis.model.manifest import Source
from lapis.model.pull import pull
from lapis.model.store import ModelStore
from lapis.model.weights import write_model
from lapis.release.registry import Registry, Servable
from lapis.tenants.keys import LOCAL
from lapis.tenants.usage import UsageLedger
from tests import small_models
from tests.served import fake_server

SHAPE = small_models.config(layers=1, width=32, heads=1, kv_heads=1, ffn=32)


def peft_folder(folder: Path, base: object = "someone/Tiny", **facts: object) -> Path:
    """An adapter of the base that says where it comes from."""
    pair = torch.zeros(2, 32).bfloat16(), torch.ones(32, 2).bfloat16()
    write_adapter(folder, SHAPE, Adapter(({"out": pair},)), "")
    config = json.loads((folder / peft.CONFIG).read_text())
    (folder / peft.CONFIG).write_text(json.dumps({**config, "base_model_name_or_path": base, **facts}))
    return folder


@pytest.fixture
def registry(home: Home, tmp_path: Path) -> Iterator[Registry]:
    """An installation with a base and two adapters of it."""
    state = small_models.random_state(SHAPE)
    write_model(home.models / "tiny", SHAPE, state, small_models.tokenizer(), source=Source("run", "test"))
    for name in ("pirate", "poet"):
        pull(str(peft_folder(tmp_path / name, note=name)), home)
    db = open_database(home.database_url)
    yield Registry(home, db)
    db.dispose()


def test_an_adapter_is_pulled_beside_its_base(home: Home, tmp_path: Path, registry: Registry) -> None:
    model = ModelStore(home).get("pirate")
    assert (model.base, model.parameters) == ("tiny", 128)
    assert pull(str(tmp_path / "pirate"), home).digest == model.digest
    told = json.loads(CliRunner().invoke(lapis, ["models", "show", "pirate", "--json"]).output)
    assert (told["base"], told["config"]) == ("tiny", {})
    with pytest.raises(NotFoundError, match="other/Base") as caught:
        pull(str(peft_folder(tmp_path / "lost", "other/Base")), home)
    assert "lapis pull hf:other/Base --name base" in str(caught.value.hint)
    with pytest.raises(InputError, match="does not name its base"):
        pull(str(peft_folder(tmp_path / "nameless", None)), home)
    with pytest.raises(InputError, match="is an adapter itself"):
        pull(str(peft_folder(tmp_path / "second", "x/pirate")), home)
    assert sorted(path.name for path in home.models.glob("[!.]*")) == ["pirate", "poet", "tiny"]
    with pytest.raises((InputError, ConflictError), match="adapter"):
        registry.create("shanty", model.folder, None, None, "me")


def test_a_bases_engine_answers_for_all_its_adapters(registry: Registry) -> None:
    items = [*registry.servables(), Servable("orphan", Path("nowhere"), "0" * 64, "pulled", "mit", "gone")]
    digests = {item.name: item.digest for item in items}
    engines: list[FakeEngine] = []

    def build(item: Servable) -> FakeEngine:
        engines.append(FakeEngine(item.name, reply=lambda prompt, seed: "plain"))
        return engines[-1]

    router, meter, counters = Router(lambda: items, build), Meter(UsageLedger(registry.db)), Counters()

    async def answer(name: str) -> str:
        ask = Ask("id", LOCAL, name, [Prompt((5, 6), SamplingParams(max_tokens=400))])
        generation = await Generation.start(ask, router.find(name), meter, counters)
        try:
            assert generation.digest == digests[name]
            return (await generation.whole())[0].text
        finally:
            generation.close()

    texts = {name: asyncio.run(answer(name)) for name in ("pirate", "tiny", "poet")}
    assert texts["tiny"] == "plain"
    assert all(texts[name] == f"{digests[name]}: plain" for name in ("pirate", "poet"))
    vectors, *_ = asyncio.run(
        embed("id", LOCAL, "pirate", [(5, 6)], "mean", router.find("pirate"), meter, counters)
    )
    assert len(vectors) == 1
    assert [item.name for item, _ in router.models()] == ["pirate", "poet", "tiny"]
    with pytest.raises(NotFoundError):
        router.find("orphan")
    items = [item for item in items if item.name != "poet"]
    router._refresh(at_once=True)
    assert [engine.adapters for engine in engines] == [[digests["pirate"]]]
    router.close()


def test_a_model_of_some_projects_is_not_there_for_the_others(registry: Registry) -> None:
    def among(item: Servable) -> Servable:
        return replace(item, projects=frozenset({"proj_a"})) if item.name == "poet" else item

    items = [among(item) for item in registry.servables()]
    router = Router(lambda: items, lambda item: FakeEngine(item.name))
    mine, other = replace(LOCAL, project_id="proj_a"), replace(LOCAL, project_id="proj_b")
    assert router.lookup("poet", mine)[0].name == "poet"
    assert [item.name for item, _ in router.models(mine)] == ["pirate", "poet", "tiny"]
    for viewer in (other, None):
        assert [item.name for item, _ in router.models(viewer)] == ["pirate", "tiny"]
        with pytest.raises(NotFoundError) as caught:
            router.lookup("poet", viewer)
        assert caught.value.message == "There is no model 'poet' here. Known: pirate, tiny."
    deployment = router.find("poet", mine)
    assert [deployment.public_name(name) for name in ("poet", "pirate", "tiny")] == ["tiny", "pirate", "tiny"]
    items = [item for item in items if item.name != "poet"]
    router._refresh(at_once=True)
    with pytest.raises(NotFoundError, match="served no more"):  # and not answered by its base
        asyncio.run(deployment.engine_for("poet"))
    router.close()


def test_an_adapter_that_is_served_brings_its_base_along(home: Home, registry: Registry) -> None:
    with fake_server(home, "pirate") as server:
        listed = {item.name: item.base for item, _ in server.services.router.models()}
    assert listed == {"pirate": "tiny", "tiny": None}
