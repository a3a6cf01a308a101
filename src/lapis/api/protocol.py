"""OpenAI's objects for chat and text completions; requests are strict about names, types and ranges.

A field that we do not offer yet is refused by its name, unless its value says "without it". A field that
cannot change the answer (IGNORED) is accepted. Everything else is obeyed, or unknown, which is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from lapis.errors import InputError
from lapis.inference.request import MAX_STOP_LENGTH, MAX_STOP_STRINGS, MAX_TOP_LOGPROBS, SamplingParams

CHOICES = 128  # prompts x n in one request
SEED = 2**63 - 1
IGNORED = (
    "user",
    "metadata",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "parallel_tool_calls",
)


def _stops(value: object) -> object:
    """One stop string or a list of them, as a tuple."""
    if value is None:
        return None
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, list) or not all(isinstance(text, str) and text for text in strings):
        raise ValueError("must be a string or a list of strings, none of them empty")
    if len(strings) > MAX_STOP_STRINGS or any(len(text) > MAX_STOP_LENGTH for text in strings):
        raise ValueError(
            f"at most {MAX_STOP_STRINGS} stop strings of at most {MAX_STOP_LENGTH} characters are allowed"
        )
    return tuple(strings)


def _bias(value: object) -> object:
    """`{"token id": bias}` with the ids as integers."""
    if value is None:
        return None
    if not isinstance(value, dict):
        raise ValueError("must be an object of token ids and numbers from -100 to 100")
    biases: dict[int, float] = {}
    for name, bias in value.items():
        if not (isinstance(name, str) and name.isascii() and name.isdigit() and len(name) < 10):
            raise ValueError(f"{name!r} is not a token id")
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
            raise ValueError(f"the bias of token {name} must be a number from -100 to 100")
        biases[int(name)] = float(bias)
    return biases


def _is_one_of(value: object, free: tuple[object, ...]) -> bool:
    return any(type(value) is type(other) and value == other for other in free)  # true is not 1


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


class Body(BaseModel):
    """A JSON object of a request: no unknown fields, no conversion between types."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class StreamOptions(Body):
    """What a stream carries beside its tokens."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class GenerationRequest(Body):
    """The fields that chat and text completions share."""

    NOT_OFFERED: ClassVar[Mapping[str, tuple[Any, ...]]] = {}  # field: the values that mean "without it"

    model: Annotated[str, Field(min_length=1, max_length=256)]
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=CHOICES)] | None = 1
    max_tokens: Annotated[int, Field(ge=1, le=SEED)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = 1.0
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = 1.0
    top_k: Annotated[int, Field(ge=0, le=SEED)] | None = 0
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = 0.0
    seed: Annotated[int, Field(ge=-SEED, le=SEED)] | None = None
    stop: Annotated[tuple[str, ...] | None, BeforeValidator(lambda v: None if v is None else _stops(v))] = (
        None
    )
    presence_penalty: Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)] | None = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)] | None = 0.0
    logit_bias: Annotated[dict[int, float] | None, BeforeValidator(_bias)] = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_offered(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        for name in cls.NOT_OFFERED.keys() & values.keys():
            value = values[name]
            if value is not None and not any(
                type(value) is type(free) and value == free for free in cls.NOT_OFFERED[name]
            ):
                raise InputError(f"{name!r} is not offered by this server.", param=name)
        left_out = {*cls.NOT_OFFERED, *IGNORED}
        return {name: value for name, value in values.items() if name not in left_out}

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise InputError("'stream_options' is only allowed with 'stream': true.", param="stream_options")
        return self

    def sampling(self, max_tokens: int, logprobs: int | None) -> SamplingParams:
        """How the engine shall choose tokens. Raises InputError naming the field."""
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=_or(self.temperature, 1.0),
            top_p=_or(self.top_p, 1.0),
            top_k=self.top_k or 0,
            min_p=self.min_p or 0.0,
            seed=self.seed,
            stop=self.stop or (),
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=self.logit_bias or {},
            logprobs=logprobs,
        )

    @property
    def choices(self) -> int:
        """How many answers each prompt gets."""
        return self.n or 1

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return self.stream_options is not None and self.stream_options.include_usage


def _texts(value: object) -> object:
    """A message's content as one string: a string, or a list of text parts."""
    if isinstance(value, str):
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


