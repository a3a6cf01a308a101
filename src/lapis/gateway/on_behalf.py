"""Identities that are kept for work that goes on later: eval runs and what else outlives its request."""

from __future__ import annotations

import json
from dataclasses import replace

from lapis.tenants.keys import ApiKeys, Identity
from lapis.tenants.limits import Limits
from lapis.tenants.tenant import Scope

WHO = ("organization_id", "project_id", "key_id", "user_id", "service_account_id")


def kept(identity: Identity) -> str:
    """Who somebody is and what was allowed then, as JSON."""
    who = {name: getattr(identity, name) for name in WHO}
    return json.dumps({**who, "scopes": sorted(identity.scopes)})


def restored(text: str, keys: ApiKeys) -> Identity:
    """In whose name work goes on, behind live traffic, with the models that the project may use now.

    Raises AuthError once the key that began it has ended.
    """
    facts = json.loads(text)
    if facts["key_id"] is not None:
        return replace(keys.identity(facts["key_id"]), background=True)
    scopes = frozenset(Scope(scope) for scope in facts["scopes"])
    models = Limits(keys.db).policy(facts["project_id"], facts["organization_id"])
    return Identity(**{**facts, "scopes": scopes}, background=True, models=models)
