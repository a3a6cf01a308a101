"""Bits per byte of held-out documents: what a model needs to write a text down, whatever its tokenizer is.

A document is scored from a leading end token: its tokens and the end token that closes it. Longer ones are
cut into windows of the model's context, each of which begins half a context earlier than what it adds: every
token is predicted from at least half a context, or from all there is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lapis.log import Progress, silent
from lapis.tokenizer.bpe import Tokenizer

# One list of log probabilities (of each token after the first) for each list of token ids, in order.
ScoreMany = Callable[[Sequence[Sequence[int]]], Iterable[Sequence[float]]]

RESAMPLES = 1000


@dataclass(frozen=True)
class DocumentLoss:
    """What one document cost: nats over its tokens (end included), and how many bytes of UTF-8 it has."""

    nats: float
    tokens: int
    bytes: int


class Window(NamedTuple):
    """A piece of a document: tokens [start, stop), of which those from `first` on are counted."""

    start: int
    first: int
    stop: int


class Interval(NamedTuple):
    """A 95 % interval."""

    low: float
    high: float


def windows(length: int, context: int) -> list[Window]:
    """Cover tokens 1 … length-1 of a document, each counted once, by windows of at most `context` tokens."""
    assert context >= 2, "a window holds a token and its context"
    pieces, done = [], 1
    while done < length:
        stop = min(length, done - 1 + context) if done == 1 else min(length, done + context - context // 2)
        pieces.append(Window(max(0, stop - context), done, stop))
        done = stop
    return pieces


def document_losses(
    texts: Sequence[str],
    tokenizer: Tokenizer,
    score: ScoreMany,
    context: int,
    progress: Progress = silent,
) -> list[DocumentLoss]:
    """The loss of each text under a model of that context length."""
    documents = [[tokenizer.end_id, *ids, tokenizer.end_id] for ids in tokenizer.encode_batch(list(texts))]
    pieces = [(index, piece) for index, ids in enumerate(documents) for piece in windows(len(ids), context)]
    nats = [0.0] * len(documents)
    total = sum(piece.stop - piece.start for _, piece in pieces)
    done = 0
    scored = score([documents[index][piece.start : piece.stop] for index, piece in pieces])
    for (index, piece), logprobs in zip(pieces, scored, strict=True):
        assert len(logprobs) == piece.stop - piece.start - 1
        nats[index] -= math.fsum(logprobs[piece.first - piece.start - 1 :])
        done += piece.stop - piece.start
        progress(done, total, f"{done:,} of {total:,} tokens scored")
    return [
        DocumentLoss(cost, len(ids) - 1, len(text.encode()))
        for cost, ids, text in zip(nats, documents, texts, strict=True)
    ]


def one_by_one(score: Callable[[Sequence[int]], Sequence[float]]) -> ScoreMany:
    """Make a ScoreMany of something that scores one sequence, such as `Engine.score`."""

    def many(sequences: Sequence[Sequence[int]]) -> Iterator[Sequence[float]]:
        return (score(ids) for ids in sequences)

    return many


def bits_per_byte(losses: Sequence[DocumentLoss]) -> float:
    """Bits for all documents over bytes of all documents: long documents weigh more than short ones."""
    return math.fsum(loss.nats for loss in losses) / math.log(2) / sum(loss.bytes for loss in losses)


def bootstrap(losses: Sequence[DocumentLoss], seed: int = 0) -> Interval:
    """The 95 % interval of bits per byte over draws of documents like these (percentile bootstrap).

    Documents are resampled, not tokens: tokens of one document are not independent.
    """
    bits = np.array([loss.nats for loss in losses]) / math.log(2)
    sizes = np.array([loss.bytes for loss in losses])
    generator = np.random.default_rng(seed)
    drawn = []
    for _ in range(RESAMPLES):
        pick = generator.integers(0, len(losses), len(losses))
        drawn.append(bits[pick].sum() / sizes[pick].sum())
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Interval(float(low), float(high))
