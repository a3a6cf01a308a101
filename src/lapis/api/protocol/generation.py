"""The fields that requests for text share; they are strict about names, types and ranges.

A field that we do not offer yet is refused by its name, unless its value says "without it". A field that
cannot change the answer (IGNORED) is accepted. Everything else is obeyed, or unknown, which is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

from lapis.errors import InputError
from lapis.inference.request import MAX_STOP_LENGTH, MAX_STOP_STRINGS, SamplingParams

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
    "store",  # of chats; the Responses API has a field of that name
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


def number_or(value: float | None, default: float) -> float:
    """A value, or what null stands for."""
    return default if value is None else value


STOP = {
    "anyOf": [
        {"type": "string", "minLength": 1, "maxLength": MAX_STOP_LENGTH},
        {
            "type": "array",
            "items": {"type": "string", "minLength": 1, "maxLength": MAX_STOP_LENGTH},
            "maxItems": MAX_STOP_STRINGS,
        },
        {"type": "null"},
    ]
}


class Body(BaseModel):
    """A JSON object of a request: no unknown fields, no conversion between types."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class StreamOptions(Body):
    """What a stream carries beside its tokens."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class SampledRequest(Body):
    """What every request for text has: a model, how its tokens are chosen, and whether they are streamed."""

    NOT_OFFERED: ClassVar[Mapping[str, tuple[Any, ...]]] = {}  # field: the values that mean "without it"

    model: Annotated[str, Field(min_length=1, max_length=256)]
    stream: bool | None = False
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = 1.0
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = 1.0
    top_k: Annotated[int, Field(ge=0, le=SEED)] | None = 0
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = 0.0
    seed: Annotated[int, Field(ge=-SEED, le=SEED)] | None = None

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
        left_out = {*cls.NOT_OFFERED, *IGNORED} - cls.model_fields.keys()
        return {name: value for name, value in values.items() if name not in left_out}


class GenerationRequest(SampledRequest):
    """The fields that chat and text completions share."""

    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=CHOICES)] | None = 1
    max_tokens: Annotated[int, Field(ge=1, le=SEED)] | None = None
    stop: Annotated[tuple[str, ...] | None, BeforeValidator(_stops), WithJsonSchema(STOP)] = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)] | None = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)] | None = 0.0
    logit_bias: Annotated[dict[int, float] | None, BeforeValidator(_bias)] = None
    structured_outputs: dict[str, Any] | None = None
    ignore_eos: bool | None = False

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise InputError("'stream_options' is only allowed with 'stream': true.", param="stream_options")
        return self

    def sampling(self, max_tokens: int, logprobs: int | None) -> SamplingParams:
        """How the engine shall choose tokens. Raises InputError naming the field."""
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=number_or(self.temperature, 1.0),
            top_p=number_or(self.top_p, 1.0),
            top_k=self.top_k or 0,
            min_p=self.min_p or 0.0,
            seed=self.seed,
            stop=self.stop or (),
            stop_ids=frozenset() if self.ignore_eos else None,
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
