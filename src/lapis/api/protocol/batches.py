"""OpenAI's batches."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, StrictStr

from lapis.api.protocol.lists import Listed
from lapis.api.protocol.metadata import Metadata
from lapis.api.protocol.uploads import ExpiresAfter
from lapis.gateway.batches import Batch

Endpoint = Literal[
    "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/moderations"
]
Status = Literal[
    "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
]


class BatchRequest(BaseModel):
    """Run the requests of a file."""

    model_config = ConfigDict(extra="forbid")

    input_file_id: StrictStr
    endpoint: Endpoint
    completion_window: Literal["24h"]
    metadata: Metadata | None = None
    output_expires_after: ExpiresAfter | None = None


class Counts(BaseModel):
    """Requests of a batch; those that were not run in time count as failed."""

    total: int
    completed: int
    failed: int


class BatchErrorFacts(BaseModel):
    """What is wrong with a line of the input."""

    code: str
    line: int | None
    message: str
    param: str | None


class BatchErrors(BaseModel):
    """What is wrong with the input."""

    object: Literal["list"] = "list"
    data: list[BatchErrorFacts]


class CachedTokens(BaseModel):
    """Of the input's tokens."""

    cached_tokens: int


class ReasoningTokens(BaseModel):
    """Of the output's tokens."""

    reasoning_tokens: int = 0


class BatchUsage(BaseModel):
    """Tokens of the requests that succeeded."""

    input_tokens: int
    input_tokens_details: CachedTokens
    output_tokens: int
    output_tokens_details: ReasoningTokens = ReasoningTokens()
    total_tokens: int


class BatchObject(Listed):
    """A batch."""

    object: Literal["batch"] = "batch"
    endpoint: str
    model: str | None
    errors: BatchErrors | None
    input_file_id: str
    completion_window: Literal["24h"] = "24h"
    status: Status
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: Counts
    usage: BatchUsage
    metadata: dict[str, str] | None


STAMPS = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")


def batch_object(batch: Batch) -> BatchObject:
    """A batch as OpenAI's object."""
    facts, used = batch.facts, batch.usage
    stamps: dict[str, Any] = {f"{name}_at": _seconds(facts.get(f"{name}_at")) for name in STAMPS}
    errors = facts.get("errors")
    return BatchObject(
        id=batch.id,
        endpoint=batch.endpoint,
        model=facts.get("model"),
        errors=None if errors is None else BatchErrors(data=errors),
        input_file_id=batch.input_file_id,
        status=batch.status,  # type: ignore[arg-type]
        output_file_id=facts.get("output_file_id"),
        error_file_id=facts.get("error_file_id"),
        created_at=int(batch.created_at),
        expires_at=int(batch.expires_at),
        request_counts=Counts(total=batch.total, completed=batch.completed, failed=batch.failed),
        usage=BatchUsage(
            input_tokens=used.prompt_tokens,
            input_tokens_details=CachedTokens(cached_tokens=used.cached_tokens),
            output_tokens=used.completion_tokens,
            total_tokens=used.total_tokens,
        ),
        metadata=facts["metadata"],
        **stamps,
    )


def _seconds(at: float | None) -> int | None:
    return None if at is None else int(at)
