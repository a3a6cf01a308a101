"""A model trained in fp32: its folder, its training forward and what an engine serves agree bit for bit."""

from __future__ import annotations

import json
import random
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lapis.errors import ConfigError, UnavailableError
from lapis.inference.engine import LocalEngine
from lapis.kernels.batch import packed
from lapis.kernels.stock import StockOps
from lapis.model.adapters import Adapter, read_adapter, write_adapter
from lapis.model.families import Decoder, build
from lapis.model.manifest import Source
from lapis.model.weights import read_model, write_model
from tests import small_models
from tests.integration.test_train_is_serve import ENGINES, FAMILIES, SHORT, differing

FP32 = torch.float32


def trained_model(name: str) -> Decoder:
    """A few steps of gradient descent in fp32."""
    torch.manual_seed(0)
    model = build(FAMILIES[name], dtype=FP32)
    model.load_state_dict(
        {key: value.float() for key, value in small_models.random_state(FAMILIES[name]).items()}
    )
    ids_T = torch.randint(0, 300, (60,))
    for _ in range(3):
        x_TH = model.hidden(ids_T, packed([23, 37]))
        loss = model.ops.linear_cross_entropy(x_TH, model.head_weight, ids_T.roll(-1)) / len(ids_T)
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter -= 0.01 * parameter.grad
                parameter.grad = None
    return model


def stored(model: Decoder, folder: Path) -> Path:
    tokenizer = small_models.tokenizer()
    source = Source("run", "test")
    write_model(folder, model.config, model.state_dict(), tokenizer, source=source, dtype=FP32)
    return folder


@pytest.mark.parametrize("name", ["llama", "gpt2", "olmoe"])
def test_no_logprob_differs(tmp_path: Path, name: str) -> None:
    model = trained_model(name)
    if not model.ops.bit_exact:
        pytest.skip(f"only compiled kernels promise bits; these are {model.ops.name}")
    loaded = read_model(stored(model, tmp_path / "model"))
    assert loaded.model.dtype is FP32
    assert all(
        torch.equal(value, loaded.model.state_dict()[key]) for key, value in model.state_dict().items()
    )
    wrong, count = differing(loaded, model, SHORT, ENGINES[1], 7)
    assert count > 200
    assert wrong == 0, f"{wrong} of {count} logprobs differ"


def test_with_plain_torch_logprobs_differ(tmp_path: Path) -> None:
    loaded = read_model(stored(trained_model("llama"), tmp_path / "model"), StockOps(dtype=FP32))
    wrong, count = differing(loaded, loaded.model, SHORT, ENGINES[1], 7)
    assert wrong > count // 10


def test_an_engine_computes_in_the_type_of_the_folder_unless_asked(tmp_path: Path) -> None:
    model = trained_model("llama")
    folder = stored(model, tmp_path / "model")
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "float32"
    with closing(LocalEngine.load(folder, "tiny")) as engine:
        facts, scores = engine.stats(), engine.score(list(range(40)))
    assert facts["weights"] == "fp32"
    assert facts["bit_exact"] == model.ops.bit_exact
    assert facts["replay"] == model.ops.bit_exact
    with closing(LocalEngine.load(folder, "tiny", weights="bf16")) as engine:
        assert engine.stats()["weights"] == "bf16"
        assert not engine.bit_exact  # the trained weights are rounded
        assert engine.score(list(range(40))) == pytest.approx(scores, abs=0.2)
    with closing(LocalEngine.load(folder, "tiny", weights="int8")) as engine:
        assert engine.stats()["weights"] == "int8"
    with pytest.raises(ConfigError, match="loaded in fp32, not in int8"):
        LocalEngine(read_model(folder), "tiny", weights="int8")


def test_a_bf16_folder_can_be_computed_in_fp32(tmp_path: Path) -> None:
    shape = FAMILIES["llama"]
    write_model(
        tmp_path / "m",
        shape,
        small_models.random_state(shape),
        small_models.tokenizer(),
        source=Source("run", "test"),
    )
    with closing(LocalEngine.load(tmp_path / "m", "tiny", weights="fp32")) as engine:
        assert engine.stats()["weights"] == "fp32"
        assert not engine.bit_exact  # training rounded to bf16 after each operation
    assert read_model(tmp_path / "m").model.dtype is torch.bfloat16


def test_int8_keys_and_values_are_refused(tmp_path: Path) -> None:
    folder = stored(trained_model("llama"), tmp_path / "model")
    if not read_model(folder).model.ops.bit_exact:
        pytest.skip("plain torch takes them")
    with pytest.raises(UnavailableError, match="fp32"):
        LocalEngine.load(folder, "tiny", cache_dtype="int8")


def test_adapters_of_an_fp32_model(tmp_path: Path) -> None:
    model = trained_model("llama")
    config, numbers = model.config, random.Random(0)
    query = config.heads * config.head_size
    layers = tuple(
        {"out": (torch.randn(4, query) * 0.1, torch.randn(config.width, 4) * numbers.random())}
        for _ in range(config.layers)
    )
    (tmp_path / "adapter").mkdir()
    write_adapter(tmp_path / "adapter", config, Adapter(layers), "tiny")
    pair = read_adapter(tmp_path / "adapter", config, FP32).layers[0]["out"]
    assert pair[0].dtype is pair[1].dtype is FP32
    with closing(LocalEngine.load(stored(model, tmp_path / "model"), "tiny")) as engine:
        engine.add_adapter("terse", tmp_path / "adapter")
        numbers_seen = [
            replace(request, adapter=name)
            for request in SHORT.requests(random.Random(3))[:2]
            for name in (None, "terse")
        ]
        streams = [
            engine.submit(replace(request, id=f"{index}")) for index, request in enumerate(numbers_seen)
        ]
        texts = [stream.result().token_ids for stream in streams]
    assert texts[0] != texts[1]
