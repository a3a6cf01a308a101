"""Token logprobs in OpenAI's two shapes."""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from typing import TypedDict

from lapis.api.protocol.chat import ChatLogprob, ChatLogprobs, TopLogprob
from lapis.api.protocol.completions import TextLogprobs
from lapis.inference.request import TokenLogprob

LOWEST = -9999.0  # what stands for minus infinity, which JSON does not have


def chat_logprobs(tokens: Iterable[TokenLogprob]) -> ChatLogprobs:
    """The shape of chat completions."""
    return ChatLogprobs(
        content=[
            ChatLogprob(**_facts(token), top_logprobs=[TopLogprob(**_facts(other)) for other in token.top])
            for token in tokens
        ]
    )


class TextLogprobsWriter:
    """The shape of text completions; remembers where the next token begins, for streams."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._offset = 0

    def write(self, tokens: Iterable[TokenLogprob]) -> TextLogprobs:
        """The next tokens. `text_offset` counts whole characters before each token."""
        tokens = list(tokens)
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(self._decoder.decode(token.token))
        return TextLogprobs(
            tokens=[_text(token) for token in tokens],
            token_logprobs=[_logprob(token) for token in tokens],
            top_logprobs=[{_text(other): _logprob(other) for other in token.top} for token in tokens],
            text_offset=offsets,
        )


class _Facts(TypedDict):
    token: str
    logprob: float
    bytes: list[int]


def _facts(token: TokenLogprob) -> _Facts:
    return _Facts(token=_text(token), logprob=_logprob(token), bytes=list(token.token))


def _text(token: TokenLogprob) -> str:
    return token.token.decode("utf-8", errors="replace")


def _logprob(token: TokenLogprob) -> float:
    return max(token.logprob, LOWEST)
