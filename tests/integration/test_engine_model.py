"""The engine over a real, tiny, random model: whatever the schedule, the same tokens and the same bits."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lapis.errors import InputError, IntegrityError
from lapis.inference import sampler
from lapis.inference.engine import LocalEngine, Weights
from lapis.inference.kv_cache import PAGE
from lapis.inference.request import Output, Pooling, Request, SamplingParams
from lapis.inference.runner import ModelRunner
from lapis.kernels.batch import packed
from lapis.kernels.stock import StockOps
from lapis.model.config import NAMED
from lapis.model.families import Llama
from lapis.model.manifest import Source
from lapis.model.weights import LoadedModel, read_model, write_model
from lapis.tokenizer.bpe import Tokenizer

TINY = replace(NAMED["tiny"], tied=False)  # so that an input can be poisoned without its output
PAGE_BYTES = PAGE * TINY.kv_bytes_per_token
GREEDY = SamplingParams(max_tokens=40, temperature=0, logprobs=0, stop_ids=frozenset())
ALL = 12

RANDOM = random.Random(5)
PROMPTS = [[RANDOM.randrange(3, 280) for _ in range(RANDOM.randrange(1, 80))] for _ in range(ALL)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder; its weights are large, so that a random model writes more than one word."""
    model = Llama(TINY, StockOps())
    model.init_weights(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.startswith("layers") and weight.ndim == 2:
                weight.mul_(12)
    tokenizer = Tokenizer.train([" ".join(str(number) for number in range(1000))], vocab_size=400)
    place = tmp_path_factory.mktemp("engine") / "tiny"
    write_model(place, TINY, model.state_dict(), tokenizer, source=Source("run", "test"), add_bos=True)
    return place


@pytest.fixture(scope="module")
def loaded(folder: Path) -> LoadedModel:
    return read_model(folder)


@pytest.fixture
def exact(loaded: LoadedModel) -> LoadedModel:
    """The model on kernels that promise bits."""
    if not loaded.model.ops.bit_exact:
        pytest.skip(f"only compiled kernels promise bits; these are {loaded.model.ops.name}")
    return loaded


def results(
    engine: LocalEngine, params: SamplingParams, prompts: Sequence[list[int]] = PROMPTS
) -> list[Output]:
    streams = [engine.submit(Request(str(n), prompt, params)) for n, prompt in enumerate(prompts)]
    return [stream.result() for stream in streams]


def alone(loaded: LoadedModel, params: SamplingParams) -> list[Output]:
    """Each prompt in an engine of its own: the simple way that all others are compared with."""
    outputs = []
    for prompt in PROMPTS:
        with closing(LocalEngine(loaded, "alone")) as engine:
            outputs += results(engine, params, [prompt])
    return outputs


def values(output: Output) -> tuple[tuple[int, ...], list[float]]:
    return output.token_ids, [logprob.logprob for logprob in output.logprobs]


def together(engine: LocalEngine) -> list[Output]:
    return results(engine, GREEDY)


def one_after_the_other_with_a_warm_cache(engine: LocalEngine) -> list[Output]:
    results(engine, GREEDY)
    outputs = [results(engine, GREEDY, [prompt])[0] for prompt in PROMPTS]
    assert engine.stats()["cached_tokens"] > 5 * PAGE
    return outputs


def preempted(engine: LocalEngine) -> list[Output]:
    outputs = results(engine, GREEDY)
    assert engine.stats()["preemptions"] > 0
    return outputs


SCHEDULES: list[tuple[str, dict[str, Any], Callable[[LocalEngine], list[Output]]]] = [
    ("in a batch", {}, together),
    ("in chunks of 7", {"step_tokens": 7, "running": 4}, together),
    ("in chunks of 33", {"step_tokens": 33}, together),
    ("token by token", {"step_tokens": 1, "running": 1}, together),
    ("from the prefix cache", {}, one_after_the_other_with_a_warm_cache),
    ("after preemption", {"cache_bytes": 7 * PAGE_BYTES}, preempted),
]


@pytest.fixture(scope="module")
def judged(loaded: LoadedModel) -> list[Output]:
    return alone(loaded, GREEDY)


@pytest.mark.parametrize(
    ("options", "run"), [case[1:] for case in SCHEDULES], ids=[case[0] for case in SCHEDULES]
)
def test_greedy_text_is_the_same_in_every_schedule(
    exact: LoadedModel,
    judged: list[Output],
    options: dict[str, Any],
    run: Callable[[LocalEngine], list[Output]],
) -> None:
    with closing(LocalEngine(exact, "tiny", **options)) as engine:
        outputs = run(engine)
        assert engine.stats()["pages_used"] == 0
    assert len({output.token_ids for output in judged}) == ALL
    assert [output.token_ids for output in outputs] == [output.token_ids for output in judged]
    assert [values(output) for output in outputs] == [values(output) for output in judged]


def test_without_such_kernels_the_same_test_fails(folder: Path) -> None:
    stock = read_model(folder, StockOps())
    with closing(LocalEngine(stock, "whole")) as engine:
        whole = results(engine, GREEDY)
    with closing(LocalEngine(stock, "chunks", step_tokens=7, running=4)) as engine:
        chunks = results(engine, GREEDY)
        assert not engine.bit_exact
    assert {output.finish_reason for output in whole + chunks} == {"length"}
    assert [values(output) for output in whole] != [values(output) for output in chunks]


def test_logprob_bits_are_those_of_training(exact: LoadedModel, judged: list[Output]) -> None:
    texts = [[*prompt, *output.token_ids] for prompt, output in zip(PROMPTS, judged, strict=True)]
    logprobs = iter(training_logprobs(exact.model, texts))
    with closing(LocalEngine(exact, "tiny")) as engine:
        for prompt, output, text in zip(PROMPTS, judged, texts, strict=True):
            trained = next(logprobs)
            assert values(output)[1] == trained[len(prompt) - 1 :]
            assert engine.score(text) == trained


@pytest.mark.parametrize("options", [{}, {"step_tokens": 7, "running": 4}, {"cache_bytes": 7 * PAGE_BYTES}])
def test_a_prompts_logprobs_are_those_of_training(exact: LoadedModel, options: dict[str, Any]) -> None:
    prompts = [prompt for prompt in PROMPTS if len(prompt) > 1]
    with closing(LocalEngine(exact, "tiny", **options)) as engine:
        results(engine, GREEDY, prompts)  # what the prefix cache has must not be left out
        told = results(engine, replace(GREEDY, prompt_logprobs=2), prompts)
        read = results(engine, replace(GREEDY, max_tokens=0, prompt_logprobs=0), prompts)
        plain = results(engine, GREEDY, prompts)
    trained = training_logprobs(exact.model, prompts)
    for outputs in (told, read):
        assert [[t.logprob for t in output.prompt_logprobs] for output in outputs] == trained
        assert [[t.token_id for t in output.prompt_logprobs] for output in outputs] == [
            p[1:] for p in prompts
        ]
    assert [values(output) for output in told] == [values(output) for output in plain]
    assert all(len(token.top) == 2 for output in told for token in output.prompt_logprobs)
    assert {(output.finish_reason, output.completion_tokens) for output in read} == {("length", 0)}


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_embeddings_do_not_depend_on_chunks_or_company(exact: LoadedModel, pooling: Pooling) -> None:
    with closing(LocalEngine(exact, "tiny")) as engine:
        together = engine.embed(PROMPTS, pooling)
        single = [engine.embed([prompt], pooling)[0] for prompt in PROMPTS]
    with closing(LocalEngine(exact, "tiny", step_tokens=7, running=4)) as engine:
        streams = [engine.submit(Request("busy", prompt, GREEDY)) for prompt in PROMPTS[:3]]
        chunked = engine.embed(PROMPTS, pooling)
        assert all(stream.result().completion_tokens == GREEDY.max_tokens for stream in streams)
        assert engine.stats()["pages_used"] == 0
    assert together == single == chunked
    rows = exact.model.hidden(torch.tensor(PROMPTS[0]), packed([len(PROMPTS[0])])).float()
    plain = torch.nn.functional.normalize(rows.mean(0) if pooling == "mean" else rows[-1], dim=0)
    torch.testing.assert_close(torch.tensor(together[0]), plain.detach(), rtol=1e-4, atol=1e-6)


FEW = dict.fromkeys((40, 50, 60, 70), 60.0)  # a text of four words repeats itself


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0},
        {"temperature": 0, "logprobs": 2, "presence_penalty": 0.5},
        {"temperature": 0.3, "seed": 4},
        {"temperature": 1.0, "seed": 9, "top_p": 0.9, "frequency_penalty": -0.1, "logprobs": 0},
        {"temperature": 0.5, "seed": 2, "stop": ([40, 50], [70, 70], [60, 40])},
    ],
)
def test_text_is_the_same_with_speculation(exact: LoadedModel, params: dict[str, Any]) -> None:
    params = {**params, "stop": tuple(exact.tokenizer.decode(ids) for ids in params.get("stop", ()))}
    sampled = SamplingParams(max_tokens=60, stop_ids=frozenset(), logit_bias=FEW, **params)
    with closing(LocalEngine(exact, "tiny", drafts=0)) as engine:
        plain = results(engine, sampled)
    for options in ({}, {"cache_bytes": 9 * PAGE_BYTES}, {"step_tokens": 16, "running": 4}):
        with closing(LocalEngine(exact, "tiny", drafts=4, **options)) as engine:
            guessed = results(engine, sampled)
            single = [results(engine, sampled, [prompt])[0] for prompt in PROMPTS]
            stats = engine.stats()
        assert stats["drafted_tokens"] > stats["accepted_tokens"] > 0
        assert stats["pages_used"] == 0
        assert stats["completion_tokens"] == sum(output.completion_tokens for output in guessed + single)
        for outputs in (guessed, single):
            assert [values(output) for output in outputs] == [values(output) for output in plain]
            assert [output.text for output in outputs] == [output.text for output in plain]


