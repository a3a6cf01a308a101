"""The text of a key: how it is made, what of it is kept, and how one that is shown is compared with that."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import string
import threading
from dataclasses import dataclass

MARK = "lapis"  # every key begins with it, so that secret scanners can find a leaked one
ALPHABET = string.ascii_lowercase + string.digits
PREFIX_LENGTH = 10
SECRET_LENGTH = 50  # 36^50 > 2^256: nothing to guess, so a slow hash would buy nothing over a keyed one
NO_SALT, NO_DIGEST = "00" * 32, "0" * 64  # what an unknown prefix is compared with, in the same time
USED_SECONDS = 60.0  # how exactly it is known when a key was last used


@dataclass(frozen=True)
class Secret:
    """What is kept of a key's text."""

    prefix: str
    salt: str
    digest: str


def new_secret(mark: str = MARK) -> tuple[Secret, str]:
    """A new key and its text, `MARK_PREFIX_SECRET`, which is kept nowhere."""
    prefix, salt = _random(PREFIX_LENGTH), secrets.token_hex(32)
    text = f"{mark}_{prefix}_{_random(SECRET_LENGTH)}"
    return Secret(prefix, salt, _digest(salt, text)), text


def prefix_of(text: str, mark: str = MARK) -> str:
    """The prefix of a key's text, or nothing where the text cannot be a key of this mark."""
    head = f"{mark}_"
    if not (text.isascii() and text.isprintable() and text.startswith(head)):
        return ""
    parts = text.removeprefix(head).split("_")
    return parts[0] if len(parts) == 2 else ""


def matches(text: str, secret: Secret | None) -> bool:
    """Whether a text is this key's. Takes the same time where there is no such key."""
    known = secret or Secret("", NO_SALT, NO_DIGEST)
    return hmac.compare_digest(_digest(known.salt, text), known.digest) and secret is not None


def redacted(prefix: str, mark: str = MARK) -> str:
    """What may be shown of a key that was made before."""
    return f"{mark}_{prefix}_***"


class LastUsed:
    """Which keys are due to have their last use written down: each once a minute, whatever comes in between."""

    def __init__(self) -> None:
        self._noted: dict[str, float] = {}
        self._lock = threading.Lock()

    def due(self, key_id: str, last: float | None, now: float) -> bool:
        """Whether the use at `now` is to be written; then it is taken for written. `last` is what stands there."""
        with self._lock:
            known = max(last or 0.0, self._noted.get(key_id, 0.0))
            if known <= now < known + USED_SECONDS:
                return False
            self._noted[key_id] = now
            return True


def _digest(salt: str, text: str) -> str:
    return hmac.new(bytes.fromhex(salt), text.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()


def _random(length: int) -> str:
    return "".join(secrets.choice(ALPHABET) for _ in range(length))
