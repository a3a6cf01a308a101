"""OpenAI's lists: one shape for all that are walked by `after`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Generic, Literal, TypeVar

from fastapi import Query
from pydantic import BaseModel

Limit = Annotated[int, Query(ge=1, le=100)]
After = Annotated[str | None, Query()]
Ordered = Annotated[Literal["asc", "desc"], Query()]


class Listed(BaseModel):
    """An object that lists are made of."""

    id: str


Item = TypeVar("Item", bound=Listed)


class ListPage(BaseModel, Generic[Item]):
    """A page of a list. The client asks for the next one with `after` = `last_id`."""

    object: Literal["list"] = "list"
    data: list[Item]
    first_id: str | None
    last_id: str | None
    has_more: bool


def list_page(items: Sequence[Item], has_more: bool) -> ListPage[Item]:
    """Objects with an `id` as a page."""
    ends = (items[0].id, items[-1].id) if items else (None, None)
    return ListPage(data=list(items), first_id=ends[0], last_id=ends[1], has_more=has_more)


class Deleted(Listed):
    """The answer to a deletion."""

    object: str
    deleted: Literal[True] = True