def training_logprobs(model: Llama, texts: list[list[int]]) -> list[list[float]]:
    """All texts packed in one forward with gradients on, as a trainer does it."""
    ids_T = torch.tensor([token for text in texts for token in text])
    logits_TV = model(ids_T, packed([len(text) for text in texts]))
    assert logits_TV.requires_grad
    logprobs: list[float] = model.ops.logprobs(logits_TV, ids_T.roll(-1)).tolist()
    ends = torch.tensor([len(text) for text in texts]).cumsum(0).tolist()
    return [logprobs[end - len(text) : end - 1] for end, text in zip(ends, texts, strict=True)]


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.8},
        {"temperature": 1.5, "top_p": 0.9},
        {"top_k": 20, "min_p": 0.05, "frequency_penalty": 0.5},
    ],
)
def test_a_seed_gives_the_same_text_in_any_batch(exact: LoadedModel, params: dict[str, Any]) -> None:
    sampled = SamplingParams(max_tokens=30, seed=11, stop_ids=frozenset(), **params)
    with closing(LocalEngine(exact, "tiny")) as engine:
        first = results(engine, sampled)
        single = [results(engine, sampled, [prompt])[0] for prompt in PROMPTS]
        other = results(engine, replace(sampled, seed=12))
    with closing(LocalEngine(exact, "tiny", cache_bytes=7 * PAGE_BYTES)) as engine:
        interrupted = results(engine, sampled)
        assert engine.stats()["preemptions"] > 0
    assert [o.token_ids for o in first] == [o.token_ids for o in single]
    assert [o.token_ids for o in first] == [o.token_ids for o in interrupted]
    assert [o.token_ids for o in first] != [o.token_ids for o in other]


