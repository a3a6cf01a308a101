"""Playground: chat with a model, or with two side by side; each token tells how likely it was."""

from __future__ import annotations

import asyncio
import time

from nicegui import ui

from lapis.console import chat
from lapis.console.chat import Settings, Token
from lapis.console.field import Field
from lapis.console.parts import Text, button, copy_button, dialog, panel
from lapis.console.view import View
from lapis.errors import LapisError
from lapis.gateway.generation import Generation
from lapis.tenants.keys import Identity
from lapis.tenants.tenant import Scope

FLUSH = 0.05  # seconds of tokens that are sent to the browser together


class Answer(ui.element, component="assets/tokens.js"):
    """An answer, token by token."""

    def __init__(self, label: str, odds: bool) -> None:
        super().__init__()
        self.props["label"] = label
        self.props["odds"] = odds

    def append(self, tokens: list[Token]) -> None:
        """Show more of it."""
        self.run_method("append", tokens)


class Talk:
    """A conversation with one model."""

    def __init__(self, view: View, models: dict[str, str], chosen: str) -> None:
        self.view = view
        self.messages: list[dict[str, str]] = []
        self.generation: Generation | None = None  # while it answers
        self.stopped = False
        with panel("Conversation", silent=True):
            self.model = Field("Model", "select", chosen, options=models)
            self.turns = ui.element("div").classes("talk")
            self.turns.props["data-empty"] = "The conversation appears here."
            self.speed = Text("").classes("soft num")

    async def ask(self, identity: Identity, system: str, text: str, settings: Settings) -> None:
        """Ask and show the answer as it comes. What is wrong is told at the top."""
        self.messages.append({"role": "user", "content": text})
        with self.turns, ui.element("div").classes("turn user") as question:
            Text("You").classes("by")
            Text(text, "div").classes("text")
        label = f"Answer of {self.model.value}"
        with self.turns, ui.element("div").classes("turn") as turn:
            Text(str(self.model.value)).classes("by")
            answer = Answer(label, settings.odds)
        said = [{"role": "system", "content": system}] if system else []
        self.stopped = False
        try:
            self.generation = await chat.ask(
                self.view.services, identity, str(self.model.value), [*said, *self.messages], settings
            )
            self.messages.append({"role": "assistant", "content": await self._show(answer)})
        except LapisError as error:
            self.messages.pop()
            for part in (question, turn):
                if not part.is_deleted:
                    part.delete()
            self.view.complain(error)
        finally:
            if self.generation is not None:
                self.generation.close()
            self.generation = None

    async def _show(self, answer: Answer) -> str:
        """Show the tokens as they come; what came before somebody pressed Stop is the answer too."""
        assert self.generation is not None
        begun = sent = time.monotonic()
        waiting: list[Token] = []
        text = ""
        try:
            async for tokens in chat.tokens(self.generation):
                if self.stopped:  # before it began
                    break
                waiting += tokens
                text += "".join(token["t"] for token in tokens)
                if time.monotonic() - sent > FLUSH:
                    answer.append(waiting)
                    waiting, sent = [], time.monotonic()
        except LapisError:
            if not self.stopped:
                raise
        answer.append(waiting)
        count = self.generation.usage.completion_tokens
        ended = "stopped after " if self.stopped else ""
        self.speed.text = f"{ended}{count:,} tokens, {count / max(time.monotonic() - begun, 1e-3):,.0f}/s"
        return text

    def stop(self) -> None:
        """End the answer where it is."""
        self.stopped = True
        if self.generation is not None:
            self.generation.close()

    def clear(self) -> None:
        """Forget the conversation."""
        self.messages.clear()
        self.turns.clear()
        self.speed.text = ""


async def show(view: View) -> None:
    """Draw the page."""
    models = {servable.name: servable.name for servable, _ in view.services.router.models(view.identity)}
    if not models:
        view.say("Nothing is served.", "warn", "Fetch a model with: lapis pull NAME")
        return
    page = _Playground(view, models)
    ui.context.client.on_delete(page.stop)


