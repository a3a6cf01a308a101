"""OpenAI's objects for moderation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictStr, WithJsonSchema

from lapis.gateway.moderation import CATEGORIES, FLAGGED

MAX_INPUTS = 128
OPENAIS = (
    "omni-moderation-latest",
    "omni-moderation-2024-09-26",
    "text-moderation-latest",
    "text-moderation-stable",
)


def _texts(value: object) -> object:
    """A text, texts, or parts that are texts: OpenAI judges all parts together."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not 0 < len(value) <= MAX_INPUTS:
        raise ValueError(f"must be a text, or a list of 1 to {MAX_INPUTS} texts")
    if all(isinstance(one, str) for one in value):
        return value
    for index, part in enumerate(value):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f"item {index} is no text; images are not judged")
    return ["\n".join(part["text"] for part in value)]


SCHEMA = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]}


class ModerationRequest(BaseModel):
    """The body of POST /v1/moderations."""

    model_config = ConfigDict(extra="forbid")

    input: Annotated[list[StrictStr], BeforeValidator(_texts), WithJsonSchema(SCHEMA)]
    model: Annotated[StrictStr, Field(max_length=256)] | None = None


class Judgement(BaseModel):
    """What was found in one text; each object has every category of OpenAI's."""

    flagged: bool
    categories: dict[str, bool]
    category_scores: dict[str, float]
    category_applied_input_types: dict[str, list[Literal["text"]]]


class ModerationObject(BaseModel):
    """What was found; `model` says by what."""

    id: str
    model: str
    results: list[Judgement]


def judgement(scores: Mapping[str, float]) -> Judgement:
    """Scores in OpenAI's shape."""
    whole = {name: scores.get(name, 0.0) for name in CATEGORIES}
    categories = {name: score >= FLAGGED for name, score in whole.items()}
    kinds: dict[str, Any] = {name: ["text"] for name in CATEGORIES}
    return Judgement(
        flagged=any(categories.values()),
        categories=categories,
        category_scores=whole,
        category_applied_input_types=kinds,
    )
