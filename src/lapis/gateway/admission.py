"""Who may come in: a bearer key becomes an Identity. Limits follow where work begins: metering, the queue."""

from __future__ import annotations

from lapis.errors import AuthError
from lapis.tenants.keys import LOCAL, MARK, ApiKeys, Identity


def priority_of(identity: Identity) -> int:
    """The priority in the engine of what somebody asks for: the lower one waits and gives up its place."""
    return -1 if identity.background else 0


class Admission:
    """A server's door. Without `keys_required` (loopback only) whoever shows no key is the local user."""

    def __init__(self, keys: ApiKeys, keys_required: bool) -> None:
        self.keys = keys
        self.keys_required = keys_required

    def identify(self, key: str | None) -> Identity:
        """Whose key this is, looked up each time: a revoked key is refused at once. Raises AuthError."""
        if key is not None and (self.keys_required or key.startswith(f"{MARK}_")):
            return self.keys.verify(key)
        if self.keys_required:
            raise AuthError(
                "No API key was given.",
                hint="Send it as `Authorization: Bearer KEY`; `lapis keys create NAME` makes one.",
            )
        return LOCAL  # with no key, or with the placeholder that the official client insists on
