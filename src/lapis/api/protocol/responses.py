"""OpenAI's objects for responses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, Field, WithJsonSchema, model_validator

from lapis.api.protocol.chat import ChatLogprob
from lapis.api.protocol.formats import one_form, read_format, read_structure
from lapis.api.protocol.generation import SEED, Body, SampledRequest, number_or
from lapis.api.protocol.items import MAX_ITEMS, Item, read_items
from lapis.api.protocol.metadata import Metadata
from lapis.errors import InputError
from lapis.inference.request import MAX_TOP_LOGPROBS, SamplingParams
from lapis.tokenizer.grammar import Grammar
from lapis.tokenizer.tools import ToolChoice, read_choice, read_tools

LOGPROBS = "message.output_text.logprobs"  # the only part of `include` that concerns text
INPUT = {
    "anyOf": [
        {"type": "string", "minLength": 1},
        {"type": "array", "items": {"type": "object"}, "minItems": 1, "maxItems": MAX_ITEMS},
    ]
}


class TextOptions(Body):
    """The form of the text."""

    format: dict[str, Any] | None = None
    verbosity: Literal["medium"] | None = None


class ResponseStreamOptions(Body):
    """What a stream carries beside its events."""

    include_obfuscation: Literal[False] = False


class InputRequest(SampledRequest):
    """What a response is made from: the body of POST /v1/responses/input_tokens."""

    NOT_OFFERED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "background": (False,),
        "conversation": (),
        "context_management": ([],),
        "prompt": (),
        "reasoning": ({}, {"effort": "none"}),
        "moderation": (),
    }

    input: Annotated[Any, WithJsonSchema(INPUT)]  # read by read_items, which names the place of a mistake
    instructions: str | None = None
    previous_response_id: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = True
    text: TextOptions | None = None
    truncation: Literal["disabled"] | None = "disabled"
    structured_outputs: dict[str, Any] | None = None

    @property
    def items(self) -> list[Item]:
        """The input as items. Raises InputError."""
        return read_items(self.input)

    @property
    def form(self) -> Grammar | None:
        """What binds the form of the answer. Raises InputError."""
        described = None if self.text is None else self.text.format
        return one_form(
            read_format(described, "text.format", nested=False), read_structure(self.structured_outputs)
        )

    @property
    def choice(self) -> ToolChoice:
        """Whether calls may or must come. Raises InputError."""
        return read_choice(self.tool_choice, read_tools(self.tools or []))


class ResponseRequest(InputRequest):
    """The body of POST /v1/responses."""

    stream_options: ResponseStreamOptions | None = None
    store: bool | None = True
    max_output_tokens: Annotated[int, Field(ge=1, le=SEED)] | None = None
    max_tool_calls: Annotated[int, Field(ge=1, le=SEED)] | None = None  # of OpenAI's own tools: none here
    metadata: Metadata = Field(default_factory=dict)
    include: Annotated[list[str], Field(max_length=8)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        unknown = next((name for name in self.include or () if name != LOGPROBS), None)
        if unknown is not None:
            raise InputError(f"include takes {LOGPROBS!r} only, got {unknown[:80]!r}.", param="include")
        if self.stream_options is not None and not self.stream:
            raise InputError("'stream_options' is only allowed with 'stream': true.", param="stream_options")
        return self

    @property
    def alternatives(self) -> int | None:
        """How many logprobs beside the chosen token's; None for no logprobs at all."""
        return (self.top_logprobs or 0) if LOGPROBS in (self.include or ()) or self.top_logprobs else None

    def sampling(self, max_tokens: int) -> SamplingParams:
        """How the engine shall choose tokens. Raises InputError naming the field."""
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=number_or(self.temperature, 1.0),
            top_p=number_or(self.top_p, 1.0),
            top_k=self.top_k or 0,
            min_p=self.min_p or 0.0,
            seed=self.seed,
            logprobs=self.alternatives,
        )


class OutputText(BaseModel):
    """A text that the model said."""

    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[None] = []
    logprobs: list[ChatLogprob] = []


class OutputMessage(BaseModel):
    """An item: what the model said."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    status: Literal["in_progress", "completed", "incomplete"]
    content: list[OutputText]


class OutputCall(BaseModel):
    """An item: a call that the model asks for."""

    id: str
    type: Literal["function_call"] = "function_call"
    status: Literal["in_progress", "completed", "incomplete"]
    call_id: str
    name: str
    arguments: str


class InputDetails(BaseModel):
    """Which input tokens were found in the cache."""

    cached_tokens: int
    cache_write_tokens: int = 0


class OutputDetails(BaseModel):
    """Which output tokens were hidden reasoning: none."""

    reasoning_tokens: int = 0


class ResponseUsage(BaseModel):
    """Tokens in and out of one response."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails = OutputDetails()
    total_tokens: int


class ResponseObject(BaseModel):
    """The answer of POST /v1/responses."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None = None
    status: Literal["in_progress", "completed", "incomplete", "failed"] = "in_progress"
    background: Literal[False] = False
    error: dict[str, str] | None = None
    incomplete_details: dict[str, str] | None = None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    metadata: dict[str, str]
    model: str
    output: list[OutputMessage | OutputCall] = []
    parallel_tool_calls: bool
    previous_response_id: str | None
    reasoning: dict[str, None] = {"effort": None, "summary": None}
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"] = "disabled"
    usage: ResponseUsage | None = None
    user: None = None


class DeletedResponse(BaseModel):
    """The answer of DELETE /v1/responses/{id}."""

    id: str
    object: Literal["response"] = "response"
    deleted: Literal[True] = True


class ItemList(BaseModel):
    """One page of the items that a response was given."""

    object: Literal["list"] = "list"
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool


class InputTokens(BaseModel):
    """How many tokens an input has."""

    object: Literal["response.input_tokens"] = "response.input_tokens"
    input_tokens: int
