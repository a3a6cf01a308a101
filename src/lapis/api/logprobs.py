"""Token logprobs in OpenAI's two shapes."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
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

    def write(
        self, tokens: Sequence[TokenLogprob], before: Sequence[TokenLogprob | bytes] = ()
    ) -> TextLogprobs:
        """The next tokens; `before` are those of an echoed prompt, bytes where one has no logprob.

        `text_offset` counts whole characters before each token.
        """
        written = TextLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        tops: list[dict[str, float] | None] = []
        for token in (*before, *tokens):
            raw = token if isinstance(token, bytes) else token.token
            written.text_offset.append(self._offset)
            self._offset += len(self._decoder.decode(raw))
            written.tokens.append(raw.decode("utf-8", errors="replace"))
            if isinstance(token, bytes):
                written.token_logprobs.append(None)
                tops.append(None)
            else:
                written.token_logprobs.append(_logprob(token))
                tops.append({_text(other): _logprob(other) for other in token.top})
        written.top_logprobs = tops
        return written


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
