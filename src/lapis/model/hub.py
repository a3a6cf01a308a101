"""Model files over plain HTTPS from a hub that speaks Hugging Face's `resolve` addresses. No torch here."""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass, field
from email.message import Message
from pathlib import Path
from typing import IO

from lapis.errors import AuthError, ConfigError, InputError, IntegrityError, NotFoundError, UnavailableError
from lapis.log import Progress, silent
from lapis.model.layout import (
    CARD,
    CONFIG,
    GENERATION,
    INDEX,
    TEMPLATE,
    TOKENIZER,
    TOKENIZER_CONFIG,
    WEIGHTS,
    shard_names,
)
from lapis.storage import atomic_file

PUBLIC_HUB = "https://huggingface.co"
TIMEOUT_SECONDS = 60.0
CHUNK = 1 << 20
REQUIRED = (CONFIG, TOKENIZER)
OPTIONAL = (GENERATION, TOKENIZER_CONFIG, TEMPLATE, CARD)  # the card states the licence
REFERENCE = re.compile(r"hf:([\w.-]+/[\w.-]+?)(?:@([\w./-]+))?")


@dataclass
class HubRepository:
    """A repository at one revision. `commit` is known after the first file; all later ones come from it."""

    name: str
    revision: str = "main"
    endpoint: str = field(default_factory=lambda: (os.environ.get("HF_ENDPOINT") or PUBLIC_HUB).rstrip("/"))
    commit: str | None = None

    def download(self, folder: Path, progress: Progress = silent) -> None:
        """Fetch configuration, tokenizer and safetensors into a folder.

        Raises NotFoundError, AuthError, UnavailableError (no network), InputError (no safetensors), and
        IntegrityError for bytes that do not match the size or digest that the hub states.
        """
        for name in REQUIRED:
            if not self._fetch(name, folder, progress):
                raise self._missing(name)
        for name in OPTIONAL:
            self._fetch(name, folder, progress)
        if self._fetch(INDEX, folder, progress):
            for name in shard_names(folder / INDEX):
                if not self._fetch(name, folder, progress):
                    raise self._missing(name)
        elif not self._fetch(WEIGHTS, folder, progress):
            raise InputError(
                f"{self.name} has no safetensors weights; pickle is not taken, since it can run code.",
                hint="Look for a copy of the model in safetensors, or pull a GGUF file.",
            )

    def _fetch(self, name: str, folder: Path, progress: Progress) -> bool:
        """Download one file; False if the repository does not have it."""
        revision = urllib.parse.quote(self.commit or self.revision, safe="")
        url = f"{self.endpoint}/{self.name}/resolve/{revision}/{name}"
        request = urllib.request.Request(url, headers={"User-Agent": "lapis"})
        token = os.environ.get("HF_TOKEN")
        if token:  # unredirected: storage servers behind a redirect must not see it
            request.add_unredirected_header("Authorization", f"Bearer {token}")
        redirects = _Redirects()
        try:
            with urllib.request.build_opener(redirects).open(request, timeout=TIMEOUT_SECONDS) as response:
                headers = [*redirects.seen, response.headers]
                self.commit = self.commit or _first(headers, "X-Repo-Commit")
                _save(response, folder / name, headers, progress)
            return True
        except urllib.error.HTTPError as error:
            with error:
                if error.code == 404:
                    return False
                raise self._refused(error.code) from error
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
            reason = getattr(error, "reason", None) or error
            raise UnavailableError(
                f"{url} cannot be fetched: {reason}.",
                hint="Check the network, or take a model that is on this machine: lapis pull FOLDER",
            ) from error

    def _refused(self, status: int) -> AuthError | UnavailableError:
        if status in (401, 403):
            return AuthError(
                f"{self.name} is private, needs its licence accepted, or does not exist (HTTP {status}).",
                hint="Set HF_TOKEN to a token that may read it.",
            )
        return UnavailableError(
            f"{self.endpoint} answered HTTP {status} for {self.name}.", hint="Try again later."
        )

    def _missing(self, name: str) -> NotFoundError:
        return NotFoundError(
            f"{self.endpoint} has no {name} in {self.name} at revision {self.revision}.",
            hint="Check the name: lapis pull hf:owner/name@revision",
        )


def parse_reference(reference: str) -> HubRepository:
    """`hf:owner/name[@revision]` as a repository. Raises ConfigError for any other form."""
    match = REFERENCE.fullmatch(reference)
    if match is None:
        raise ConfigError(f"{reference!r} is not of the form hf:owner/name[@revision].")
    return HubRepository(match[1], match[2] or "main")


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Keeps the headers of redirects: there the hub states the size and digest of a large file."""

    def __init__(self) -> None:
        self.seen: list[Message] = []

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> urllib.request.Request | None:
        self.seen.append(headers)
        return super().redirect_request(req, fp, code, msg, headers, newurl)  # type: ignore[arg-type]


def _save(response: IO[bytes], path: Path, headers: list[Message], progress: Progress) -> None:
    size = _first(headers, "X-Linked-Size") or _first(headers[-1:], "Content-Length")
    expected = int(size) if size and size.isdigit() else None
    digest, done = hashlib.sha256(), 0
    with atomic_file(path) as file:
        while chunk := response.read(CHUNK):
            file.write(chunk)
            digest.update(chunk)
            done += len(chunk)
            progress(
                done,
                expected,
                f"{path.name}: {done / 1e6:.1f} MB{f' of {expected / 1e6:.1f}' if expected else ''}",
            )
        if expected is not None and done != expected:
            raise IntegrityError(
                f"{path.name} came with {done} bytes instead of {expected}.", hint="Pull again."
            )
        stated = (_first(headers, "X-Linked-Etag") or "").removeprefix("W/").strip('"')
        if re.fullmatch(r"[0-9a-f]{64}", stated) and digest.hexdigest() != stated:
            raise IntegrityError(
                f"{path.name} does not match the SHA-256 that the hub states ({stated}).",
                hint="Pull again; if it stays so, the copy on the hub is damaged.",
            )


def _first(headers: list[Message], name: str) -> str | None:
    return next((value for message in headers if (value := message.get(name))), None)
