"""OpenAI's objects for chat completions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    WithJsonSchema,
    model_serializer,
    model_validator,
)

from lapis.api.protocol.formats import one_form, read_format, read_structure
from lapis.api.protocol.generation import SEED, Body, GenerationRequest, Usage
from lapis.errors import InputError
from lapis.inference.request import MAX_TOP_LOGPROBS
from lapis.tokenizer.grammar import Grammar

ChatFinish = Literal["stop", "length", "tool_calls"]


def _texts(value: object) -> object:
    """A message's content as one string: a string, or a list of text parts."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise ValueError("must be a string or a list of text parts")
    texts = []
    for part in value:
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise ValueError("every part must be an object with a type")
        if part["type"] != "text":
            raise ValueError(f"parts of type {part['type'][:40]!r} are not offered, only 'text'")
        if set(part) != {"type", "text"} or not isinstance(part["text"], str):
            raise ValueError("a text part has exactly the fields 'type' and 'text' (a string)")
        texts.append(part["text"])
    return "".join(texts)


CONTENT = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                "required": ["type", "text"],
                "additionalProperties": False,
            },
            "minItems": 1,
        },
        {"type": "null"},
    ]
}


class CalledFunction(Body):
    """Which function a call is of; `arguments` is JSON as text."""

    name: Annotated[str, Field(min_length=1, max_length=64)]
    arguments: str


class ToolCall(Body):
    """A call that an assistant made."""

    id: Annotated[str, Field(min_length=1, max_length=256)]
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Body):
    """One message of a chat. `developer` is read as `system`."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str | None, BeforeValidator(_texts), WithJsonSchema(CONTENT)] = None
    name: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=128)] | None = None
    tool_call_id: Annotated[str, Field(min_length=1, max_length=256)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _leave_out_nothing(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        # The client's own answers, sent back as history, carry these fields as null or empty.
        extras = ("refusal", "audio", "function_call", "annotations")
        for name in extras:
            if values.get(name):
                raise ValueError(f"the field {name!r} of a message is not offered")
        return {name: value for name, value in values.items() if name not in extras}

    @model_validator(mode="after")
    def _check_calls(self) -> Self:
        if self.content is None and not self.tool_calls:
            raise ValueError("a message needs content; only an assistant's with tool_calls may have none")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("only an assistant's message has tool_calls")
        if (self.tool_call_id is None) == (self.role == "tool"):
            raise ValueError("exactly messages of role tool have a tool_call_id")
        return self

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates read it."""
        facts: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role}
        facts["content"] = self.content or ""
        if self.name is not None:
            facts["name"] = self.name
        if self.tool_calls:
            facts["tool_calls"] = [call.model_dump() for call in self.tool_calls]
        if self.tool_call_id is not None:
            facts["tool_call_id"] = self.tool_call_id
        return facts


class ChatRequest(GenerationRequest):
    """The body of POST /v1/chat/completions."""

    NOT_OFFERED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "functions": ([],),
        "function_call": ("none", "auto"),
        "modalities": (["text"],),
        "audio": (),
        "moderation": (),
        "prediction": (),
        "reasoning_effort": ("none",),
        "verbosity": (),
        "web_search_options": (),
    }

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=SEED)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = True
    response_format: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check_pairs(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise InputError("'top_logprobs' is only allowed with 'logprobs': true.", param="top_logprobs")
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise InputError(
                "'max_tokens' and 'max_completion_tokens' differ; give one of them.", param="max_tokens"
            )
        return self

    @property
    def form(self) -> Grammar | None:
        """What binds the form of the answer. Raises InputError."""
        form = read_format(self.response_format, "response_format", nested=True)
        return one_form(form, read_structure(self.structured_outputs))

    @property
    def limit(self) -> int | None:
        """The most tokens to answer with; None is up to the end of the context."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def alternatives(self) -> int | None:
        """How many logprobs beside the chosen token's; None for no logprobs at all."""
        return (self.top_logprobs or 0) if self.logprobs else None


class TopLogprob(BaseModel):
    """A token that could have stood here: its text, bytes and natural-log probability."""

    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(TopLogprob):
    """The token that stands here, and its alternatives."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Logprobs of an answer or of one piece of it."""

    content: list[ChatLogprob]
    refusal: None = None


class AnswerMessage(BaseModel):
    """What the model said, and the calls that it asks for."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    tool_calls: list[ToolCall] | None = None

    @model_serializer(mode="wrap")
    def _leave_out_no_calls(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in handler(self).items() if value or name != "tool_calls"}


class ChatChoice(BaseModel):
    """One of n answers."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinish


class ChatCompletion(BaseModel):
    """The answer of POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str


class CallDelta(BaseModel):
    """A call in a stream: it comes whole, in one chunk."""

    index: int
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class Delta(BaseModel):
    """What a chunk adds to the message; absent fields are left out."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[CallDelta] | None = None

    @model_serializer(mode="wrap")
    def _leave_out_absent(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in handler(self).items() if value is not None}


class ChatChunkChoice(BaseModel):
    """A piece of one of n answers."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: ChatFinish | None = None


class ChatChunk(BaseModel):
    """One event of a chat stream."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    system_fingerprint: str
