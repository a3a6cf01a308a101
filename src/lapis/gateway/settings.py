"""What a server is told beside its command line: `server.toml` in the home. Secrets stay in the environment."""

from __future__ import annotations

import os
from ipaddress import ip_address
from urllib.parse import urlsplit

from pydantic import Field

from lapis.config import Section, load
from lapis.errors import ConfigError
from lapis.home import Home
from lapis.tenants.tenant import DEFAULT

SECRET = "LAPIS_SIGN_IN_SECRET"


class Grants(Section):
    """Which values of the claims give which place in a project."""

    owners: tuple[str, ...] = ()
    """Groups or roles whose people are the project's owners."""
    members: tuple[str, ...] = ()
    """Groups or roles whose people are its members."""


class SignInSettings(Section):
    """Signing in to the console through an OpenID provider."""

    issuer: str
    """The provider, as in its discovery document: https://login.microsoftonline.com/TENANT/v2.0"""
    client_id: str
    """The name by which the provider knows this installation."""
    scopes: tuple[str, ...] = ("openid", "profile", "email")
    """What the provider is asked for."""
    claims: tuple[str, ...] = ("roles", "groups")
    """The claims whose values are looked up in owners, readers and projects."""
    organization: str = DEFAULT
    """The organization that people become users of."""
    owners: tuple[str, ...] = ()
    """Groups or roles whose people administrate the organization."""
    readers: tuple[str, ...] = ()
    """Groups or roles whose people may come in."""
    projects: dict[str, Grants] = Field(default_factory=dict)
    """Places in projects, by the projects' names."""

    @property
    def managed(self) -> bool:
        """Whether the provider's claims decide who comes in; else only users and invited addresses do."""
        return bool(self.owners or self.readers or self.projects)


class ConsoleSettings(Section):
    """The console's door."""

    public_url: str = ""
    """Where people see this server, when it stands behind a proxy: https://lapis.example.org"""
    idle_minutes: float = Field(default=120.0, gt=0)
    """A session ends after so long without use."""
    longest_hours: float = Field(default=24.0, gt=0)
    """A session ends after so long in any case."""


class ServerSettings(Section):
    """All of `server.toml`."""

    console: ConsoleSettings = ConsoleSettings()
    sign_in: SignInSettings | None = None


def server_settings(home: Home) -> ServerSettings:
    """The settings of a home; the defaults where it has no `server.toml`. Raises ConfigError."""
    settings = load(home.settings, ServerSettings) if home.settings.exists() else ServerSettings()
    if settings.sign_in is None:
        return settings
    _require_secure("sign_in.issuer", settings.sign_in.issuer)
    if not settings.console.public_url:
        raise ConfigError(
            f"{home.settings}: signing in needs console.public_url, to which the provider sends people back.",
            hint='Example: [console] public_url = "https://lapis.example.org"',
        )
    _require_secure("console.public_url", settings.console.public_url)
    return settings


def sign_in_secret() -> str:
    """The client's secret at the provider, from LAPIS_SIGN_IN_SECRET; empty for a public client."""
    return os.environ.get(SECRET, "")


def is_secure(url: str) -> bool:
    """Whether what is sent to a URL stays secret: https, or on this machine."""
    parts = urlsplit(url)
    return parts.scheme == "https" or (parts.scheme == "http" and _is_loopback(parts.hostname or ""))


def _require_secure(key: str, url: str) -> None:
    if not is_secure(url):
        raise ConfigError(f"{key} = {url!r} must begin with https:// (http:// only on this machine).")


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False
