"""Wire shapes of fine_tuning.alpha.graders."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

from pydantic import BaseModel, Field

from lapis.api.protocol.generation import Body
from lapis.evaluate.graders.grader import Grader
from lapis.evaluate.graders.grading import Grading

SAMPLE_LENGTH = 4 << 20  # characters


class GraderValidateRequest(Body):
    """A grader to be checked."""

    grader: Grader


class GraderRunRequest(Body):
    """A grader, and what it is to grade."""

    grader: Grader
    model_sample: Annotated[str, Field(max_length=SAMPLE_LENGTH)]
    item: Any = None


class GraderValidateResponse(BaseModel):
    """The grader as it was understood."""

    grader: dict[str, Any]


class GraderErrors(BaseModel):
    """OpenAI's flags of what went wrong."""

    formula_parse_error: bool
    sample_parse_error: bool
    truncated_observation_error: bool
    unresponsive_reward_error: bool
    invalid_variable_error: bool
    other_error: bool
    python_grader_server_error: bool
    python_grader_server_error_type: str | None
    python_grader_runtime_error: bool
    python_grader_runtime_error_details: str | None
    model_grader_server_error: bool
    model_grader_refusal_error: bool
    model_grader_parse_error: bool
    model_grader_server_error_details: str | None


class GraderMetadata(BaseModel):
    """How a reward came about."""

    name: str
    type: str
    errors: GraderErrors
    execution_time: float
    scores: dict[str, float]
    token_usage: int | None
    sampled_model_name: str | None


class GraderTokens(BaseModel):
    """What a model that grades has read and written."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    total_tokens: int


class GraderRunResponse(BaseModel):
    """A reward, and how it came about."""

    reward: float
    metadata: GraderMetadata
    sub_rewards: dict[str, float]
    model_grader_token_usage_per_model: dict[str, GraderTokens]


def grader_object(grader: Grader) -> dict[str, Any]:
    """A grader as it was sent."""
    return grader.model_dump(mode="json", exclude_unset=True)


def grader_run_response(grading: Grading) -> GraderRunResponse:
    """A grading on the wire."""
    used = {
        model: GraderTokens(
            prompt_tokens=tokens.prompt_tokens,
            completion_tokens=tokens.completion_tokens,
            cached_tokens=tokens.cached_tokens,
            total_tokens=tokens.total_tokens,
        )
        for model, tokens in grading.usage.items()
    }
    metadata = GraderMetadata(
        name=grading.name,
        type=grading.type,
        errors=GraderErrors(**asdict(grading.errors)),
        execution_time=grading.seconds,
        scores=grading.sub_rewards or {grading.name: grading.reward},
        token_usage=sum(tokens.total_tokens for tokens in used.values()) if used else None,
        sampled_model_name=next(iter(used)) if len(used) == 1 else None,
    )
    return GraderRunResponse(
        reward=grading.reward,
        metadata=metadata,
        sub_rewards=grading.sub_rewards,
        model_grader_token_usage_per_model=used,
    )
