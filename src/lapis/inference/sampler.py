"""From logits to tokens. What happens to a row depends on that row alone, whatever else is in the batch.

Random numbers are a function of (seed, position), never the state of a generator, so a seed gives the same
text alone, in any batch and after any preemption. Everything is numpy, one row at a time: a row is too small
to be worth the threads of torch, and sums that no threads share come out the same in every batch.

Dims: R rows of the batch, V vocabulary, B blocks of the vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lapis.inference.request import SamplingParams

Floats = NDArray[np.float32]

BLOCK = 64  # sums over the vocabulary go block by block


@dataclass(frozen=True)
class Row:
    """What sampling needs to know beside the logits of a row: `ids` are prompt and completion so far.

    `best` is the first index of the largest logit, if it is known already, or -1 if the logits are not finite.
    """

    params: SamplingParams
    seed: int
    ids: Sequence[int]
    prompt_tokens: int
    best: int | None = None


def sample(logits_RV: Floats, rows: Sequence[Row]) -> list[int | None]:
    """Choose a token for every row; None where the model gave no finite logits.

    The order is that of vLLM and transformers: bias, penalties, temperature, top-k, top-p, min-p.
    """
    return [_sample_row(logits_V, row) for logits_V, row in zip(logits_RV, rows, strict=True)]


def uniform(seed: int, position: int) -> float:
    """A number strictly between 0 and 1 that belongs to seed and position: a keyed hash in counter mode."""
    key = (seed % 2**64).to_bytes(8, "little")
    digest = hashlib.blake2b(position.to_bytes(8, "little"), digest_size=8, key=key).digest()
    return ((int.from_bytes(digest, "little") >> 12) + 0.5) / 2**52


def top_tokens(logits_V: Floats, count: int) -> list[int]:
    """The ids of the largest logits, largest first, the smaller id first among equals."""
    if count == 0:
        return []
    count = min(count, len(logits_V))
    last = np.partition(logits_V, len(logits_V) - count)[len(logits_V) - count]
    ids = np.flatnonzero(logits_V >= last)
    order = np.argsort(-logits_V[ids], kind="stable")[:count]
    return [int(token) for token in ids[order]]


def _sample_row(logits_V: Floats, row: Row) -> int | None:
    params, best_token = row.params, row.best
    if params.logit_bias or params.presence_penalty or params.frequency_penalty:
        logits_V, best_token = _adjusted(logits_V, row), None
    token = int(logits_V.argmax()) if best_token is None else best_token  # a NaN counts as the largest
    if token < 0 or not math.isfinite(best := logits_V[token]):
        return None
    if params.greedy:
        return token
    weight_V = _weights((logits_V - best) / np.float32(max(params.temperature, 1e-6)), params)
    return _place(weight_V, float(_block_sums(weight_V).sum()) * uniform(row.seed, len(row.ids)))


def _adjusted(logits_V: Floats, row: Row) -> Floats:
    """A copy with bias and penalties added (the formula of OpenAI's API reference)."""
    params = row.params
    logits_V = logits_V.copy()
    if params.logit_bias:
        logits_V[list(params.logit_bias)] += np.array(list(params.logit_bias.values()), np.float32)
    counts = Counter(row.ids[row.prompt_tokens :])
    if counts:
        count = np.array(list(counts.values()), np.float32)
        logits_V[list(counts)] -= (
            np.float32(params.presence_penalty) + np.float32(params.frequency_penalty) * count
        )
    return logits_V


def _weights(scaled_V: Floats, params: SamplingParams) -> Floats:
    """Probabilities up to a factor, 0 for what the filters take away; whole blocks, the last padded with 0.

    The best of `scaled_V` is 0, so the largest weight is 1. Tokens that tie with the last allowed one stay.
    """
    size = len(scaled_V)
    if 0 < params.top_k < size:
        last = np.partition(scaled_V, size - params.top_k)[size - params.top_k]
        scaled_V = np.where(scaled_V >= last, scaled_V, np.float32(-np.inf))
    weight_V = _blocks(size)
    np.exp(scaled_V, out=weight_V[:size])
    least = np.float32(params.min_p)
    if params.top_p < 1:
        least = max(least, _lightest_kept(weight_V, params.top_p))
    if least > 0:
        weight_V *= weight_V >= least
    return weight_V


def _lightest_kept(weight_V: Floats, top_p: float) -> np.float32:
    """The smallest weight in the smallest set of tokens that holds `top_p` of all weight."""
    total = float(_block_sums(weight_V).sum())
    # All tokens below this weight together hold less than 1 - top_p, so only the others need sorting.
    heavy = weight_V[np.flatnonzero(weight_V >= (1 - top_p) * total / len(weight_V))]
    rising = _blocks(len(heavy))
    rising[: len(heavy)] = heavy
    rising.sort()
    light = total - float(_block_sums(rising).sum())
    return np.float32(rising[_place(rising, max(0.0, (1 - top_p) * total - light))])


def _place(weights: Floats, goal: float) -> int:
    """The first token at which the running sum of the weights exceeds the goal."""
    sums_B = _block_sums(weights)
    edges_B = sums_B.cumsum()
    block = int(np.searchsorted(edges_B, goal, side="right"))
    end = (block + 1) * BLOCK
    if block < len(edges_B):
        edges = weights[block * BLOCK : end].cumsum(dtype=np.float64)
        place = int(np.searchsorted(edges, goal - (edges_B[block] - sums_B[block]), side="right"))
        if place < BLOCK:
            return block * BLOCK + place
    return int(np.flatnonzero(weights[:end])[-1])  # rounding put the goal behind the last edge


def _blocks(size: int) -> Floats:
    """Zeros for so many weights, rounded up to whole blocks."""
    return np.zeros(-(-size // BLOCK) * BLOCK, np.float32)


def _block_sums(weights: Floats) -> NDArray[np.float64]:
    sums_B: NDArray[np.float64] = np.add.reduce(weights.reshape(-1, BLOCK), axis=1, dtype=np.float64)
    return sums_B
