"""vLLM's objects for /tokenize and /detokenize."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import BaseModel, Field, model_validator

from lapis.api.protocol.chat import Message
from lapis.api.protocol.generation import Body
from lapis.errors import InputError


class TokenizeRequest(Body):
    """The body of POST /tokenize: a prompt, or the messages of a chat."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)] | None = None
    add_special_tokens: bool = True
    return_token_strs: bool | None = False

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise InputError("Give either 'prompt' or 'messages'.", param="prompt")
        if self.messages is not None and not self.add_special_tokens:
            raise InputError(
                "A chat template decides about special tokens itself.", param="add_special_tokens"
            )
        return self


class Tokens(BaseModel):
    """The answer of POST /tokenize; `max_model_len` is the model's context."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(Body):
    """The body of POST /detokenize."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    tokens: list[int]


class Text(BaseModel):
    """The answer of POST /detokenize."""

    prompt: str
