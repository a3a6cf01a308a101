"""What was trained is what is served: every family, random traffic, every log probability, bit for bit.

Prompts of random lengths go through one engine: in chunks, beside each other, over shared prefixes, preempted,
with guessed tokens, greedy and sampled. Each text is then run through the forward of training, several packed
into one batch with gradients on. No logprob may differ, with low-rank adapters neither. Plain torch in the same
test shows that it can fail. Weights in fewer bits have no training; there, serving alone is the judge.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from lapis.inference.engine import LocalEngine
from lapis.inference.kv_cache import PAGE
from lapis.inference.request import Output, Request, SamplingParams
from lapis.kernels.batch import packed
from lapis.kernels.stock import StockOps
from lapis.model.adapters import Adapter, for_batch, read_adapter, write_adapter
from lapis.model.config import ModelConfig
from lapis.model.families import Decoder, build
from lapis.model.manifest import Source
from lapis.model.weights import LoadedModel, read_model, write_model
from tests import small_models

FAMILIES = {name: replace(shape, context=4096 + PAGE) for name, shape in small_models.families().items()}
FAMILIES["heads of 48"] = small_models.config(head_size=48, context=4096 + PAGE)
FAMILIES["heads of 128"] = small_models.config(head_size=128, heads=2, kv_heads=1, context=4096 + PAGE)
VOCABULARY = 300
ENGINES: list[dict[str, Any]] = [
    {"step_tokens": 512, "running": 16, "drafts": 0},
    {"step_tokens": 100, "running": 7, "drafts": 4},
    {"step_tokens": 33, "running": 3, "drafts": 2},
]


@dataclass(frozen=True)
class Traffic:
    """Requests for so many tokens of text in all, the longest prompt of `longest` tokens."""

    tokens: int
    longest: int

    def requests(self, numbers: random.Random, adapters: Sequence[str | None] = (None,)) -> list[Request]:
        """Prompts short and long, some that begin alike, each read in its own way and by one of the adapters."""
        prefix = [numbers.randrange(3, VOCABULARY) for _ in range(self.longest // 2)]
        found: list[Request] = []
        while sum(len(request.prompt_ids) for request in found) < self.tokens:
            length = min(self.longest, int(numbers.paretovariate(0.7)) + numbers.randrange(1, 40))
            length = self.longest if not found else length
            prompt = [numbers.randrange(3, VOCABULARY) for _ in range(length)]
            if numbers.random() < 0.4:
                prompt[: len(prefix)] = prefix[: length - 1]
            params = SamplingParams(
                max_tokens=numbers.randrange(1, 24),
                temperature=numbers.choice([0.0, 0.7, 1.0]),
                top_p=numbers.choice([1.0, 0.9]),
                seed=numbers.randrange(1000),
                logprobs=0,
                prompt_logprobs=numbers.choice([None, 0]),
                stop_ids=frozenset(),
            )
            found.append(Request(str(len(found)), prompt, params, adapter=numbers.choice(adapters)))
        return found


SHORT, LONG = Traffic(700, 300), Traffic(10_000, 4096)


def written(folder: Path, shape: ModelConfig) -> Path:
    """A model folder with lively random weights."""
    state = small_models.random_state(shape)
    write_model(folder, shape, state, small_models.tokenizer(), source=Source("run", "test"))
    return folder


def answers(engine: LocalEngine, requests: Sequence[Request]) -> list[Output]:
    """All requests at once."""
    streams = [engine.submit(request) for request in requests]
    return [stream.result() for stream in streams]


def trained(
    model: Decoder,
    texts: Sequence[list[int]],
    packs: random.Random,
    wanted: Sequence[int],
    adapters: Sequence[Adapter],
) -> list[list[float]]:
    """Each text's logprobs by the forward of training with the adapter that it wants (-1: none), a few in a batch."""
    found: list[list[float]] = []
    while len(found) < len(texts):
        part = slice(len(found), len(found) + packs.randrange(1, 6))
        some, counts = texts[part], torch.tensor([len(text) for text in texts[part]])
        ids_T = torch.tensor([token for text in some for token in text])
        batch = packed(counts.tolist())
        if adapters:
            adapter_T = torch.tensor(wanted[part], dtype=torch.int32).repeat_interleave(counts)
            pairs = for_batch(adapters, model.config.layers)
            batch = replace(batch, adapter_T=adapter_T, adapters=pairs)
        logits_TV = model(ids_T, batch)
        assert logits_TV.requires_grad
        flat = model.ops.logprobs(logits_TV, ids_T.roll(-1)).tolist()
        for text in some:
            found.append(flat[: len(text) - 1])
            flat = flat[len(text) :]
    return found


