"""Models make room for each other within a budget of memory; what a real one takes is known before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from lapis.errors import ConfigError
from lapis.gateway.memory import MemoryBudget
from lapis.home import Home
from lapis.inference import footprint
from lapis.inference.engine import LocalEngine
from lapis.inference.footprint import Dtype, cache_pages, engine_bytes, page_bytes
from lapis.inference.kv_cache import PAGE
from lapis.inference.request import Request, SamplingParams
from lapis.inference.runner import ModelRunner
from lapis.model.manifest import Source
from lapis.model.weights import DTYPES, read_model, write_model
from lapis.server import RunningServer
from tests import small_models
from tests.served import fake_server

NAMES = ("a", "b", "c")
SIZES = {"a": 4, "b": 4, "c": 9}


@contextmanager
def served(home: Home, budget: int, pace: float = 0.0) -> Iterator[RunningServer]:
    """Three models, none loaded yet, in a budget."""
    memory = MemoryBudget(budget, lambda servable: SIZES[servable.name])
    with fake_server(home, *NAMES, load=False, memory=memory, seconds_per_token=pace) as server:
        yield server


def ask(server: RunningServer, name: str, tokens: int = 2) -> httpx.Response:
    body = {"model": name, "prompt": "x", "max_tokens": tokens, "ignore_eos": True}
    return httpx.post(f"{server.url}/completions", json=body)


def loaded(server: RunningServer) -> set[str]:
    models = httpx.get(f"{server.url}/models").json()["data"]
    return {model["id"] for model in models if model["loaded"]}


def test_the_model_idle_for_longest_makes_room(home: Home) -> None:
    with served(home, budget=9) as server:
        for name in ("a", "b", "a"):
            assert ask(server, name).status_code == 200
        assert loaded(server) == {"a", "b"}
        assert ask(server, "c").status_code == 200
        assert loaded(server) == {"c"}
        assert ask(server, "b").status_code == 200
        assert loaded(server) == {"b"}
        for name in ("a", "b"):
            assert ask(server, name).status_code == 200
        assert loaded(server) == {"a", "b"}


def test_a_model_in_use_stays_and_others_are_told_to_come_back(home: Home) -> None:
    with served(home, budget=9, pace=0.01) as server:
        body = {"model": "a", "prompt": "x", "max_tokens": 500, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{server.url}/completions", json=body) as stream:
            lines = stream.iter_lines()
            next(lines)
            refused = ask(server, "c")
            assert refused.status_code == 503
            assert int(refused.headers["retry-after"]) >= 1
            assert "in use" in refused.json()["error"]["message"]
            assert ask(server, "b").status_code == 200
            assert loaded(server) == {"a", "b"}
        while ask(server, "c").status_code == 503:  # the one that hung up is being cancelled
            pass
        assert loaded(server) == {"c"}


def test_what_never_fits_is_said(home: Home) -> None:
    with served(home, budget=8) as server:
        refused = ask(server, "c")
        assert refused.status_code == 503
        assert "--memory" in refused.json()["error"]["message"]
        assert "retry-after" not in refused.headers
    memory = MemoryBudget(7, lambda servable: SIZES[servable.name])
    with pytest.raises(ConfigError, match="a, b need"), fake_server(home, "a", "b", memory=memory):
        pass


@pytest.mark.parametrize("weights", ["bf16", "fp32", "int8", "int4"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "olmoe", "mistral"])
def test_what_an_engine_takes_is_known_before(tmp_path: Path, name: str, weights: str) -> None:
    shape = replace(small_models.families()[name], width=256, head_size=64, vocab_size=4096)
    write_model(
        tmp_path / "m",
        shape,
        small_models.random_state(shape),
        small_models.tokenizer(),
        source=Source("run", "t"),
    )
    found = read_model(tmp_path / "m", dtype=DTYPES["fp32" if weights == "fp32" else "bf16"])
    if weights in ("int8", "int4"):
        found.model.quantize(weights)  # type: ignore[arg-type]
    again = (
        4096 * 256 * found.model.dtype.itemsize if shape.tied and found.model._quantized_head is None else 0
    )
    held = found.model.weight_bytes + again
    runner = ModelRunner(found)
    stored: Dtype = "fp32" if weights == "fp32" else "bf16"
    assert runner.pages == cache_pages(shape, stored)
    cache = sum(part.nbytes for layer in runner._caches for part in layer[:2])
    assert cache == page_bytes(shape, stored) * (runner.pages + 1)
    told = engine_bytes(shape, weights) - page_bytes(shape, stored) * runner.pages
    assert abs(told - held) < 0.02 * held


@pytest.mark.parametrize(("cache_bytes", "bounded"), [(None, True), (8 << 20, False)])
def test_the_memory_of_prefixes_does_not_grow_with_every_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache_bytes: int | None, bounded: bool
) -> None:
    monkeypatch.setattr(footprint, "LEAST_KEPT_BYTES", 0)
    shape = small_models.config()
    state, source = small_models.random_state(shape), Source("run", "t")
    write_model(tmp_path / "m", shape, state, small_models.tokenizer(), source=source)
    kept = footprint.kept_pages(shape, "bf16")
    prompts = [(first, *[7] * PAGE) for first in range(kept + 5)]
    with closing(LocalEngine(read_model(tmp_path / "m"), "m", cache_bytes=cache_bytes)) as engine:
        outputs = [
            engine.submit(Request("r", prompt, SamplingParams(max_tokens=1))).result()
            for prompt in [*prompts, prompts[-1]]
        ]
    assert engine.stats()["pages"] > len(prompts) > kept > 2
    assert (engine.stats()["pages_touched"] <= kept) is bounded
    assert outputs[-1].cached_tokens == PAGE
