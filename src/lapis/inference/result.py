"""What a runner gives back for each chunk of a step: plain values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from lapis.inference.request import TokenLogprob


class Sample(NamedTuple):
    """The new token of a sequence and its logprobs if they were asked for, or why there is none."""

    token: int | None = None
    logprob: TokenLogprob | None = None
    error: str | None = None


class Result(NamedTuple):
    """What came of one chunk: its new tokens in order (several only where drafts were right), and more.

    `prompt_logprobs` are those of the tokens after each row of the chunk that has a prompt token after it;
    `pooled` is what the next chunk of a text to embed needs, `embedding` its end.
    """

    samples: Sequence[Sample] = ()
    prompt_logprobs: Sequence[TokenLogprob] = ()
    pooled: object | None = None
    embedding: tuple[float, ...] = ()
    error: str | None = None


NOTHING = Result()
