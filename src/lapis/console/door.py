"""What the console's door decides by, as pure rules: where a request comes from, how often, which headers go back."""

from __future__ import annotations

import hashlib
import hmac
import time
from base64 import b64encode
from collections.abc import Callable, Mapping
from urllib.parse import urlsplit

SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
ATTEMPTS = 10  # failed sign-ins of one address within WINDOW_SECONDS
WINDOW_SECONDS = 60.0
MOST_ADDRESSES = 10_000  # remembered; the oldest is forgotten

STARTS = 60  # sign-ins of one address that begin within WINDOW_SECONDS
STYLE = (
    ":root{color-scheme:light dark}body{font:16px system-ui;max-width:22rem;margin:18vh auto;padding:0 1rem}"
    "input,button,.button{font:inherit;width:100%;padding:.6rem;margin-top:.6rem;box-sizing:border-box}"
    ".button{display:block;text-align:center;border:1px solid;border-radius:.2rem}"
)
_STYLE_DIGEST = b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
# The sign-in page runs no script at all.
PLAIN_POLICY = (
    f"default-src 'none'; style-src 'sha256-{_STYLE_DIGEST}'; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'"
)
# NiceGUI compiles its templates and evaluates what the server sends: both need 'unsafe-…'. Nothing comes from, or
# goes to, another origin.
PAGES_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; "
    "object-src 'none'; form-action 'self'; base-uri 'self'; frame-ancestors 'none'"
)


def security_headers(policy: str, https: bool) -> dict[str, str]:
    """The headers of every answer of the console."""
    headers = {
        "content-security-policy": policy,
        "x-frame-options": "DENY",
        "x-content-type-options": "nosniff",
        # Not no-referrer, with which browsers send `Origin: null` with our own forms.
        "referrer-policy": "same-origin",
        "cross-origin-opener-policy": "same-origin",
        "cross-origin-resource-policy": "same-origin",
        "permissions-policy": "camera=(), microphone=(), geolocation=(), payment=(), usb=()",
    }
    if https:
        headers["strict-transport-security"] = "max-age=31536000"
    return headers


def foreign(headers: Mapping[str, str], changes: bool, public_url: str = "") -> str:
    """Why a request is refused as another site's, or an empty text.

    `changes`: it may change something (every method but GET and HEAD, and websockets); then the browser must
    have said where it comes from. `public_url`: where people see this server, when a proxy stands before it.
    """
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    ours = {headers.get("host"), urlsplit(public_url).netloc or None} - {None}
    if origin is not None and _netloc(origin) not in ours:
        return "Requests from other sites are refused."
    if changes and site not in (None, "same-origin"):
        return "Requests from other sites are refused."
    if changes and site is None and origin is None:
        return "The request does not say which site it comes from: it has no Origin."
    return ""


def _netloc(origin: str) -> str:
    try:
        return urlsplit(origin).netloc
    except ValueError:
        # A bracket that is not closed: it is no site.
        return ""


def csrf_token(secret: str) -> str:
    """The text that every form of a session carries; only who can read our pages knows it."""
    return hmac.new(secret.encode(), b"lapis console form", hashlib.sha256).hexdigest()


def same(one: str, other: str) -> bool:
    """Whether two secrets are the same, in constant time; empty ones never are."""
    return bool(one) and hmac.compare_digest(one.encode("utf-8", "replace"), other.encode("utf-8", "replace"))


class Throttle:
    """Counts failed sign-ins by address: after so many of them within a minute the address has to wait."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, attempts: int = ATTEMPTS) -> None:
        self.clock = clock
        self.attempts = attempts
        self._failures: dict[str, list[float]] = {}

    def wait(self, address: str) -> float:
        """Seconds that an address must wait before its next try; 0 if it may try now."""
        recent = self._recent(address)
        return 0.0 if len(recent) < self.attempts else recent[-self.attempts] + WINDOW_SECONDS - self.clock()

    def failed(self, address: str) -> None:
        """Note a failure."""
        self._failures[address] = [*self._recent(address), self.clock()]
        if len(self._failures) > MOST_ADDRESSES:
            del self._failures[next(iter(self._failures))]

    def _recent(self, address: str) -> list[float]:
        since = self.clock() - WINDOW_SECONDS
        return [at for at in self._failures.get(address, ()) if at > since]
