"""OpenAI's objects for text completions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, Field, WithJsonSchema, model_validator

from lapis.api.protocol.formats import read_structure
from lapis.api.protocol.generation import CHOICES, SEED, GenerationRequest, Usage
from lapis.errors import InputError
from lapis.inference.request import MAX_TOP_LOGPROBS, SamplingParams
from lapis.tokenizer.grammar import Grammar

BEST_OF = 20


def _prompts(value: object) -> object:
    return read_prompts(value, CHOICES)


def read_prompts(value: object, limit: int) -> object:
    """A text or a list of them, each a string or token ids, as a tuple of strings and tuples of ids.

    Raises ValueError.
    """
    wanted = "must be a string, a list of strings, a list of token ids, or a list of such lists; none empty"
    prompts: list[Any] = value if isinstance(value, list) else [value]
    if isinstance(value, list) and prompts and all(_is_id(item) for item in prompts):
        prompts = [prompts]
    if not prompts:
        raise ValueError(wanted)
    if len(prompts) > limit:
        raise ValueError(f"at most {limit} are allowed, got {len(prompts)}")
    for prompt in prompts:
        ids = isinstance(prompt, list) and all(_is_id(item) for item in prompt)
        if not prompt or not (isinstance(prompt, str) or ids):
            raise ValueError(wanted)
    return tuple(prompt if isinstance(prompt, str) else tuple(prompt) for prompt in prompts)


def texts_schema(limit: int) -> dict[str, Any]:
    """What `read_prompts` takes, as JSON schema."""
    ids = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
    text = {"type": "string", "minLength": 1}
    many = {"type": "array", "items": {"anyOf": [text, ids]}, "minItems": 1, "maxItems": limit}
    return {"anyOf": [text, ids, many]}


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


class CompletionRequest(GenerationRequest):
    """The body of POST /v1/completions."""

    NOT_OFFERED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "suffix": ("",),
    }

    prompt: Annotated[
        tuple[str | tuple[int, ...], ...], BeforeValidator(_prompts), WithJsonSchema(texts_schema(CHOICES))
    ]
    max_tokens: Annotated[int, Field(ge=0, le=SEED)] | None = 16
    echo: bool | None = False
    best_of: Annotated[int, Field(ge=1, le=BEST_OF)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def _check_pairs(self) -> Self:
        if self.best_of is not None and self.best_of < self.choices:
            raise InputError(f"best_of = {self.best_of} is less than n = {self.choices}.", param="best_of")
        if self.tried > self.choices and self.stream:
            raise InputError("best_of cannot be streamed: it is known at the end.", param="best_of")
        if self.max_tokens == 0 and not self.echo:
            raise InputError("max_tokens = 0 is only allowed with 'echo': true.", param="max_tokens")
        if len(self.prompt) * self.tried > CHOICES:
            raise InputError(f"prompts x n is {len(self.prompt) * self.tried}; at most {CHOICES}.", param="n")
        return self

    @property
    def tried(self) -> int:
        """How many answers are made for each prompt; the best `n` are given."""
        return self.best_of or self.choices

    @property
    def chosen_logprobs(self) -> int | None:
        """How many logprobs beside the chosen token's the answers need; None for no logprobs at all."""
        return 0 if self.logprobs is None and self.tried > self.choices else self.logprobs

    def sampling(self, max_tokens: int, logprobs: int | None) -> SamplingParams:
        """As for chats; an echo has its prompt's logprobs too."""
        params = super().sampling(max_tokens or 1, logprobs)
        if not self.echo:
            return params
        prompt = self.logprobs if self.logprobs is not None or max_tokens else 0
        return replace(params, max_tokens=max_tokens, prompt_logprobs=prompt)

    @property
    def form(self) -> Grammar | None:
        """What binds the form of the answer. Raises InputError."""
        return read_structure(self.structured_outputs)

    @property
    def limit(self) -> int | None:
        """The most tokens to answer with, 16 unless told, as OpenAI's."""
        return 16 if self.max_tokens is None else self.max_tokens


class TextLogprobs(BaseModel):
    """Logprobs of a text completion, in four parallel lists."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
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