def test_without_a_seed_texts_differ(loaded: LoadedModel) -> None:
    with closing(LocalEngine(loaded, "tiny")) as engine:
        outputs = results(engine, SamplingParams(max_tokens=20, temperature=2.0), [PROMPTS[0]] * 2)
    assert outputs[0].token_ids != outputs[1].token_ids


def test_a_request_that_yields_nan_ends_alone(
    folder: Path, loaded: LoadedModel, judged: list[Output]
) -> None:
    poisoned = read_model(folder, loaded.model.ops)
    unused = set(range(3, 300)) - {token for output in judged for token in output.token_ids}
    poison = (unused - {token for prompt in PROMPTS for token in prompt}).pop()
    with torch.no_grad():
        poisoned.model.embed[poison] = torch.nan
    with closing(LocalEngine(poisoned, "tiny")) as engine:
        prompts = [PROMPTS[0], [*PROMPTS[1], poison], PROMPTS[2]]
        outputs = results(engine, GREEDY, prompts)
        after = results(engine, GREEDY, [PROMPTS[3]])[0]
    assert outputs[1].finish_reason == "error"
    assert "finite" in str(outputs[1].error)
    good = [outputs[0], outputs[2], after]
    assert [output.token_ids for output in good] == [judged[n].token_ids for n in (0, 2, 3)]


