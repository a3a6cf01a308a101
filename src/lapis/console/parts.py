"""The small parts that pages are made of: texts, buttons, figures, facts, dialogs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from nicegui import ui
from nicegui.elements.mixins.text_element import TextElement


class Text(TextElement):
    """A text in a tag; `text` may be set later."""

    def __init__(self, text: str = "", tag: str = "span") -> None:
        super().__init__(tag=tag, text=text)


class Figures(ui.element):
    """One number each, with its name and a note."""

    def __init__(self, *names: str) -> None:
        super().__init__("dl")
        self.classes("figures")
        self._values: dict[str, tuple[Text, Text]] = {}
        with self:
            for name in names:
                with ui.element("div").classes("figure"):
                    Text(name, "dt")
                    value = Text("–", "dd")
                    self._values[name] = value, Text("", "dd").classes("note")

    def put(self, name: str, value: str, note: str = "") -> None:
        """Show a number."""
        self._values[name][0].text = value
        self._values[name][1].text = note


class Facts(ui.element):
    """A list of names and values."""

    def __init__(self) -> None:
        super().__init__("dl")
        self.classes("facts")
        self._shown: dict[str, str] = {}

    def fill(self, facts: Mapping[str, str]) -> None:
        """Show these; what is empty is left out."""
        facts = {name: value for name, value in facts.items() if value}
        if facts == self._shown:
            return
        self._shown = facts
        self.clear()
        with self:
            for name, value in facts.items():
                Text(name, "dt")
                Text(value, "dd")


class Button(Text):
    """A button; one that is not `enabled` cannot be pressed."""

    def __init__(self, label: str, on_click: Callable[[], Any] | None = None, kind: str = "") -> None:
        super().__init__(label, "button")
        self.enabled = True
        self.classes(f"button {kind}").props('type="button"')
        if on_click is not None:
            act = on_click
            self.on("click", lambda: act() if self.enabled else None)

    def set_enabled(self, on: bool) -> None:
        """Whether it can be pressed; the server asks too."""
        self.enabled = on
        self.props["disabled"] = not on


def button(label: str, on_click: Callable[[], Any] | None = None, kind: str = "") -> Button:
    """A button; `kind` is "main" for the page's chief act, "danger" for what cannot be taken back."""
    return Button(label, on_click, kind)


def link(text: str, href: str, kind: str = "") -> Text:
    """A link."""
    made = Text(text, "a").classes(kind)
    made.props["href"] = href
    return made


@contextmanager
def panel(title: str, *, silent: bool = False) -> Iterator[None]:
    """A framed part of a page under a title, which may be left to screen readers."""
    with ui.element("section").classes("panel") as section:
        section.props["aria-label"] = title
        if not silent:
            Text(title, "h2")
        yield


@contextmanager
def dialog(title: str) -> Iterator[ui.dialog]:
    """A dialog that opens now; Escape closes it."""
    with ui.dialog(value=True) as opened, ui.element("div").classes("panel"):
        opened.props["aria-label"] = title
        Text(title, "h2")
        yield opened


def confirm(question: str, consequence: str, label: str, then: Callable[[], Any]) -> None:
    """Ask before something that cannot be taken back."""
    with dialog(question) as opened:
        Text(consequence, "p")
        with ui.element("div").classes("row"):

            async def go() -> None:
                opened.close()
                result = then()
                if hasattr(result, "__await__"):
                    await result

            button(label, go, "danger").props("autofocus")
            button("Not now", opened.close)


def copy_button(text: Text, label: str = "Copy") -> Text:
    """A button that copies what stands in an element."""
    made = button(label)
    made.on("click", js_handler=f"(e) => copyText(getHtmlElement({text.id}).textContent, e.currentTarget)")
    return made
