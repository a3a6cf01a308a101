"""OpenAI's rate limits, model permissions and spend limits."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal

from pydantic import BaseModel, Field

from lapis.api.protocol.generation import Body
from lapis.api.protocol.lists import Listed
from lapis.tenants.policy import ModelPolicy
from lapis.tenants.quota import Quota

UNLIMITED = 2**53 - 1  # what stands for no limit where OpenAI's type wants a number
PREFIX = "rl-"

Most = Annotated[int, Field(ge=0, le=UNLIMITED)]
ModelName = Annotated[str, Field(min_length=1, max_length=256)]


class RateLimitObject(Listed):
    """The limits of one model in a project. 2^53 - 1 is no limit."""

    object: Literal["project.rate_limit"] = "project.rate_limit"
    model: str
    max_requests_per_1_minute: int
    max_tokens_per_1_minute: int
    max_requests_per_1_day: int | None
    batch_1_day_max_input_tokens: int | None


def rate_limit_object(model: str, quota: Quota) -> RateLimitObject:
    """A model's limits as OpenAI's object."""
    minute = (quota.requests_per_minute, quota.tokens_per_minute)
    requests, tokens = (UNLIMITED if limit is None else limit for limit in minute)
    return RateLimitObject(
        id=f"{PREFIX}{model}",
        model=model,
        max_requests_per_1_minute=requests,
        max_tokens_per_1_minute=tokens,
        max_requests_per_1_day=quota.requests_per_day,
        batch_1_day_max_input_tokens=quota.batch_tokens_per_day,
    )


class RateLimitFields(Body):
    """New limits; those that are not named stay. 2^53 - 1 takes one away. Lapis serves neither images nor audio."""

    max_requests_per_1_minute: Most | None = None
    max_tokens_per_1_minute: Most | None = None
    max_requests_per_1_day: Most | None = None
    batch_1_day_max_input_tokens: Most | None = None
    max_images_per_1_minute: None = None
    max_audio_megabytes_per_1_minute: None = None

    def applied(self, quota: Quota) -> Quota:
        """The limits with these in place of the old ones."""
        new = {
            "requests_per_minute": self.max_requests_per_1_minute,
            "tokens_per_minute": self.max_tokens_per_1_minute,
            "requests_per_day": self.max_requests_per_1_day,
            "batch_tokens_per_day": self.batch_1_day_max_input_tokens,
        }
        given = {name: limit for name, limit in new.items() if limit is not None}
        return replace(
            quota, **{name: None if limit == UNLIMITED else limit for name, limit in given.items()}
        )


class PolicyObject(BaseModel):
    """Which models a project may use."""

    object: Literal["project.model_permissions"] = "project.model_permissions"
    mode: Literal["allow_list", "deny_list"]
    model_ids: list[str]


class PolicyFields(Body):
    """A policy for a project's models."""

    mode: Literal["allow_list", "deny_list"]
    model_ids: Annotated[list[ModelName], Field(max_length=1000)]


def policy_object(policy: ModelPolicy) -> PolicyObject:
    """A policy as OpenAI's object; a project without one denies nothing."""
    return PolicyObject(mode=policy.mode, model_ids=sorted(policy.models))


class Removed(BaseModel):
    """The answer to the removal of what has no id."""

    object: str
    deleted: Literal[True] = True


class Enforcement(BaseModel):
    """Whether requests are refused now."""

    status: Literal["inactive", "enforcing"]


class SpendLimitObject(BaseModel):
    """What may be spent in a month, in cents."""

    object: Literal["organization.spend_limit", "project.spend_limit"]
    currency: str
    interval: Literal["month"] = "month"
    threshold_amount: int
    enforcement: Enforcement


class SpendLimitFields(Body):
    """A limit on spending, in cents of the price list's currency."""

    currency: Annotated[str, Field(pattern="^[A-Z]{3}$")]
    interval: Literal["month"]
    threshold_amount: Most
