"""Held-out loss: every byte counted once, by any scorer, and reported so that the number can be judged."""

from __future__ import annotations

import json
import lzma
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from lapis.errors import InputError
from lapis.evaluate.compress import xz_bits_per_byte
from lapis.evaluate.evaluation import evaluate
from lapis.evaluate.loss import (
    DocumentLoss,
    bits_per_byte,
    bootstrap,
    document_losses,
    one_by_one,
    windows,
)
from lapis.evaluate.ngram import KneserNey
from lapis.evaluate.report import EvalReport, rows, summary
from lapis.evaluate.scorer import batched_scorer
from lapis.kernels.batch import packed
from lapis.model.config import NAMED
from lapis.model.families import Llama
from lapis.tokenizer.bpe import Tokenizer

TEXTS = ["def add(a, b):\n    return a + b\n" * 5, "short", "ünïcode – 汉字\n" * 12, "x = 1\n"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, 300)


@pytest.fixture(scope="module")
def model() -> Llama:
    model = Llama(NAMED["tiny"])
    model.init_weights(seed=1)
    return model


class Document:
    def __init__(self, text: str) -> None:
        self.text = text


class SmallDataset:
    """What evaluate needs of a dataset: its tokenizer and its held-out documents."""

    folder = "some/folder"
    digest = "d" * 64

    def __init__(self, tokenizer: Tokenizer, texts: Sequence[str]) -> None:
        self.tokenizer, self.texts = tokenizer, texts

    def heldout(self) -> list[Document]:
        return [Document(text) for text in self.texts]


@pytest.mark.parametrize("context", [2, 3, 8, 9])
@pytest.mark.parametrize("length", [0, 1, 2, 3, 8, 9, 10, 37, 64])
def test_windows_count_every_token_once_with_half_a_context_before_it(length: int, context: int) -> None:
    counted = []
    for window in windows(length, context):
        assert 0 <= window.start < window.first < window.stop <= length
        assert window.stop - window.start <= context
        counted += list(range(window.first, window.stop))
        for token in range(window.first, window.stop):
            assert token - window.start >= min(token, context // 2)
    assert counted == list(range(1, length))


def test_a_uniform_model_costs_its_logarithm_for_every_token(tokenizer: Tokenizer) -> None:
    uniform = one_by_one(lambda ids: [-math.log(2)] * (len(ids) - 1))
    losses = document_losses(TEXTS, tokenizer, uniform, context=16)
    for text, loss in zip(TEXTS, losses, strict=True):
        assert loss.tokens == len(tokenizer.encode(text)) + 1  # and the end token
        assert loss.bytes == len(text.encode())
        assert math.isclose(loss.nats, loss.tokens * math.log(2))
    assert math.isclose(bits_per_byte(losses), sum(x.tokens for x in losses) / sum(x.bytes for x in losses))


def test_a_scorer_sees_the_leading_end_token_and_only_its_own_document(tokenizer: Tokenizer) -> None:
    seen: list[list[int]] = []

    def score(ids: Sequence[int]) -> list[float]:
        seen.append(list(ids))
        return [0.0] * (len(ids) - 1)

    document_losses(["x = 1\n", "short"], tokenizer, one_by_one(score), context=128)
    end = tokenizer.end_id
    assert seen == [[end, *tokenizer.encode(text), end] for text in ("x = 1\n", "short")]


def test_many_documents_in_one_pass_score_as_each_alone(model: Llama, tokenizer: Tokenizer) -> None:
    """Judged by a plain softmax over the logits of one document at a time."""
    sequences = [[0, *tokenizer.encode(text)[:60]] for text in TEXTS] + [[5], [0, 3]]
    for chunk_tokens in (1, 70, 4096):
        scored = list(batched_scorer(model, chunk_tokens)(sequences))
        assert [len(logprobs) for logprobs in scored] == [len(ids) - 1 for ids in sequences]
        for ids, logprobs in zip(sequences, scored, strict=True):
            with torch.no_grad():
                logits = model(torch.tensor(ids), packed([len(ids)]))
            expected = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:]).view(-1, 1)).squeeze(1)
            torch.testing.assert_close(
                torch.tensor(logprobs), expected, atol=2e-3, rtol=2e-3, check_dtype=False
            )