def test_a_request_whose_sampler_raises_ends_alone(
    loaded: LoadedModel,
    judged: list[Output],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def failing(logits_RV: Tensor, rows: Sequence[sampler.Row]) -> list[int | None]:
        if any(row.params.seed == 13 for row in rows):
            raise RuntimeError("unlucky")
        return choose(logits_RV, rows)

    choose = sampler.sample
    monkeypatch.setattr(sampler, "sample", failing)
    with closing(LocalEngine(loaded, "tiny")) as engine:
        requests = [Request(str(n), PROMPTS[n], GREEDY) for n in range(3)]
        requests[1] = replace(requests[1], params=replace(GREEDY, seed=13))
        outputs = [stream.result() for stream in [engine.submit(request) for request in requests]]
    assert [output.finish_reason for output in outputs] == ["length", "error", "length"]
    assert outputs[0].token_ids == judged[0].token_ids
    assert outputs[2].token_ids == judged[2].token_ids
    assert "unlucky" in caplog.text


def test_top_logprobs(loaded: LoadedModel) -> None:
    with closing(LocalEngine(loaded, "tiny")) as engine:
        output = results(engine, replace(GREEDY, logprobs=5), [PROMPTS[0]])[0]
    for chosen in output.logprobs:
        assert len(chosen.top) == 5
        assert (chosen.top[0].token_id, chosen.top[0].logprob) == (chosen.token_id, chosen.logprob)
        assert [top.logprob for top in chosen.top] == sorted(
            (top.logprob for top in chosen.top), reverse=True
        )
        assert chosen.token == loaded.tokenizer.token_bytes(chosen.token_id)


def test_only_tokens_with_text_are_sampled(folder: Path) -> None:
    loaded = read_model(folder)
    assert loaded.tokenizer.vocab_size < TINY.vocab_size
    with closing(LocalEngine(loaded, "tiny")) as engine:
        output = results(engine, SamplingParams(max_tokens=100, temperature=2.0, stop_ids=frozenset()))
    assert max(token for o in output for token in o.token_ids) < loaded.tokenizer.vocab_size


def test_a_prompt_beyond_the_context_is_refused(loaded: LoadedModel) -> None:
    with closing(LocalEngine(loaded, "tiny")) as engine:
        with pytest.raises(InputError) as caught:
            engine.submit(Request("long", [5] * TINY.context, GREEDY))
        assert caught.value.param == "prompt"
        longest = engine.submit(Request("fits", [5] * (TINY.context - 1), GREEDY)).result()
        assert (longest.finish_reason, longest.completion_tokens) == ("length", 1)
        assert len(engine.score([5] * TINY.context)) == TINY.context - 1


def test_the_cache_holds_one_full_context_at_least(loaded: LoadedModel) -> None:
    assert ModelRunner(loaded, cache_bytes=0).pages == TINY.context // PAGE
    assert ModelRunner(loaded, cache_bytes=9 * PAGE_BYTES + 5).pages == 9
    assert ModelRunner(loaded).pages == 16 * TINY.context // PAGE


@pytest.fixture
def engine(folder: Path) -> Iterator[LocalEngine]:
    with closing(LocalEngine.load(folder, "tiny")) as engine:
        yield engine


def test_a_folder_is_served_as_it_was_written(engine: LocalEngine) -> None:
    assert (engine.name, engine.context, engine.add_bos) == ("tiny", TINY.context, True)
    assert engine.bos_id == engine.tokenizer.end_id
    assert engine.stats()["kernels"] == engine.kernels


def test_a_changed_byte_is_refused(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"model\.safetensors"):
        LocalEngine.load(copy, "tiny")


def test_an_int8_cache_holds_more_and_is_told(exact: LoadedModel) -> None:
    prompts = [(5, 6, 7), tuple(range(40))]
    params = SamplingParams(max_tokens=8, temperature=0, stop_ids=frozenset())

    with closing(LocalEngine(exact, "tiny", cache_dtype="int8")) as engine:
        facts = engine.stats()
        assert facts["cache_dtype"] == "int8"
        assert facts["replay"]
        assert not facts["bit_exact"]  # no longer the logits of training
        requests = [Request(str(n), prompt, params) for n, prompt in enumerate(prompts)]
        apart = [engine.submit(request).result().token_ids for request in requests]
        streams = [engine.submit(request) for request in requests]
        assert [stream.result().token_ids for stream in streams] == apart
    pages = ModelRunner(exact, cache_bytes=99 * PAGE_BYTES).pages
    assert ModelRunner(exact, 99 * PAGE_BYTES, "int8").pages > 1.5 * pages


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_weights_in_fewer_bits_answer_the_same_in_any_company(folder: Path, weights: Weights) -> None:
    prompts = [(5, 6, 7), tuple(range(40))]
    params = SamplingParams(max_tokens=8, temperature=0, stop_ids=frozenset())
    with closing(LocalEngine.load(folder, "tiny", weights=weights)) as engine:
        facts = engine.stats()
        assert facts["weights"] == weights
        assert not facts["bit_exact"]
        requests = [Request(str(n), prompt, params) for n, prompt in enumerate(prompts)]
        apart = [engine.submit(request).result().token_ids for request in requests]
        streams = [engine.submit(request) for request in requests]
        assert [stream.result().token_ids for stream in streams] == apart
        assert len(engine.score(prompts[1])) == 39
        assert engine.stats()["replay"]
