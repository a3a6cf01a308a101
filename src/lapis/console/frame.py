"""What surrounds every page: navigation, who is signed in, the theme, and the place where messages appear."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

from nicegui import ui

from lapis.console.parts import Text, link
from lapis.console.session import FIELD, Session
from lapis.console.view import PATH, View
from lapis.gateway.directory import Place
from lapis.gateway.services import Services
from lapis.tenants.keys import ApiKeys, Identity
from lapis.tenants.tenant import Tenants
from lapis.tenants.users import Users

ASSETS = Path(__file__).with_name("assets")


class Link(NamedTuple):
    """A place in the navigation."""

    href: str
    title: str


@contextmanager
def frame(
    services: Services,
    session: Session,
    identity: Identity,
    who: str,
    places: Sequence[Place],
    title: str,
    links: Sequence[Link],
    here: str,
) -> Iterator[View]:
    """Draw the frame; what is drawn inside is the page."""
    ui.add_head_html(f"<script>{_asset('page.js')}</script><style>{_asset('style.css')}</style>")
    ui.context.client.content.classes(remove="nicegui-content")
    with ui.element("div").classes("shell"):
        with ui.element("div").classes("side"):
            link("Lapis", PATH + "/", "brand")
            _menu(session, identity, who, places, links, here)
        with ui.element("div").classes("page").props('tabindex="-1"') as page:
            with ui.element("div").classes("head"):
                Text(title, "h1")
            status = ui.element("div").classes("status").props('role="status" aria-live="polite"')
            yield View(services, session, identity, status)
    ui.skip_link("Skip to the page", target=page)


def _menu(
    session: Session,
    identity: Identity,
    who: str,
    places: Sequence[Place],
    links: Sequence[Link],
    here: str,
) -> None:
    # On a phone the links are behind this button; on a wide screen it is not there.
    opener = Text("Menu", "button").classes("button opener").props('type="button" aria-expanded="false"')
    opener.on(
        "click",
        js_handler="(e) => e.currentTarget.setAttribute('aria-expanded', "
        "e.currentTarget.parentElement.classList.toggle('open'))",
    )
    with ui.element("nav").classes("links").props('aria-label="Pages"'):
        for place in links:
            made = link(place.title, PATH + place.href)
            if place.href == here:
                made.props["aria-current"] = "page"
    with ui.element("div").classes("who"):
        Text(who).classes("name")
        if len(places) > 1:
            _choice(session, places, identity.project_id)
        Colours()
        if not session.local:
            with ui.element("form").props(f'method="post" action="{PATH}/sign-out"'):
                ui.element("input").props(f'type="hidden" name="{FIELD}" value="{session.csrf}"')
                Text("Sign out", "button").classes("button")


def _choice(session: Session, places: Sequence[Place], here: str) -> None:
    """The projects of a person who has several."""
    with ui.element("form").props(f'method="post" action="{PATH}/project"'):
        ui.element("input").props(f'type="hidden" name="{FIELD}" value="{session.csrf}"')
        with ui.element("select").props('name="project" aria-label="Project"').classes("input"):
            for place in places:
                option = Text(place.name, "option").props(f'value="{place.project_id}"')
                if place.project_id == here:
                    option.props("selected")
        Text("Look at this project", "button").classes("button")


class Colours(ui.element, component="assets/colours.js"):
    """The choice of light or dark."""


def who(services: Services, identity: Identity) -> str:
    """Who is signed in, and where: a person, a key by its name, or whoever is at the machine."""
    name = "You, at this machine"
    if identity.user_id is not None:
        name = Users(services.db).get(identity.user_id, identity.organization_id).email
    elif identity.key_id is not None:
        keys = ApiKeys(services.db).list(identity.project_id)
        name = next((key.name for key in keys if key.id == identity.key_id), identity.key_id)
    project = Tenants(services.db).project(identity.project_id, identity.organization_id)
    return f"{name} · project {project.name}"


@cache
def _asset(name: str) -> str:
    return (ASSETS / name).read_text()