class Message(Body):
    """One message of a chat. `developer` is read as `system`."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_texts)]
    name: Annotated[str, Field(min_length=1, max_length=64)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_tools(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        # The client's own answers, sent back as history, carry these fields as null or empty.
        extras = ("refusal", "audio", "function_call", "tool_calls", "annotations")
        for name in extras:
            if values.get(name):
                raise ValueError(f"the field {name!r} of a message is not offered")
        return {name: value for name, value in values.items() if name not in extras}

    def for_template(self) -> dict[str, str]:
        """The message as chat templates read it."""
        role = "system" if self.role == "developer" else self.role
        facts = {"role": role, "content": self.content}
        return facts if self.name is None else {**facts, "name": self.name}


class ChatRequest(GenerationRequest):
    """The body of POST /v1/chat/completions."""

    NOT_OFFERED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "response_format": ({"type": "text"},),
        "modalities": (["text"],),
        "store": (False,),
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
    def limit(self) -> int | None:
        """The most tokens to answer with; None is up to the end of the context."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def alternatives(self) -> int | None:
        """How many logprobs beside the chosen token's; None for no logprobs at all."""
        return (self.top_logprobs or 0) if self.logprobs else None


def _prompts(value: object) -> object:
    """A prompt or a list of them, each a string or token ids, as a tuple of strings and tuples of ids."""
    wanted = "must be a string, a list of strings, a list of token ids, or a list of such lists; none empty"
    prompts: list[Any] = value if isinstance(value, list) else [value]
    if prompts and all(_is_id(item) for item in prompts):
        prompts = [prompts]
    if not prompts:
        raise ValueError(wanted)
    if len(prompts) > CHOICES:
        raise ValueError(f"at most {CHOICES} prompts are allowed")
    for prompt in prompts:
        ids = isinstance(prompt, list) and all(_is_id(item) for item in prompt)
        if not prompt or not (isinstance(prompt, str) or ids):
            raise ValueError(wanted)
    return tuple(prompt if isinstance(prompt, str) else tuple(prompt) for prompt in prompts)


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


class CompletionRequest(GenerationRequest):
    """The body of POST /v1/completions."""

    NOT_OFFERED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "suffix": ("",),
        "best_of": (1,),
        "echo": (False,),
    }

    prompt: Annotated[tuple[str | tuple[int, ...], ...], BeforeValidator(_prompts)]
    max_tokens: Annotated[int, Field(ge=1, le=SEED)] | None = 16
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def _check_pairs(self) -> Self:
        if len(self.prompt) * self.choices > CHOICES:
            raise InputError(
                f"prompts x n is {len(self.prompt) * self.choices}; at most {CHOICES}.", param="n"
            )
        return self

    @property
    def limit(self) -> int | None:
        """The most tokens to answer with, 16 unless told, as OpenAI's."""
        return 16 if self.max_tokens is None else self.max_tokens


class PromptDetails(BaseModel):
    """Which prompt tokens were found in the cache."""

    cached_tokens: int = 0


class CompletionDetails(BaseModel):
    """Which answer tokens were hidden reasoning: none, our models have no such channel."""

    reasoning_tokens: int = 0


class Usage(BaseModel):
    """Tokens in and out of one request; a prompt counts once whatever n is."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails = CompletionDetails()


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
    """What the model said."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    """One of n answers."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(BaseModel):
    """The answer of POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str


class Delta(BaseModel):
    """What a chunk adds to the message; absent fields are left out."""

    role: Literal["assistant"] | None = None
    content: str | None = None

    @model_serializer(mode="wrap")
    def _leave_out_absent(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in handler(self).items() if value is not None}


class ChatChunkChoice(BaseModel):
    """A piece of one of n answers."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None


class ChatChunk(BaseModel):
    """One event of a chat stream."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    system_fingerprint: str


class TextLogprobs(BaseModel):
    """Logprobs of a text completion, in four parallel lists."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class TextChoice(BaseModel):
    """One answer to one prompt, or in a stream a piece of it."""

    index: int
    text: str
    logprobs: TextLogprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None


class TextCompletion(BaseModel):
    """The answer of POST /v1/completions, and one event of its stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage | None = None
    system_fingerprint: str


class ModelObject(BaseModel):
    """A model that is served, with what Lapis knows beside OpenAI's four fields."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    digest: str
    kind: str
    licence: str
    loaded: bool
    context: int | None
    bit_exact: bool | None
    kernels: str | None


class ModelList(BaseModel):
    """The answer of GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelObject]
