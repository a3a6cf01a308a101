"""Score many sequences with few forward passes of a model.

Dims: T tokens of a pass, H width, V vocabulary, R rows that are scored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch

from lapis.evaluate.loss import ScoreMany
from lapis.kernels.batch import packed
from lapis.model.families import Decoder

CHUNK_TOKENS = 4096
LOGITS_AT_ONCE = 1 << 24  # values of the widest tensor: 64 MiB in float32


def batched_scorer(model: Decoder, chunk_tokens: int = CHUNK_TOKENS) -> ScoreMany:
    """A ScoreMany that lays whole sequences one after the other, about `chunk_tokens` in a forward pass.

    Rows of a result do not depend on the rest of their batch, so with bit-exact kernels these are the numbers
    that an engine gives.
    """

    def many(sequences: Sequence[Sequence[int]]) -> Iterator[Sequence[float]]:
        for chunk in _chunks(sequences, chunk_tokens):
            yield from _score(model, chunk)

    return many


def _chunks(sequences: Sequence[Sequence[int]], chunk_tokens: int) -> Iterator[list[Sequence[int]]]:
    chunk: list[Sequence[int]] = []
    size = 0
    for ids in sequences:
        if chunk and size + len(ids) > chunk_tokens:
            yield chunk
            chunk, size = [], 0
        chunk.append(ids)
        size += len(ids)
    if chunk:
        yield chunk


@torch.no_grad()
def _score(model: Decoder, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
    lengths = [len(ids) for ids in sequences]
    ids_T = torch.tensor([token for ids in sequences for token in ids])
    x_TH = model.hidden(ids_T, packed(lengths))
    ends = torch.tensor(lengths).cumsum(0)
    scored_T = torch.ones(len(ids_T), dtype=torch.bool)
    scored_T[ends - 1] = False  # what follows the last token of a sequence is not known
    rows_R = scored_T.nonzero().squeeze(1)
    x_RH, targets_R = x_TH[rows_R.to(x_TH.device)], ids_T[rows_R + 1]
    step = max(1, LOGITS_AT_ONCE // model.config.vocab_size)
    parts = [
        model.ops.logprobs(model.logits(x_RH[start : start + step]), targets_R[start : start + step])
        for start in range(0, len(rows_R), step)
    ]
    logprobs = torch.cat(parts).tolist() if parts else []
    borders = [0, *torch.tensor([length - 1 for length in lengths]).cumsum(0).tolist()]
    return [logprobs[start:end] for start, end in pairwise(borders)]