def room(loaded: LoadedModel, traffic: Traffic) -> int:
    """Bytes of a cache so small that some are preempted."""
    return (traffic.longest // PAGE + 24) * PAGE * loaded.config.kv_bytes_per_token


def differing(
    loaded: LoadedModel,
    judge: Decoder,
    traffic: Traffic,
    options: dict[str, Any],
    seed: int,
    adapters: Sequence[Path] = (),
) -> tuple[int, int]:
    """How many of how many logprobs that were served are not those of training."""
    numbers = random.Random(seed)
    requests = traffic.requests(numbers, [None, *(folder.name for folder in adapters)])
    with closing(LocalEngine(loaded, "tiny", cache_bytes=room(loaded, traffic), **options)) as engine:
        for folder in adapters:
            engine.add_adapter(folder.name, folder)
        outputs = answers(engine, requests)
        assert engine.stats()["pages_used"] == 0
    texts = [[*r.prompt_ids, *o.token_ids] for r, o in zip(requests, outputs, strict=True)]
    wrong = count = 0
    names = [folder.name for folder in adapters]
    wanted = [names.index(request.adapter) if request.adapter else -1 for request in requests]
    read = [read_adapter(folder, loaded.config) for folder in adapters]
    expected_logprobs = trained(judge, texts, numbers, wanted, read)
    for request, output, logprobs in zip(requests, outputs, expected_logprobs, strict=True):
        assert output.completion_tokens == request.params.max_tokens
        prompt = len(request.prompt_ids)
        served = [token.logprob for token in (*output.prompt_logprobs, *output.logprobs)]
        expected = logprobs if request.params.prompt_logprobs is not None else logprobs[prompt - 1 :]
        assert len(served) == len(expected)
        wrong += sum(a != b for a, b in zip(served, expected, strict=True))
        count += len(served)
    return wrong, count


def exact(folder: Path, shape: ModelConfig) -> LoadedModel:
    """The model on kernels that promise bits."""
    loaded = read_model(written(folder, shape))
    if not loaded.model.ops.bit_exact:
        pytest.skip(f"only compiled kernels promise bits; these are {loaded.model.ops.name}")
    return loaded


@pytest.mark.parametrize("name", FAMILIES)
def test_no_logprob_differs(tmp_path: Path, name: str) -> None:
    loaded = exact(tmp_path / "model", FAMILIES[name])
    for seed, options in enumerate(ENGINES[:2]):
        wrong, count = differing(loaded, loaded.model, SHORT, options, seed)
        assert count > 200
        assert wrong == 0, f"{wrong} of {count} logprobs differ"


@pytest.mark.parametrize("name", ["llama", "olmoe", "gpt2"])
def test_no_logprob_differs_with_adapters(tmp_path: Path, name: str) -> None:
    shape = FAMILIES[name]
    loaded, folders = exact(tmp_path / "model", shape), [tmp_path / "one", tmp_path / "two"]
    for seed, folder in enumerate(folders):
        write_adapter(folder, shape, small_models.random_adapter(shape, seed), "model")
    for seed, options in enumerate(ENGINES[:2]):
        wrong, count = differing(loaded, loaded.model, SHORT, options, seed, folders)
        assert count > 200
        assert wrong == 0, f"{wrong} of {count} logprobs differ"


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_weights_in_fewer_bits_answer_alone_as_in_any_batch(
    tmp_path: Path, name: str, weights: Literal["int8", "int4"]
) -> None:
    loaded = exact(tmp_path / "model", FAMILIES[name])
    requests = SHORT.requests(random.Random(7))
    options = {"cache_bytes": room(loaded, SHORT), "weights": weights}
    with closing(LocalEngine(loaded, "tiny", **ENGINES[1], **options)) as engine:
        together = answers(engine, requests)
    with closing(LocalEngine(loaded, "tiny", **ENGINES[0], **options)) as engine:
        alone = [engine.submit(request).result() for request in requests]
    for one, other in zip(together, alone, strict=True):
        assert (one.token_ids, one.logprobs) == (other.token_ids, other.logprobs)
        assert one.prompt_logprobs == other.prompt_logprobs


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", FAMILIES)
def test_no_logprob_of_ten_thousand_differs(tmp_path: Path, name: str) -> None:
    loaded = exact(tmp_path / "model", FAMILIES[name])
    threads, total = torch.get_num_threads(), 0
    try:
        for seed, options in enumerate(ENGINES):
            torch.set_num_threads(1 + seed % 2)
            wrong, count = differing(loaded, loaded.model, LONG, options, 100 + seed)
            assert wrong == 0, f"{wrong} of {count} logprobs differ"
            total += count
    finally:
        torch.set_num_threads(threads)
    assert total > 10_000


def test_with_plain_torch_logprobs_differ(tmp_path: Path) -> None:
    shape = FAMILIES["llama"]
    loaded = read_model(written(tmp_path / "model", shape))
    model = build(shape, StockOps())
    model.load_state_dict(loaded.model.state_dict())
    wrong, count = differing(replace(loaded, model=model), model, SHORT, ENGINES[1], 0)
    assert wrong > count // 10
