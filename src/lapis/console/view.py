"""One person's look at a page: who it is, what that person may do, and how errors are told."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from nicegui import ui

from lapis.console.parts import Text
from lapis.console.session import Session
from lapis.errors import AuthError, LapisError
from lapis.gateway.services import Services
from lapis.log import bytes_text
from lapis.tenants.keys import Identity
from lapis.tenants.tenant import DEFAULT, Scope

PATH = "/console"
EVERY = 2.0  # seconds between two looks
MESSAGES = 3  # shown at once

Result = TypeVar("Result")


@dataclass
class View:
    """A page as one session sees it. `identity` is looked up anew at each look and each act."""

    services: Services
    session: Session
    identity: Identity
    status: ui.element
    _told: str = ""  # the error of the last look

    def may(self, scope: Scope) -> bool:
        """Whether to offer something. What is allowed is decided when it is done."""
        return scope in self.identity.scopes

    @property
    def operates(self) -> bool:
        """Whether it is who runs the installation; see `require_operator`."""
        return _operates(self.identity)

    @property
    def only(self) -> str | None:
        """The project that is looked at; None for who runs the installation, and sees all."""
        return None if self.operates else self.identity.project_id

    async def allowed(self, scope: Scope) -> Identity:
        """Who asks now. Raises AuthError for a session that ended, or may not do this."""
        self.identity = await asyncio.to_thread(self.session.identity)
        self.identity.require(scope)
        return self.identity

    async def act(self, scope: Scope, work: Callable[[Identity], Result], done: str = "") -> Result | None:
        """Do something in a thread on behalf of the session's person; what is wrong is told as a sentence."""
        try:
            identity = await self.allowed(scope)
            result = await asyncio.to_thread(work, identity)
        except LapisError as error:
            self.complain(error)
            return None
        if done:
            self.say(done)
        return result

    def say(self, text: str, tone: str = "", hint: str = "") -> None:
        """Tell something at the top of the page, until it is put away."""
        while len(self.status.default_slot.children) >= MESSAGES:
            self.status.remove(self.status.default_slot.children[0])
        with self.status, ui.element("div").classes(f"said {tone}") as box:
            with ui.element("div"):
                Text(text)
                if hint:
                    Text(hint).classes("hint")
            close = Text("×", "button").props('type="button" aria-label="Put this message away"')
            close.on("click", lambda: self.status.remove(box))

    def complain(self, error: LapisError) -> None:
        """Tell an error."""
        self.say(error.message, "bad", error.hint or "")

    async def repeat(self, look: Callable[[], Awaitable[None]], every: float = EVERY) -> None:
        """Look now and every so many seconds, as long as the session is valid."""

        async def checked() -> None:
            try:
                self.identity = await asyncio.to_thread(self.session.identity)
            except AuthError:
                ui.navigate.to("/")  # which asks for a key
                return
            try:
                await look()
            except LapisError as error:  # a busy database, or what was looked at is gone
                if str(error) != self._told:
                    self.complain(error)
                self._told = str(error)

        await checked()
        ui.timer(every, checked, immediate=False)


def require_operator(identity: Identity) -> None:
    """What belongs to no project (runs, releases, datasets, the machine, the audit log) is for who runs it all.

    That is an administrator of the organization that is always there. Raises AuthError.
    """
    if not _operates(identity):
        raise AuthError(
            "Only who runs this installation may see or do this.", hint="lapis keys create NAME --scope admin"
        )


def _operates(identity: Identity) -> bool:
    return Scope.ADMIN in identity.scopes and identity.organization_id == DEFAULT


def when(seconds: float | None) -> str:
    """A time as text, UTC."""
    return "" if seconds is None else time.strftime("%Y-%m-%d %H:%M", time.gmtime(seconds))


def duration(seconds: float | None) -> str:
    """Seconds as h:mm:ss or m:ss."""
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def size(count: int | None) -> str:
    """Bytes as text."""
    return "" if count is None else bytes_text(count)
