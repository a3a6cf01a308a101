"""A small OpenID provider over HTTP: discovery, code with PKCE, keys that change, any claims, any lie in its tokens."""

from __future__ import annotations

import hashlib
import json
import secrets
import threading
import time
from base64 import b64decode, urlsafe_b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlencode, urlsplit

import jwt
from cryptography.hazmat.primitives.asymmetric import rsa

CLIENT, SECRET = "lapis", "a secret of the client"
Lie = Callable[[dict[str, Any]], None]


@dataclass
class OpenIdProvider:
    """What it says: of the person who signs in, and (`lie`) what it changes in the token's claims."""

    issuer: str
    person: dict[str, Any]
    lie: Lie = lambda claims: None
    algorithm: str = "RS256"
    says_issuer: str = ""
    codes: dict[str, dict[str, str]] = field(default_factory=dict)
    fetched: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.change_key()

    def change_key(self) -> None:
        """From now on another key, under another name."""
        self.key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        self.kid = secrets.token_hex(4)

    def document(self) -> dict[str, Any]:
        return {
            "issuer": self.says_issuer or self.issuer,
            "authorization_endpoint": f"{self.issuer}/authorize",
            "token_endpoint": f"{self.issuer}/token",
            "jwks_uri": f"{self.issuer}/keys",
            "token_endpoint_auth_methods_supported": ["client_secret_basic"],
        }

    def keys(self) -> dict[str, Any]:
        public = json.loads(jwt.algorithms.RSAAlgorithm.to_jwk(self.key.public_key()))
        return {"keys": [{**public, "kid": self.kid, "use": "sig", "alg": "RS256"}]}

    def authorize(self, fields: dict[str, str]) -> str:
        """The person is let in: where the browser is sent back to."""
        assert fields["client_id"] == CLIENT
        assert (fields["response_type"], fields["code_challenge_method"]) == ("code", "S256")
        code = secrets.token_urlsafe(16)
        self.codes[code] = fields
        answer = urlencode({"code": code, "state": fields["state"], "iss": self.issuer})
        return f"{fields['redirect_uri']}?{answer}"

    def token(self, fields: dict[str, str], authorization: str) -> dict[str, Any] | None:
        """The tokens for a code, once; None for what is not right."""
        begun = self.codes.pop(fields.get("code", ""), None)
        name, _, secret = b64decode(authorization.removeprefix("Basic ")).decode().partition(":")
        digest = hashlib.sha256(fields.get("code_verifier", "").encode()).digest()
        if (
            begun is None
            or (unquote(name), unquote(secret)) != (CLIENT, SECRET)
            or begun["redirect_uri"] != fields["redirect_uri"]
            or begun["code_challenge"] != urlsafe_b64encode(digest).rstrip(b"=").decode()
        ):
            return None
        now = int(time.time())
        claims = {"iss": self.issuer, "aud": CLIENT, "iat": now, "exp": now + 300, "nonce": begun["nonce"]}
        claims |= self.person
        self.lie(claims)
        signed = self.key if self.algorithm == "RS256" else "x" * 32 if self.algorithm == "HS256" else None
        token = jwt.encode(claims, signed, self.algorithm, headers={"kid": self.kid})  # type: ignore[arg-type]
        return {"id_token": token, "access_token": "unused", "token_type": "Bearer"}


@contextmanager
def openid_provider(person: dict[str, Any]) -> Iterator[OpenIdProvider]:
    """A provider on a free port, ended with the block."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            parts = urlsplit(self.path)
            provider.fetched.append(parts.path)
            if parts.path == "/authorize":
                self.send_response(302)
                fields = {name: texts[0] for name, texts in parse_qs(parts.query).items()}
                self.send_header("location", provider.authorize(fields))
                self.end_headers()
            else:
                self.answer(provider.keys() if parts.path == "/keys" else provider.document())

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"])).decode()
            fields = {name: texts[0] for name, texts in parse_qs(body).items()}
            answer = provider.token(fields, self.headers.get("authorization", ""))
            self.answer(answer or {"error": "invalid_grant"}, 200 if answer else 400)

        def answer(self, value: dict[str, Any], status: int = 200) -> None:
            body = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    provider = OpenIdProvider(f"http://127.0.0.1:{server.server_port}", person)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield provider
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
