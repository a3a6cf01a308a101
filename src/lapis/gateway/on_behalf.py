"""Identities that are kept for work that outlives its request: batches and eval runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lapis.tenants.keys import ApiKeys, Identity
from lapis.tenants.limits import Limits
from lapis.tenants.tenant import Scope

WHO = ("organization_id", "project_id", "key_id", "user_id", "service_account_id")


def kept(identity: Identity) -> dict[str, Any]:
    """Who somebody is and what was allowed then, as JSON takes it."""
    who = {name: getattr(identity, name) for name in WHO}
    return {**who, "scopes": sorted(identity.scopes)}


def restored(facts: Mapping[str, Any], keys: ApiKeys) -> Identity:
    """In whose name work goes on, behind live traffic, with the models that the project may use now.

    Raises AuthError once the key that began it has ended.
    """
    if facts["key_id"] is not None:
        return replace(keys.identity(facts["key_id"]), background=True)
    scopes = frozenset(Scope(scope) for scope in facts["scopes"])
    models = Limits(keys.db).policy(facts["project_id"], facts["organization_id"])
    return Identity(**{**facts, "scopes": scopes}, background=True, models=models)
