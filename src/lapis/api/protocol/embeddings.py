"""OpenAI's objects for embeddings."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, WithJsonSchema, model_validator

from lapis.api.protocol.completions import read_prompts, texts_schema
from lapis.api.protocol.generation import IGNORED, Body

MAX_TEXTS = 2048


def _texts(value: object) -> object:
    return read_prompts(value, MAX_TEXTS)


class EmbeddingRequest(Body):
    """The body of POST /v1/embeddings."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    input: Annotated[
        tuple[str | tuple[int, ...], ...], BeforeValidator(_texts), WithJsonSchema(texts_schema(MAX_TEXTS))
    ]
    encoding_format: Literal["float", "base64"] | None = "float"
    dimensions: Annotated[int, Field(ge=1, le=2**31)] | None = None
    pooling: Literal["mean", "last"] | None = "mean"

    @model_validator(mode="before")
    @classmethod
    def _ignore(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if name not in IGNORED}


class Embedding(BaseModel):
    """One text's vector: numbers, or their little-endian 32-bit floats in base64."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    """The tokens that were read."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(BaseModel):
    """The answer of POST /v1/embeddings."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage
