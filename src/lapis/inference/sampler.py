"""From logits to tokens. What happens to a row depends on that row alone, whatever else is in the batch.

Random numbers are a function of (seed, position), never the state of a generator, so a seed gives the same
text alone, in any batch and after any preemption. Everything is numpy, one row at a time: a row is too small
to be worth the threads of torch, and sums that no threads share come out the same in every batch.

The order of what is done to logits is vLLM's: the grammar's mask and end tokens that may not come yet, bias,
penalties (repetition, then frequency and presence), temperature, min-p, top-k, top-p. Each filter looks at what
the one before has left; tokens that tie with the last one kept stay.

Dims: R rows of the batch, V vocabulary, N tokens that are left, as B blocks or columns of C.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from lapis.inference.request import SamplingParams
from lapis.inference.scheduler import Sequence as Running

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]

BLOCK = 64  # sums over the vocabulary go block by block


@dataclass(frozen=True)
class Row:
    """What sampling needs to know beside the logits of a row: `ids` are prompt and completion so far.

    `best` is the first index of the largest logit, if it is known already, or -1 if the logits are not finite.
    `allowed` has a bit for each token that a grammar permits (little-endian words of 32), `barred` are end
    tokens that must not come yet; where the grammar permits nothing else, they may.
    """

    params: SamplingParams
    seed: int
    ids: Sequence[int]
    prompt_tokens: int
    best: int | None = None
    allowed: NDArray[np.uint32] | None = None
    barred: frozenset[int] = frozenset()


def row_of(sequence: Running, ids: Sequence[int], best: int | None = None) -> Row:
    """The row of a sequence that has these ids by now. Raises RuntimeError if its grammar is at a loss."""
    params, prompt = sequence.request.params, sequence.prompt_tokens
    allowed = None if sequence.matcher is None else sequence.matcher.allowed(ids[prompt:])
    barred = sequence.stop_ids if len(ids) - prompt < params.min_tokens else frozenset()
    return Row(params, sequence.seed, ids, prompt, best, allowed, barred)


def sample(logits_RV: Floats, rows: Sequence[Row]) -> list[int | None]:
    """Choose a token for every row; None where the model gave no finite logits."""
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


def allowed_ids(mask_W: NDArray[np.uint32], size: int) -> Ids:
    """The ids whose bits are set."""
    bits_V = np.unpackbits(mask_W.view(np.uint8), bitorder="little")
    return np.flatnonzero(bits_V[:size].view(np.bool_))


def _sample_row(logits_V: Floats, row: Row) -> int | None:
    params = row.params
    adjusted_V, best = logits_V, row.best
    if row.barred or params.logit_bias or params.repetition_penalty != 1 or _penalised(params):
        adjusted_V, best = _adjusted(logits_V, row), None
    if row.allowed is None:
        return _choose(adjusted_V, row, best)
    ids_N = allowed_ids(row.allowed, len(logits_V))
    if len(ids_N) <= 1:  # a forced token comes, whatever the model thinks
        return int(ids_N[0]) if len(ids_N) else None
    place = _choose(adjusted_V.take(ids_N), row, None)
    if place is not None:
        return int(ids_N[place])
    return _sample_row(logits_V, replace(row, barred=frozenset())) if row.barred else None


def _choose(logits_N: Floats, row: Row, best: int | None) -> int | None:
    """The place of the token that comes; None if the best logit is not finite."""
    params = row.params
    if best is None:
        best = int(logits_N.argmax())  # a NaN counts as the largest
    if best < 0 or not math.isfinite(logits_N[best]):
        return None
    if params.greedy:
        return best
    scaled_N = logits_N - logits_N[best]
    if params.temperature != 1:
        scaled_N *= np.float32(1 / max(params.temperature, 1e-6))
    kept = None
    if params.min_p > 0:
        kept, scaled_N = _keep(scaled_N, math.log(params.min_p), None)
    if 0 < params.top_k < len(scaled_N):
        last = np.partition(scaled_N, len(scaled_N) - params.top_k)[len(scaled_N) - params.top_k]
        kept, scaled_N = _keep(scaled_N, last, kept)
    weight_N = _blocks(len(scaled_N))  # probabilities up to a factor; that of the best is 1
    np.exp(scaled_N, out=weight_N[: len(scaled_N)])
    if params.top_p < 1:
        kept, weights = _keep(weight_N, _lightest_kept(weight_N, params.top_p), kept)
        weight_N = _blocks(len(weights))
        weight_N[: len(weights)] = weights
    place = _draw(weight_N, uniform(row.seed, len(row.ids)))
    return place if kept is None else int(kept[place])


def _keep(values_N: Floats, least: float | np.float32, places: Ids | None) -> tuple[Ids, Floats]:
    """The values from `least` up, and where they were at first (`places`: where these were)."""
    kept = np.flatnonzero(values_N >= np.float32(least))
    return kept if places is None else places.take(kept), values_N.take(kept)


def _penalised(params: SamplingParams) -> bool:
    return params.presence_penalty != 0 or params.frequency_penalty != 0


def _adjusted(logits_V: Floats, row: Row) -> Floats:
    """A copy with bias and penalties.

    Presence and frequency are subtracted for tokens of the completion (the formula of OpenAI's API reference);
    the repetition penalty divides the positive logits of all tokens seen, prompt included, and multiplies
    the negative ones (CTRL, arXiv 1909.05858, as transformers and vLLM have it).
    """
    params = row.params
    logits_V = logits_V.copy()
    if params.logit_bias:
        logits_V[list(params.logit_bias)] += np.array(list(params.logit_bias.values()), np.float32)
    if params.repetition_penalty != 1:
        seen = np.fromiter(set(row.ids), np.int64)
        penalty = np.float32(params.repetition_penalty)
        logit = logits_V[seen]
        logits_V[seen] = np.where(logit > 0, logit / penalty, logit * penalty)
    if _penalised(params) and (counts := Counter(row.ids[row.prompt_tokens :])):
        count = np.fromiter(counts.values(), np.float32)
        logits_V[list(counts)] -= (
            np.float32(params.presence_penalty) + np.float32(params.frequency_penalty) * count
        )
    if row.barred:
        logits_V[list(row.barred)] = -np.inf
    return logits_V


def _lightest_kept(weight_N: Floats, top_p: float) -> np.float32:
    """The smallest weight in the smallest set of tokens that holds `top_p` of all weight."""
    total = float(_block_sums(weight_N).sum())
    for share in (16384, len(weight_N)):
        # All tokens below the bound for len(weight_N) hold less than 1 - top_p together, so that only the
        # others need sorting; mostly a bound that is stricter is low enough as well.
        heavy = weight_N.take(np.flatnonzero(weight_N >= np.float32((1 - top_p) * total / share)))
        rising = _blocks(len(heavy))
        rising[: len(heavy)] = heavy
        held = float(_block_sums(rising).sum())
        if held >= top_p * total * (1 + 1e-6):
            break
    rising.sort()
    return np.float32(rising[_place(rising, max(0.0, (1 - top_p) * total - (total - held)))])


def _draw(weight_N: Floats, number: float) -> int:
    """The token at a fraction of all weight, the tokens taken column by column: adding rows is what is fast."""
    weight_CB = weight_N.reshape(BLOCK, -1)
    sums_B = _column_sums(weight_N)
    edges_B = sums_B.cumsum()
    goal = number * edges_B[-1]
    last = int(np.flatnonzero(sums_B)[-1])  # rounding may put the goal behind the last edge
    column = min(int(np.searchsorted(edges_B, goal, side="right")), last)
    edges_C = weight_CB[:, column].cumsum(dtype=np.float64)
    row = int(np.searchsorted(edges_C, goal - (edges_B[column] - sums_B[column]), side="right"))
    row = min(row, int(np.flatnonzero(weight_CB[:, column])[-1]))
    return row * weight_CB.shape[1] + column


def _column_sums(weight_N: Floats) -> NDArray[np.float64]:
    sums_B: NDArray[np.float64] = np.add.reduce(weight_N.reshape(BLOCK, -1), axis=0).astype(np.float64)
    return sums_B


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
