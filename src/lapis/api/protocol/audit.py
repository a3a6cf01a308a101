"""OpenAI's audit log: events with their actor, their project, and what they were about."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict

from lapis.api.protocol.lists import Listed
from lapis.gateway.audit_events import Actor, Event

OWNERS = ("project_id", "organization_id")  # facts that the event tells elsewhere


class AuditEvent(Listed):
    """One act; under the name of its type stands what it was about."""

    model_config = ConfigDict(extra="allow")

    type: str
    effective_at: int
    actor: dict[str, Any]
    project: dict[str, str] | None


def audit_event(event: Event) -> AuditEvent:
    """An event as OpenAI's object."""
    project = None
    if event.project_id is not None:
        project = {"id": event.project_id, "name": event.project_name or event.project_id}
    return AuditEvent(
        id=event.id,
        type=event.type,
        effective_at=int(event.at),
        actor=_actor(event.actor),
        project=project,
        **{event.type: _details(event)},
    )


def _actor(actor: Actor) -> dict[str, Any]:
    if not actor.key:
        user = {"id": actor.user_id or actor.id, "email": actor.email}
        return {"type": "session", "session": {"user": user, "ip_address": None}, "api_key": None}
    kind: Literal["user", "service_account"] = (
        "user" if actor.service_account_id is None else "service_account"
    )
    key = {
        "id": actor.id,
        "type": kind,
        "user": None if actor.user_id is None else {"id": actor.user_id, "email": actor.email},
        "service_account": None if kind == "user" else {"id": actor.service_account_id},
    }
    return {"type": "api_key", "session": None, "api_key": key}


def _details(event: Event) -> dict[str, Any]:
    """The target's id, and the facts where OpenAI's event of this kind has them."""
    facts = {name: value for name, value in event.facts.items() if name not in OWNERS}
    if isinstance(facts.get("scopes"), str):
        facts["scopes"] = facts["scopes"].split()
    if event.type.startswith("role.assignment."):
        return {
            "id": f"{event.project_id}-{event.target}",
            "principal_id": event.target,
            "principal_type": "user",
            "resource_id": event.project_id,
            "resource_type": "api.project",
        }
    if event.type == "rate_limit.updated":
        id = f"rl-{facts.pop('model', '')}"
        return {"id": id, "changes_requested": _rates(facts)}
    if event.type.endswith(".deleted"):
        return {"id": event.target}
    place = "changes_requested" if event.type.endswith(".updated") else "data"
    if "name" in facts and event.type.startswith("project."):
        facts["title"] = facts["name"]
    return {"id": event.target, place: facts}


def _rates(facts: dict[str, Any]) -> dict[str, Any]:
    names = {
        "requests_per_minute": "max_requests_per_1_minute",
        "tokens_per_minute": "max_tokens_per_1_minute",
        "requests_per_day": "max_requests_per_1_day",
        "batch_tokens_per_day": "batch_1_day_max_input_tokens",
    }
    return {names.get(name, name): value for name, value in facts.items() if value is not None}
