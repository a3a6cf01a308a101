"""Low-rank adapters over one real, tiny, random model: many in one batch, each as if it were alone."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lapis.errors import InputError
from lapis.inference.engine import LocalEngine
from lapis.inference.request import Output, Request, SamplingParams
from lapis.kernels.stock import StockOps
from lapis.model.adapters import Adapter, write_adapter
from lapis.model.config import NAMED, ModelConfig
from lapis.model.families import Llama
from lapis.model.manifest import Source
from lapis.model.weights import LoadedModel, read_model, write_model
from lapis.tokenizer.bpe import Tokenizer

GREEDY = SamplingParams(max_tokens=30, temperature=0, logprobs=0, stop_ids=frozenset())
PROMPT = tuple(range(20, 90))
NAMES = ("one", None, "two", "one")


def random_adapter(config: ModelConfig, seed: int) -> Adapter:
    generator = torch.Generator().manual_seed(seed)

    def weight(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).bfloat16()

    pair = weight(4, config.heads * config.head_size), weight(config.width, 4)
    return Adapter(tuple({"out": pair} for _ in range(config.layers)))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and two adapters of it."""
    config = NAMED["tiny"]
    model = Llama(config, StockOps())
    model.init_weights(1)
    tokenizer = Tokenizer.train([" ".join(str(number) for number in range(1000))], vocab_size=400)
    place = tmp_path_factory.mktemp("adapters")
    write_model(
        place / "tiny", config, model.state_dict(), tokenizer, source=Source("run", "test"), add_bos=True
    )
    for seed, name in enumerate(("one", "two")):
        write_adapter(place / name, config, random_adapter(config, seed), "tiny")
    return place


@pytest.fixture(scope="module")
def loaded(folders: Path) -> LoadedModel:
    found = read_model(folders / "tiny")
    if not found.model.ops.bit_exact:
        pytest.skip(f"only compiled kernels promise bits; these are {found.model.ops.name}")
    return found


def engine_of(loaded: LoadedModel, folders: Path, order: tuple[str, ...], **options: int) -> LocalEngine:
    engine = LocalEngine(loaded, "tiny", **options)  # type: ignore[arg-type]
    for name in order:
        engine.add_adapter(name, folders / name)
    return engine


def values(output: Output) -> tuple[tuple[int, ...], list[float]]:
    return output.token_ids, [logprob.logprob for logprob in output.logprobs]


def test_adapters_of_one_base_answer_in_one_batch_as_each_does_alone(
    loaded: LoadedModel, folders: Path
) -> None:
    requests = [Request(str(n), PROMPT, GREEDY, adapter=name) for n, name in enumerate(NAMES)]
    with closing(engine_of(loaded, folders, ("one", "two"))) as engine:
        single = [engine.submit(request).result() for request in requests]
        together = [stream.result() for stream in [engine.submit(request) for request in requests]]
        assert [output.cached_tokens for output in single] == [0, 0, 0, 64]  # each adapter has its own pages
    with closing(engine_of(loaded, folders, ("two", "one"), step_tokens=7, running=4)) as engine:
        chunked = [stream.result() for stream in [engine.submit(request) for request in requests]]
    assert [values(o) for o in single] == [values(o) for o in together] == [values(o) for o in chunked]
    assert len({tuple(values(output)[1]) for output in single[:3]}) == 3
    assert values(single[0]) == values(single[3])


def test_what_is_no_adapter_of_the_model_is_refused(
    loaded: LoadedModel, folders: Path, tmp_path: Path
) -> None:
    write_adapter(tmp_path / "other", NAMED["tiny"], random_adapter(NAMED["tiny"], 3), "tiny")
    (tmp_path / "other" / "adapter_model.safetensors").write_bytes(b"no tensors")
    with closing(LocalEngine(loaded, "tiny")) as engine:
        for folder in (tmp_path, tmp_path / "other"):
            with pytest.raises(InputError):
                engine.add_adapter("bad", folder)
        assert engine.adapters == []
