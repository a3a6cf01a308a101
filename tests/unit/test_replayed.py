"""Replayed steps give the bits of the forward itself, whatever comes together in a step."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch

from lapis.inference.kv_cache import PAGE
from lapis.inference.replayed import EXACT_ROWS, MOST_ROWS, Part, ReplayedSteps, recorded_size
from lapis.kernels import variants
from lapis.kernels.batch import packed
from lapis.kernels.quantized import Kind
from lapis.kernels.stock import StockOps
from lapis.model.families import Llama, build
from tests.small_models import config, families

CONFIG = config(vocab_size=330)
TEXTS = 330 - 7  # the tokenizer has fewer entries than the model rows
compiled = pytest.mark.skipif(not variants.status().bit_exact, reason="no compiled kernels here")


@dataclass
class Text:
    """A sequence on its way through the steps."""

    ids: list[int]
    pages: array[int]
    done: int = 0
    logits: list[torch.Tensor] = field(default_factory=list)


def make_model() -> Llama:
    model = Llama(CONFIG).eval()
    model.init_weights(5)
    return model


def traffic(steps: ReplayedSteps, texts: list[Text], rng: random.Random) -> set[int]:
    """Random steps: sequences join and leave, in pieces of any size; all their logits are noted."""
    waiting, live, sizes = list(texts), [], set()
    while waiting or live:
        while waiting and len(live) < 24 and (not live or rng.random() < 0.8):
            live.append(waiting.pop())
        rng.shuffle(live)
        left, parts, owners = MOST_ROWS, [], []
        for text in live:
            count = min(left, len(text.ids) - text.done, rng.choice([1, 1, 1, 1, 5, 23]))
            if count:
                parts.append(Part(text.ids[text.done : text.done + count], text.done, text.pages))
                owners += [text] * count
                text.done += count
                left -= count
        rows = range(len(owners)) if rng.random() < 0.8 else sorted(rng.sample(range(len(owners)), 1))
        found = steps.run(parts, rows)
        assert found is not None
        sizes.add(len(owners))
        logits, best = found
        assert best == logits[:, :TEXTS].argmax(-1).tolist()
        kept = dict(zip(rows, logits.clone(), strict=True))
        for row, text in enumerate(owners):
            text.logits.append(kept.get(row, torch.tensor([])))
        live = [text for text in live if text.done < len(text.ids)]
    return sizes


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@compiled
@pytest.mark.usefixtures("threads")
def test_any_traffic_has_the_bits_of_the_training_forward() -> None:
    rng = random.Random(7)
    model = make_model()
    lengths = [rng.randrange(1, 90) for _ in range(40)]
    numbers = list(range(sum(-(-length // PAGE) for length in lengths)))
    rng.shuffle(numbers)
    texts = [
        Text(
            [rng.randrange(CONFIG.vocab_size) for _ in range(length)],
            array("i", [numbers.pop() for _ in range(-(-length // PAGE))]),
        )
        for length in lengths
    ]
    pages = max(max(text.pages) for text in texts) + 1
    with torch.inference_mode():
        steps = ReplayedSteps(model, model.new_caches(pages + 1), pages, TEXTS)
        assert len(traffic(steps, texts, rng)) >= 15
        for text in texts:
            expected = model(torch.tensor(text.ids), packed([len(text.ids)]))
            for found, row in zip(text.logits, expected, strict=True):
                assert not len(found) or torch.equal(found, row)


@compiled
@pytest.mark.usefixtures("threads")
def test_large_steps_have_the_bits_of_the_training_forward() -> None:
    model, rng, most = make_model(), random.Random(9), 150
    texts = [[rng.randrange(CONFIG.vocab_size) for _ in range(length)] for length in (150, 131, 96, 150, 70)]
    with torch.inference_mode():
        steps = ReplayedSteps(model, model.new_caches(11), 10, TEXTS, most)
        for _ in range(3):
            for ids in texts:
                pages = array("i", rng.sample(range(10), 8))
                parts = [Part(ids[:64], 0, pages), Part(ids[64:], 64, pages)] if rng.random() < 0.5 else []
                parts = parts or [Part(ids[:50], 0, pages[5:7]), Part(ids, 0, pages[:5])][len(ids) > 100 :]
                found = steps.hidden(parts)
                assert found is not None  # at its first size and at every other
                rows = sum(len(part.ids) for part in parts)
                assert len(found) == rows
                assert torch.equal(
                    found[rows - len(ids) :], model.hidden(torch.tensor(ids), packed([len(ids)]))
                )
        long = Part(texts[0] + texts[1], 0, array("i", range(8)))
        assert steps.hidden([long]) is None  # larger than was asked for


@compiled
@pytest.mark.parametrize("weights", [None, "int8", "int4"])
@pytest.mark.parametrize("name", ["qwen3", "mixtral", "gpt2"])
def test_one_recording_serves_large_steps_of_any_size(name: str, weights: Kind | None) -> None:
    model = build(families()[name]).eval()
    model.init_weights(3)
    if weights is not None:
        model.quantize(weights)
    with torch.inference_mode():
        steps = ReplayedSteps(model, model.new_caches(6), 5, TEXTS, 150)
        for tokens in (150, 65, 97):
            ids = [7 * token % model.config.vocab_size for token in range(tokens)]
            found = steps.hidden([Part(ids, 0, array("i", [4, 2, 0, 1, 3])[: -(-tokens // PAGE)])])
            assert found is not None
            assert torch.equal(found, model.hidden(torch.tensor(ids), packed([tokens])))


@compiled
def test_a_row_that_is_not_finite_is_told_and_stays_alone() -> None:
    model = make_model()
    with torch.inference_mode():
        steps = ReplayedSteps(model, model.new_caches(3), 2, TEXTS)
        found = steps.run(
            [Part([5], 0, array("i", [0])), Part([CONFIG.vocab_size], 0, array("i", [1]))], [0, 1]
        )
        expected = model(torch.tensor([5]), packed([1]))
    assert found is not None
    assert torch.equal(found[0][:1], expected)
    assert found[1] == [int(expected[0, :TEXTS].argmax()), -1]  # no such token: all its logits are NaN


def test_plain_torch_is_not_replayed() -> None:
    model = Llama(CONFIG, StockOps()).eval()
    steps = ReplayedSteps(model, model.new_caches(2), 1, TEXTS)
    assert not steps.active
    assert "stock" in steps.reason
    assert steps.run([Part([5], 0, array("i", [0]))], [0]) is None


def test_few_rows_are_wasted() -> None:
    assert all(rows <= recorded_size(rows) < rows + 4 for rows in range(1, MOST_ROWS + 1))
    assert all(recorded_size(rows) == rows for rows in range(1, EXACT_ROWS + 1))
    assert recorded_size(MOST_ROWS) == MOST_ROWS
