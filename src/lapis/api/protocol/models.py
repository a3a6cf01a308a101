"""OpenAI's objects for models."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel


class ModelObject(BaseModel):
    """A model that is served, with what Lapis knows beside OpenAI's four fields."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    digest: str
    kind: str
    parent: str | None  # the model that it is an adapter of
    licence: str
    loaded: bool
    context: int | None
    bit_exact: bool | None
    kernels: str | None
    replay: bool | None  # small steps are repeated by one call, not computed op by op
    weights: str | None  # "bf16", "fp32", or the bits that they are kept in
    cache_dtype: str | None  # of keys and values


class ModelList(BaseModel):
    """The answer of GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelObject]
