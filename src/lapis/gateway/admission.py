"""Who may come in: a bearer key becomes an Identity, or an Administrator. Limits follow where work begins."""

from __future__ import annotations

import time
from dataclasses import replace

from lapis.errors import AuthError
from lapis.tenants.admin_keys import ADMIN_MARK, LOCAL_OWNER, Administrator, AdminKeys
from lapis.tenants.keys import LOCAL, ApiKeys, Identity
from lapis.tenants.limits import Limits
from lapis.tenants.policy import EVERY_MODEL
from lapis.tenants.secret import MARK

FRESH = 1.0  # seconds for which the local user's policy is believed


def priority_of(identity: Identity) -> int:
    """The priority in the engine of what somebody asks for: the lower one waits and gives up its place."""
    return -1 if identity.background else 0


class Admission:
    """A server's door. Without `keys_required` (loopback only) whoever shows no key is the local user."""

    def __init__(self, keys: ApiKeys, keys_required: bool) -> None:
        self.keys = keys
        self.admin_keys = AdminKeys(keys.db, keys.clock)
        self.keys_required = keys_required
        self._in_file = keys.db.dialect.name == "sqlite"
        self._policy = EVERY_MODEL
        self._looked_at = float("-inf")

    def quick(self, key: str | None) -> bool:
        """Whether `identify` reads a row or two of a file: sooner done than a thread is woken for it."""
        return self._in_file and not (key or "").startswith(f"{ADMIN_MARK}_")

    def identify(self, key: str | None) -> Identity:
        """Whose key this is, looked up each time: a revoked key is refused at once. Raises AuthError."""
        if key is not None and (self.keys_required or key.startswith(f"{MARK}_")):
            if key.startswith(f"{ADMIN_MARK}_"):
                self.admin_keys.verify(key)
                raise AuthError(
                    "An admin key administrates its organization; it does no work in a project.",
                    hint="Send a project's key; `lapis keys create NAME` makes one.",
                )
            return self.keys.verify(key)
        if self.keys_required:
            raise AuthError(
                "No API key was given.",
                hint="Send it as `Authorization: Bearer KEY`; `lapis keys create NAME` makes one.",
            )
        return self._local()  # with no key, or with the placeholder that the official client insists on

    def _local(self) -> Identity:
        """The local user, with what the default project may use, which is looked up once a second."""
        now = time.monotonic()
        if now - self._looked_at >= FRESH:
            self._policy = Limits(self.keys.db).policy(LOCAL.project_id)
            self._looked_at = now
        return LOCAL if self._policy == EVERY_MODEL else replace(LOCAL, models=self._policy)

    def administrator(self, key: str | None) -> Administrator:
        """Whose admin key this is, looked up each time. Raises AuthError."""
        if key is not None and (self.keys_required or key.startswith(f"{MARK}_")):
            if key.startswith(f"{MARK}_") and not key.startswith(f"{ADMIN_MARK}_"):
                self.keys.verify(key)
                raise AuthError(
                    "A project's key does not administrate its organization.",
                    hint="Send an admin key (OPENAI_ADMIN_KEY); `lapis keys create NAME --admin` makes one.",
                )
            return self.admin_keys.verify(key)
        if self.keys_required:
            raise AuthError(
                "No admin key was given.",
                hint="Send it as `Authorization: Bearer KEY`; `lapis keys create NAME --admin` makes one.",
            )
        return LOCAL_OWNER
