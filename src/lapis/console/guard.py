"""Watches a page's websocket: what a person does counts as use, and a session that is over closes it."""

from __future__ import annotations

import asyncio
import re
import time

from starlette.types import Message, Receive, Send

from lapis.console.session import Session
from lapis.errors import AuthError

ACT = re.compile(
    r'42\d*\["event"'
)  # a click or a key: Socket.IO's message of NiceGUI; all others come by themselves
LOOK_SECONDS = 2.0  # between two looks while the server only sends
CLOSED: Message = {"type": "websocket.disconnect", "code": 1008}


class Guard:
    """Stands between a websocket and the pages. Nothing passes once the session is over."""

    def __init__(self, session: Session, receive: Receive, send: Send) -> None:
        self.session = session
        self._receive = receive
        self._send = send
        self._looked = time.monotonic()
        self._over = False

    async def receive(self) -> Message:
        """The next message of the browser."""
        message = await self._receive()
        if message["type"] != "websocket.receive":
            return message
        act = ACT.match(message.get("text") or "") is not None
        return message if await self._valid(at_once=act, act=act) else CLOSED

    async def send(self, message: Message) -> None:
        """Pass a message on to the browser, or close instead."""
        if message["type"] != "websocket.send" or await self._valid():
            await self._send(message)

    async def _valid(self, *, at_once: bool = False, act: bool = False) -> bool:
        if self._over:
            return False
        if at_once or time.monotonic() - self._looked > LOOK_SECONDS:
            self._looked = time.monotonic()
            self._over = not await asyncio.to_thread(self._look, act)
            if self._over:
                await self._send({"type": "websocket.close", "code": 1008, "reason": "signed out"})
        return not self._over

    def _look(self, act: bool) -> bool:
        try:
            self.session.identity()
            if act:
                self.session.touch()
        except AuthError:
            return False
        return True
