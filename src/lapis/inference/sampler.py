"""From logits to tokens. What happens to a row depends on that row alone, whatever else is in the batch.

Random numbers are a function of (seed, position), never the state of a generator, so a seed gives the same
text alone, in any batch and after any preemption.

Dims: R rows of the batch, V vocabulary, B blocks of the vocabulary, N candidates of one row.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lapis.inference.request import SamplingParams

BLOCK = 64  # the vocabulary is summed in blocks of fixed size, so the order of a sum never depends on R
CANDIDATES = 128  # sorted first when top_p is asked for; all are sorted only if these do not reach it


@dataclass(frozen=True)
class Row:
    """What sampling needs to know beside the logits of a row: `ids` are prompt and completion so far."""

    params: SamplingParams
    seed: int
    ids: Sequence[int]
    prompt_tokens: int


def sample(logits_RV: Tensor, rows: Sequence[Row]) -> list[int | None]:
    """Choose a token for every row; None where the model gave no finite logits.

    The order is that of vLLM and transformers: bias, penalties, temperature, top-k, top-p, min-p.
    """
    if any(_changes_logits(row.params) for row in rows):
        logits_RV = logits_RV.clone()
        for index, row in enumerate(rows):
            _adjust(logits_RV[index], row)
    best_R, argmax_R = logits_RV.max(dim=-1)
    choices: list[int | None] = []
    for index, (row, best, argmax) in enumerate(zip(rows, best_R.tolist(), argmax_R.tolist(), strict=True)):
        if not math.isfinite(best):  # the maximum of a row with a NaN is NaN
            choices.append(None)
        elif row.params.greedy:
            choices.append(argmax)
        else:
            choices.append(_draw(logits_RV[index], best, row))
    return choices


def uniform(seed: int, position: int) -> float:
    """A number strictly between 0 and 1 that belongs to seed and position: a keyed hash in counter mode."""
    key = (seed % 2**64).to_bytes(8, "little")
    digest = hashlib.blake2b(position.to_bytes(8, "little"), digest_size=8, key=key).digest()
    return ((int.from_bytes(digest, "little") >> 11) + 0.5) / 2**53


def top_tokens(logits_V: Tensor, count: int) -> list[int]:
    """The ids of the largest logits, largest first."""
    return [int(token) for token in logits_V.topk(count).indices.tolist()] if count else []


def _changes_logits(params: SamplingParams) -> bool:
    return bool(params.logit_bias or params.presence_penalty or params.frequency_penalty)


def _adjust(logits_V: Tensor, row: Row) -> None:
    """Add bias and penalties in place (the formula of OpenAI's API reference)."""
    params = row.params
    if params.logit_bias:
        ids = torch.tensor(list(params.logit_bias))
        logits_V[ids] += torch.tensor(list(params.logit_bias.values()), dtype=torch.float32)
    completion = row.ids[row.prompt_tokens :]
    if (params.presence_penalty or params.frequency_penalty) and completion:
        counts = Counter(completion)
        ids = torch.tensor(list(counts))
        count = torch.tensor(list(counts.values()), dtype=torch.float32)
        logits_V[ids] -= params.presence_penalty + params.frequency_penalty * count


def _draw(logits_V: Tensor, best: float, row: Row) -> int:
    params = row.params
    scaled_V = (logits_V - best) / params.temperature  # the best is 0, so nothing overflows
    number = uniform(row.seed, len(row.ids))
    if params.top_k or params.top_p < 1:
        return _draw_sorted(scaled_V, params, number)
    if params.min_p:
        scaled_V = scaled_V.masked_fill(scaled_V < math.log(params.min_p), -math.inf)
    return _draw_unsorted(scaled_V.exp(), number)


def _draw_unsorted(weight_V: Tensor, number: float) -> int:
    """The token in whose share of all weights the number falls: first its block, then its place."""
    sums_B = _block_sums(weight_V)
    edges_B = sums_B.cumsum(0)
    goal = edges_B[-1] * number
    block = int(torch.searchsorted(edges_B, goal, right=True))
    inside = weight_V[block * BLOCK : (block + 1) * BLOCK].double()
    edges = inside.cumsum(0) + (edges_B[block] - sums_B[block])
    place = int(torch.searchsorted(edges, goal, right=True))
    # Rounding can put the goal behind the block's last edge; then it is the last token with any weight.
    place = min(place, int(inside.nonzero()[-1]))
    return block * BLOCK + place


def _draw_sorted(scaled_V: Tensor, params: SamplingParams, number: float) -> int:
    weight_N, token_N, total = _candidates(scaled_V, params)
    before_N = weight_N.cumsum(0) - weight_N
    keep_N = before_N < params.top_p * total  # the smallest set whose mass reaches top_p
    if params.min_p:
        keep_N &= weight_N >= params.min_p * weight_N[0]
    keep_N[0] = True
    edges_N = (weight_N * keep_N).cumsum(0)
    place = int(torch.searchsorted(edges_N, edges_N[-1] * number, right=True))
    return int(token_N[min(place, int(keep_N.nonzero()[-1]))])


def _candidates(scaled_V: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor, float]:
    """Weights and tokens, heaviest first, holding at least top_p of all weight within top-k, and that."""
    size = scaled_V.shape[0]
    limit = min(params.top_k or size, size)
    first = scaled_V.topk(min(limit, CANDIDATES))
    weight_N = first.values.exp().double()
    if limit <= CANDIDATES:
        return weight_N, first.indices, float(weight_N.sum())
    if limit == size:
        total = float(_block_sums(scaled_V.exp()).sum())
        if float(weight_N.sum()) >= params.top_p * total:
            return weight_N, first.indices, total
    every = scaled_V.topk(limit)
    weight_N = every.values.exp().double()
    return weight_N, every.indices, float(weight_N.sum())


def _block_sums(weight_V: Tensor) -> Tensor:
    """Sums of blocks of the vocabulary, fp64 (B,); a last short block is padded with zeros."""
    short = -weight_V.shape[0] % BLOCK
    if short:
        weight_V = torch.nn.functional.pad(weight_V, (0, short))
    return weight_V.view(-1, BLOCK).sum(-1, dtype=torch.float64)