def test_logits_in_pieces_change_nothing(model: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    sequences = [[0, *range(5, 60)], [0, 9, 8, 7]]
    whole = list(batched_scorer(model)(sequences))
    monkeypatch.setattr("lapis.evaluate.scorer.LOGITS_AT_ONCE", 7 * model.config.vocab_size)
    assert list(batched_scorer(model)(sequences)) == whole or not model.ops.bit_exact


def test_long_documents_weigh_more_than_short_ones() -> None:
    losses = [DocumentLoss(math.log(2) * 100, 50, 100), DocumentLoss(math.log(2) * 10, 5, 1)]
    assert math.isclose(bits_per_byte(losses), 110 / 101)


def test_the_interval_holds_the_estimate_and_narrows_with_documents() -> None:
    generator = np.random.default_rng(0)

    def some(count: int) -> list[DocumentLoss]:
        sizes = generator.integers(50, 500, count)
        return [
            DocumentLoss(float(size * generator.normal(0.9, 0.2)), int(size), int(size)) for size in sizes
        ]

    few, many = some(20), some(2000)
    for losses in (few, many):
        low, high = bootstrap(losses)
        assert low < bits_per_byte(losses) < high
    assert bootstrap(many).high - bootstrap(many).low < (bootstrap(few).high - bootstrap(few).low) / 4
    assert bootstrap(few) == bootstrap(few)
    assert bootstrap(few[:1]).low == pytest.approx(bits_per_byte(few[:1]))


def test_xz_is_what_the_tool_with_nine_and_extreme_gives() -> None:
    size = len(lzma.compress("".join(TEXTS).encode(), preset=9 | lzma.PRESET_EXTREME))
    assert xz_bits_per_byte(TEXTS) == 8 * size / len("".join(TEXTS).encode())


def test_evaluate_measures_model_and_yardsticks_on_the_same_bytes(model: Llama, tokenizer: Tokenizer) -> None:
    training = np.array([0] + [token for text in TEXTS for token in [*tokenizer.encode(text), 0]])
    dataset = SmallDataset(tokenizer, [*TEXTS, ""])
    reported: list[float] = []
    report = evaluate(
        model,
        dataset,  # type: ignore[arg-type]
        train_tokens=training,
        progress=lambda done, total=None, text="": reported.append(done),
    )
    assert (report.documents, report.empty_documents) == (len(TEXTS), 1)
    assert report.bytes == sum(len(text.encode()) for text in TEXTS)
    assert report.tokens == len(training) - 1
    assert report.low <= report.bits_per_byte <= report.high
    # untrained weights know nothing: close to log2(vocabulary) bits a token
    assert report.bits_per_byte * report.bytes / report.tokens == pytest.approx(math.log2(512), rel=0.05)
    assert report.perplexity == pytest.approx(512, rel=0.3)
    counted = KneserNey.train(training, tokenizer.vocab_size, 0)
    expected = -counted.score(training).sum() / math.log(2) / report.bytes
    assert report.yardsticks["5-gram"] == pytest.approx(expected)
    assert report.yardsticks["xz -9e"] == xz_bits_per_byte(TEXTS)
    assert report.kernels == model.ops.name
    assert reported


def test_no_held_out_text_is_an_error_that_says_what_to_do(model: Llama, tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="no held-out text") as caught:
        evaluate(model, SmallDataset(tokenizer, [""]), train_tokens=np.array([0]))  # type: ignore[arg-type]
    assert "lapis config" in caught.value.hint


def some_report() -> EvalReport:
    return EvalReport(
        bits_per_byte=1.25,
        low=1.2,
        high=1.31,
        perplexity=12.0,
        documents=3,
        empty_documents=0,
        bytes=3000,
        tokens=900,
        yardsticks={"5-gram": 1.75, "xz -9e": 2.5},
        yardstick_tokens=12345,
        dataset="d",
        tokenizer="t",
        parameters=14,
        context=512,
        kernels="stock",
        bit_exact=False,
    )


def test_a_report_survives_json_and_refuses_other_json() -> None:
    report = some_report()
    assert EvalReport.from_dict(json.loads(report.to_json())) == report
    values = report.to_dict()
    del values["low"]
    with pytest.raises(InputError, match="'low'"):
        EvalReport.from_dict(values)
    with pytest.raises(InputError, match="'other'"):
        EvalReport.from_dict({**report.to_dict(), "other": 1})


def test_the_table_is_ordered_and_says_what_each_number_means() -> None:
    table = rows(some_report())
    assert [row[0] for row in table] == ["this model", "5-gram", "xz -9e", "no model at all"]
    assert [row[1] for row in table] == [1.25, 1.75, 2.5, 8.0]
    assert "1.200 to 1.310" in table[0][2]
    assert "12,345" in table[1][2]
    text = summary(some_report())
    assert "29% less than 5-gram" in text
    assert "50% less than xz -9e" in text
    assert "lower is better" in text
