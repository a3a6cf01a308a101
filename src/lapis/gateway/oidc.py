"""The authorization code flow of OpenID Connect with PKCE, as its relying party.

OpenID Connect Core 1.0, Discovery 1.0; RFC 7636 (PKCE, S256), RFC 9207 (issuer in the answer).
"""

from __future__ import annotations

import hashlib
import hmac
import threading
import time
from base64 import urlsafe_b64encode
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlencode

import httpx
import jwt

from lapis.errors import AuthError, UnavailableError
from lapis.gateway.sessions import Start
from lapis.gateway.settings import SignInSettings, is_secure
from lapis.log import logger

# Asymmetric ones only: with HS256 a public key could be passed off as a secret.
ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")
LEEWAY_SECONDS = 60  # between our clock and the provider's
FRESH_SECONDS = 3600.0  # for which the provider's document and keys are believed
AGAIN_SECONDS = 5.0  # between two looks for a key that is not known
TIMEOUT_SECONDS = 10.0
FAILED = "The sign-in could not be completed."


class Provider:
    """An OpenID provider, known by its discovery document and its keys, which are fetched when needed."""

    def __init__(
        self,
        settings: SignInSettings,
        secret: str,
        redirect_uri: str,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.settings = settings
        self.redirect_uri = redirect_uri
        self.clock = clock
        self._secret = secret
        self._lock = threading.Lock()
        self._document: dict[str, Any] = {}
        self._document_at = float("-inf")
        self._keys: dict[str, jwt.PyJWK] = {}
        self._keys_at = float("-inf")

    def url(self, start: Start) -> str:
        """Where a browser is sent to sign in. Raises UnavailableError, AuthError for a provider in disorder."""
        digest = hashlib.sha256(start.verifier.encode()).digest()
        fields = {
            "response_type": "code",
            "client_id": self.settings.client_id,
            "redirect_uri": self.redirect_uri,
            "scope": " ".join(self.settings.scopes),
            "state": start.state,
            "nonce": start.nonce,
            "code_challenge": urlsafe_b64encode(digest).rstrip(b"=").decode(),
            "code_challenge_method": "S256",
        }
        endpoint = self._endpoint("authorization_endpoint")
        return f"{endpoint}{'&' if '?' in endpoint else '?'}{urlencode(fields)}"

    def claims(self, code: str, start: Start) -> Mapping[str, Any]:
        """Turn a code into who signed in, checked: signature, issuer, audience, times, nonce.

        Raises AuthError, UnavailableError.
        """
        token = self._token(code, start.verifier)
        try:
            claims: dict[str, Any] = jwt.decode(
                token,
                self._key(token),
                algorithms=ALGORITHMS,
                audience=self.settings.client_id,
                issuer=self.settings.issuer,
                leeway=LEEWAY_SECONDS,
                options={"require": ["iss", "sub", "aud", "exp", "iat"]},
            )
        except jwt.PyJWTError as error:
            logger.warning("An ID token was refused: %s", error)
            raise AuthError(FAILED) from error
        audiences = claims["aud"] if isinstance(claims["aud"], list) else [claims["aud"]]
        party = claims.get("azp")
        if (party is None and len(audiences) > 1) or party not in (None, self.settings.client_id):
            logger.warning("An ID token was refused: it was made for another party.")
            raise AuthError(FAILED)
        if not hmac.compare_digest(str(claims.get("nonce", "")).encode(), start.nonce.encode()):
            logger.warning("An ID token was refused: it belongs to another sign-in.")
            raise AuthError(FAILED)
        return claims

    def _token(self, code: str, verifier: str) -> str:
        """The ID token for a code."""
        fields = {
            "grant_type": "authorization_code",
            "code": code,
            "redirect_uri": self.redirect_uri,
            "code_verifier": verifier,
            "client_id": self.settings.client_id,
        }
        methods = self._discovered().get("token_endpoint_auth_methods_supported", ["client_secret_basic"])
        basic = None
        if self._secret and "client_secret_post" in methods and "client_secret_basic" not in methods:
            fields["client_secret"] = self._secret
        elif self._secret:
            basic = httpx.BasicAuth(self.settings.client_id, self._secret)
        answer = self._fetch("POST", self._endpoint("token_endpoint"), fields, basic)
        token = answer.get("id_token")
        if not isinstance(token, str):
            logger.warning("The OpenID provider gave no ID token.")
            raise AuthError(FAILED)
        return token

    def _key(self, token: str) -> jwt.PyJWK:
        """The key that a token names; the provider's keys are fetched again for one that is not known."""
        header = jwt.get_unverified_header(token)
        with self._lock:
            now = self.clock()
            name = str(header.get("kid", ""))
            if now - self._keys_at > (AGAIN_SECONDS if name not in self._keys else FRESH_SECONDS):
                found = self._fetch("GET", self._endpoint("jwks_uri"))
                self._keys = {key.key_id or "": key for key in jwt.PyJWKSet.from_dict(found).keys}
                self._keys_at = now
            if name not in self._keys:
                raise jwt.InvalidKeyError("the provider has no such key")
            return self._keys[name]

    def _endpoint(self, name: str) -> str:
        url = self._discovered().get(name)
        if not isinstance(url, str) or not is_secure(url):
            raise AuthError(f"The OpenID provider names no safe {name}.")
        return url

    def _discovered(self) -> dict[str, Any]:
        if self.clock() - self._document_at > FRESH_SECONDS:
            issuer = self.settings.issuer
            found = self._fetch("GET", f"{issuer.rstrip('/')}/.well-known/openid-configuration")
            if found.get("issuer") != issuer:
                raise AuthError(
                    f"The OpenID provider calls itself {found.get('issuer')!r}, not {issuer!r}.",
                    hint="Write sign_in.issuer in server.toml exactly so.",
                )
            self._document, self._document_at = found, self.clock()
        return self._document

    def _fetch(
        self,
        method: str,
        url: str,
        fields: dict[str, str] | None = None,
        basic: httpx.BasicAuth | None = None,
    ) -> dict[str, Any]:
        """A JSON object. What is sent is logged nowhere."""
        try:
            answer = httpx.request(
                method, url, data=fields, auth=basic, timeout=TIMEOUT_SECONDS, follow_redirects=False
            )
            found = answer.json()
        except (httpx.HTTPError, ValueError) as error:
            raise UnavailableError(
                "The OpenID provider does not answer.", hint="Try again; check sign_in.issuer in server.toml."
            ) from error
        if answer.status_code != 200 or not isinstance(found, dict):
            reason = found.get("error", "") if isinstance(found, dict) else ""
            logger.warning("The OpenID provider answered %s %s", answer.status_code, str(reason)[:100])
            raise AuthError(FAILED)
        return found