class _Playground:
    """The page's parts. It may be drawn for one model or for two."""

    def __init__(self, view: View, models: dict[str, str]) -> None:
        self.view, self.models = view, models
        asked = ui.context.client.request.query_params.get("model", "")
        first = asked if asked in models else next(iter(models))
        with ui.element("div").classes("play"):
            with ui.element("div").classes("stack"):
                with ui.element("div").classes("stack") as self.columns:
                    self.talks = [Talk(view, models, first)]
                self._draw_question()
            self._draw_settings()
        self._busy(False)

    def _draw_question(self) -> None:
        with panel("Ask", silent=True):
            hint = "Enter sends, Shift+Enter begins a line"
            self.question = Field("Your message", "area", placeholder=hint, on_enter=self.send)
            with ui.element("div").classes("row"):
                self.sender = button("Send", self.send, "main")
                self.stopper = button("Stop", self.stop)
                button("New conversation", self._clear)
                button("Copy as Python", self._python)

    def _draw_settings(self) -> None:
        with panel("Settings"):
            self.compare = Field("Compare two models", "checkbox", False, on_change=self._set_compare)
            self.odds = Field("Token probabilities", "checkbox", True)
            self.system = Field("System prompt", "area", rows=3)
            self.temperature = Field(
                "Temperature",
                "number",
                "1",
                min=0,
                max=2,
                step=0.1,
                hint="At 0 the likeliest token is taken.",
            )
            self.top_p = Field("Top p", "number", "1", min=0, max=1, step=0.05)
            self.max_tokens = Field("Most tokens", "number", "256", min=1)
            self.seed = Field("Seed", "number", "", hint="The same seed gives the same answer.")

    def settings(self) -> Settings:
        """What is set. Raises InputError."""
        temperature, top_p = self.temperature.number(0, 2), self.top_p.number(0, 1)
        return Settings(
            temperature=1.0 if temperature is None else temperature,
            top_p=1.0 if top_p is None else top_p,
            max_tokens=self.max_tokens.whole(lowest=1),
            seed=self.seed.whole(),
            odds=bool(self.odds.value),
        )

    async def send(self) -> None:
        """Ask all models that are shown."""
        text = self.question.text
        if not text or self.stopper.enabled:
            return
        try:
            settings = self.settings()
            identity = await self.view.allowed(Scope.MODELS_USE)
        except LapisError as error:
            self.view.complain(error)
            return
        self.question.put("")
        self._busy(True)
        try:
            await asyncio.gather(
                *(talk.ask(identity, self.system.text, text, settings) for talk in self.talks)
            )
        finally:
            self._busy(False)

    def stop(self) -> None:
        """End the answers where they are."""
        for talk in self.talks:
            talk.stop()

    def _busy(self, on: bool) -> None:
        self.sender.set_enabled(not on)
        self.stopper.set_enabled(on)

    def _set_compare(self) -> None:
        self.stop()
        self.columns.classes(replace="split" if self.compare.value else "stack")
        if self.compare.value:
            names = list(self.models)
            other = next((name for name in names if name != self.talks[0].model.value), names[0])
            with self.columns:
                self.talks.append(Talk(self.view, self.models, other))
        else:
            self.columns.remove(self.columns.default_slot.children[-1])
            self.talks.pop()

    def _clear(self) -> None:
        self.stop()
        for talk in self.talks:
            talk.clear()

    def _python(self) -> None:
        talk = self.talks[0]
        system = [{"role": "system", "content": self.system.text}] if self.system.text else []
        asked = [*system, *talk.messages]
        if self.question.text or not talk.messages:
            asked.append({"role": "user", "content": self.question.text or "Hello!"})
        elif asked[-1]["role"] == "assistant":
            asked.pop()
        try:
            settings = self.settings()
        except LapisError as error:
            self.view.complain(error)
            return
        base = ui.context.client.request.base_url
        code = chat.python_code(f"{base.scheme}://{base.netloc}/v1", str(talk.model.value), asked, settings)
        with dialog("The same in Python") as opened:
            text = Text(code, "pre").classes("log").props('tabindex="0"')
            with ui.element("div").classes("row"):
                copy_button(text)
                button("Close", opened.close)
