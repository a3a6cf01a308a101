"""Signing in to the console through an OpenID provider: who is let in as what, and every lie that is refused."""

from __future__ import annotations

import logging
import socket
import sys
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request

from lapis.audit import AuditLog
from lapis.console.session import COOKIE
from lapis.db import open_database
from lapis.errors import ConfigError
from lapis.gateway import oidc
from lapis.home import Home
from lapis.inference.fake import FakeEngine
from lapis.server import running_server
from lapis.tenants.invites import Invites
from lapis.tenants.tenant import Role, Scope, Tenants
from lapis.tenants.users import Users
from tests.browsers import browser_at
from tests.openid_provider import SECRET, OpenIdProvider, openid_provider
from tests.served import model_folder

pytest.importorskip("nicegui", reason="the console extra is not installed")

ANA = {"sub": "s-1", "email": "Ana@example.org", "name": "Ana", "groups": ["team-search"]}
MAPPED = """
owners = ["lapis-owner"]
readers = ["lapis-user"]

[sign_in.projects.search]
owners = ["lead-search"]
members = ["team-search"]
"""


@pytest.fixture(autouse=True)
def _pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages that say who looks at them."""
    pages = types.ModuleType("lapis.console.pages")

    def create_pages(services: Any) -> FastAPI:
        app = FastAPI()

        @app.get("/")
        def first(request: Request) -> dict[str, Any]:
            session = request.scope["lapis.session"]
            identity, user = session.identity(), session.user()
            return {
                "email": user.email, "actor": session.actor(), "project": identity.project_id,
                "admin": Scope.ADMIN in identity.scopes,
                "csrf": session.csrf, "places": [place.name for place in session.places()],
            }  # fmt: skip

        return app

    pages.create_pages = create_pages  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lapis.console.pages", pages)
    monkeypatch.setenv("LAPIS_SIGN_IN_SECRET", SECRET)


@pytest.fixture
def provider() -> Iterator[OpenIdProvider]:
    with openid_provider(dict(ANA)) as made:
        yield made


@contextmanager
def console(home: Home, provider: OpenIdProvider, settings: str = MAPPED) -> Iterator[httpx.Client]:
    """A browser at a server that signs people in through the provider."""
    if not home.models.exists():
        model_folder(home.models / "tiny")
        db = open_database(home.database_url)
        Tenants(db).create_project("search", "test")
        db.dispose()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    home.settings.write_text(
        f'[console]\npublic_url = "http://127.0.0.1:{port}"\n\n'
        f'[sign_in]\nissuer = "{provider.issuer}"\nclient_id = "lapis"\n{settings}'
    )
    with (
        running_server(home, port=port, console=True, load=lambda _, name: FakeEngine(name)) as server,
        browser_at(server.url) as browser,
    ):
        yield browser


def sign_in(browser: httpx.Client) -> httpx.Response:
    """The whole way: to the provider, back, and to the first page. Browsers send no Origin on it."""
    browser.headers.pop("origin", None)
    return browser.get("/console/sign-in/start")


def test_who_signs_in_becomes_a_user_with_the_places_that_the_groups_give(
    home: Home, provider: OpenIdProvider
) -> None:
    with console(home, provider) as browser:
        asked = browser.get("/console/")
        assert asked.status_code == 401
        assert "Sign in with your organization" in asked.text
        seen = sign_in(browser).json()
        assert (seen["email"], seen["places"], seen["admin"]) == ("ana@example.org", ["search"], False)
        assert seen["actor"].startswith("user:user-")
        provider.person["groups"] = ["lapis-owner", "lead-search"]
        again = sign_in(browser).json()
        assert again["actor"] == seen["actor"]
        assert (again["places"], again["admin"]) == (["default", "search"], True)
        assert again["project"] == "default"

        def choose(project: str, csrf: str) -> httpx.Response:
            headers = {"origin": str(browser.base_url).rstrip("/")}
            return browser.post("/console/project", data={"csrf": csrf, "project": project}, headers=headers)

        assert choose(seen["project"], again["csrf"]).json()["project"] == seen["project"]
        assert choose("proj_other", again["csrf"]).status_code == 404
        assert choose("default", "guessed").status_code == 403
        assert browser.get("/console/").json()["project"] == seen["project"]
        provider.person["groups"] = ["lapis-user"]
        down = sign_in(browser)
        assert down.status_code == 401  # no project any more
        provider.person |= {"groups": ["other"], "roles": "team-search"}  # an app role, as one text
        assert sign_in(browser).json()["places"] == ["search"]
        provider.person["roles"] = []
        assert sign_in(browser).status_code == 401
    db = open_database(home.database_url)
    acts = [entry.action for entry in AuditLog(db).entries() if entry.action != "session.end"]
    assert acts[1:6] == ["user.add", "project_user.add", "session.open", "user.update", "project_user.update"]
    assert "project_user.remove" in acts
    db.dispose()


def test_without_groups_only_users_and_invited_addresses_come_in(
    home: Home, provider: OpenIdProvider
) -> None:
    with console(home, provider, "") as browser:
        refused = sign_in(browser)
        assert refused.status_code == 401
        assert "no user here" in refused.text
        db = open_database(home.database_url)
        project = Tenants(db).project("search").id
        Invites(db).create("ana@example.org", Role.READER, "test", places={project: Role.MEMBER})
        assert sign_in(browser).json()["places"] == ["search"]
        # Another account of the provider with the same address is not the same person.
        provider.person["sub"] = "s-2"
        taken = sign_in(browser)
        assert taken.status_code == 401
        assert "another account" in taken.text
        provider.person |= {"sub": "s-3", "email": "bo@example.org", "email_verified": False}
        assert "verified" in sign_in(browser).text
        db.dispose()


def test_a_removed_user_is_out_at_once_and_does_not_come_back_unasked(
    home: Home, provider: OpenIdProvider
) -> None:
    with console(home, provider) as browser:
        actor = sign_in(browser).json()["actor"]
        assert browser.get("/console/").status_code == 200
        db = open_database(home.database_url)
        users = Users(db)
        users.remove(actor.removeprefix("user:"), "test")
        assert browser.get("/console/").status_code == 401
        for _ in range(2):
            assert sign_in(browser).status_code == 401
        users.add("ana@example.org", Role.READER, "test")
        assert sign_in(browser).json()["email"] == "ana@example.org"
        db.dispose()


def say(**changes: Any) -> Callable[[dict[str, Any]], None]:
    """Claims that are changed, or with None left out."""

    def lie(claims: dict[str, Any]) -> None:
        claims.update(changes)
        for name in [name for name, value in changes.items() if value is None]:
            del claims[name]

    return lie


NOT_OURS = {
    "issuer": say(iss="https://evil.example"),
    "audience": say(aud="another"),
    "party": say(aud=["lapis", "another"]),
    "other party": say(azp="another"),
    "no subject": say(sub=None),
    "too many groups": say(groups=None, _claim_names={"groups": "src1"}),
}
NOT_NOW = {
    "expired": say(exp=int(time.time()) - 3600),
    "no expiry": say(exp=None),
    "future": say(iat=int(time.time()) + 3600),
    "another sign-in": say(nonce="another"),
    "no sign-in": say(nonce=None),
}


@pytest.mark.parametrize("lies", [NOT_OURS, NOT_NOW], ids=["not ours", "not now"])
def test_a_token_that_is_not_for_us_is_refused(
    home: Home, provider: OpenIdProvider, lies: dict[str, Callable[[dict[str, Any]], None]]
) -> None:
    with console(home, provider) as browser:
        for what, lie in lies.items():
            provider.lie = lie
            assert sign_in(browser).status_code == 401, what
            assert COOKIE not in browser.cookies
        provider.lie = lambda claims: None
        assert sign_in(browser).status_code == 200


def test_only_the_providers_own_keys_sign_and_they_may_change(
    home: Home, provider: OpenIdProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    with console(home, provider) as browser:
        assert sign_in(browser).status_code == 200
        for algorithm in ("none", "HS256"):
            provider.algorithm = algorithm
            assert sign_in(browser).status_code == 401
        provider.algorithm = "RS256"
        monkeypatch.setattr(oidc, "AGAIN_SECONDS", -1.0)
        provider.change_key()
        assert sign_in(browser).status_code == 200
        key, kid = provider.key, provider.kid
        provider.change_key()
        provider.kid = kid  # another key under the known name
        assert sign_in(browser).status_code == 401
        provider.key = key
        assert sign_in(browser).status_code == 200
        assert provider.fetched.count("/.well-known/openid-configuration") == 1
        assert provider.fetched.count("/keys") == 2


def test_a_sign_in_comes_back_once_to_the_browser_where_it_began(
    home: Home, provider: OpenIdProvider
) -> None:
    with console(home, provider) as browser:
        browser.headers.pop("origin")
        sent = browser.get("/console/sign-in/start", follow_redirects=False).headers["location"]
        back = httpx.get(sent, timeout=60).headers["location"]
        with browser_at(str(browser.base_url)) as other:
            other.headers.pop("origin")
            assert "began elsewhere" in other.get(back).text
        wrong = back.replace("state=", "state=x")
        assert browser.get(wrong).status_code == 401
        assert browser.get(f"{back}&iss=https://evil.example").status_code == 401
        assert browser.get(back).status_code == 401  # each try ends it
        denied = browser.get("/console/callback", params={"error": "access_denied", "state": "x"})
        assert denied.status_code == 401
        assert sign_in(browser).status_code == 200
        code = next(path for path in [back] if "code=" in path)
        assert browser.get(code).status_code == 401


def test_a_provider_that_is_gone_or_another_is_named(home: Home, provider: OpenIdProvider) -> None:
    with console(home, provider) as browser:
        provider.says_issuer = "https://other.example"
        assert "calls itself" in sign_in(browser).text
    provider.issuer = "http://127.0.0.1:9"
    with console(home, provider) as browser:
        answer = sign_in(browser)
        assert answer.status_code == 503
        assert "does not answer" in answer.text


def test_no_secret_of_the_sign_in_is_logged(
    home: Home, provider: OpenIdProvider, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    seen: list[str] = []

    def note(claims: dict[str, Any]) -> None:
        seen.append(claims["nonce"])

    provider.lie = note
    with caplog.at_level(logging.DEBUG), console(home, provider) as browser:
        browser.headers.pop("origin")
        sent = browser.get("/console/sign-in/start", follow_redirects=False).headers["location"]
        back = httpx.get(sent, timeout=60).headers["location"]
        fields = httpx.URL(back).params
        assert browser.get(back).status_code == 200
        token = browser.cookies[COOKIE]
    # The browser of this test and the provider are not the server; httpx logs the addresses that they fetch.
    lines = [record.getMessage() for record in caplog.records if record.threadName != "MainThread"]
    said = "\n".join(lines) + "".join(capfd.readouterr())
    secrets = [SECRET, token, fields["code"], fields["state"], *seen]
    assert not [secret for secret in secrets if secret in said]


def test_settings_are_strict(home: Home) -> None:
    from lapis.gateway.settings import server_settings

    assert server_settings(home).sign_in is None
    home.root.mkdir(parents=True, exist_ok=True)
    good = '[console]\npublic_url = "https://a.example"\n[sign_in]\nissuer = "https://b.example"\nclient_id = "c"\n'
    for text, named in (
        (good.replace("client_id", "clientid"), "client_id"),
        (good.replace("https://b", "http://b"), "sign_in.issuer"),
        (good.replace("https://a", "http://a"), "public_url"),
        (good.replace('public_url = "https://a.example"', ""), "public_url"),
    ):
        home.settings.write_text(text)
        with pytest.raises(ConfigError, match=named):
            server_settings(home)
    home.settings.write_text(good)
    found = server_settings(home).sign_in
    assert found is not None
    assert not found.managed


def test_entra_id_as_documented_is_a_valid_setting(home: Home) -> None:
    page = (Path(__file__).parents[2] / "docs" / "sign_in.md").read_text()
    text = page.split("```toml\n")[1].split("```")[0]
    home.root.mkdir(parents=True, exist_ok=True)
    home.settings.write_text(text)
    from lapis.gateway.settings import server_settings

    found = server_settings(home).sign_in
    assert found is not None
    assert found.issuer.startswith("https://login.microsoftonline.com/")
    assert found.managed
