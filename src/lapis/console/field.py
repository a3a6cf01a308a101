"""Form fields: native ones with a label, so that keyboards, screen readers and phones know them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from nicegui.element import Element
from nicegui.events import GenericEventArguments

from lapis.errors import InputError

Kind = Literal["text", "password", "number", "date", "select", "area", "checkbox"]


class Field(Element, component="assets/field.js"):
    """A field whose `value` follows what is typed. More of the browser's attributes go into `props`."""

    def __init__(
        self,
        label: str,
        kind: Kind = "text",
        value: object = "",
        *,
        options: Mapping[str, str] | None = None,
        on_change: Callable[[], Any] | None = None,
        on_enter: Callable[[], Any] | None = None,
        **props: object,
    ) -> None:
        super().__init__()
        self.label = label
        self._value = value
        for name, given in {**props, "label": label, "kind": kind, "value": value}.items():
            self.props[name] = given
        if options is not None:
            self.offer(options)

        def changed(event: GenericEventArguments) -> Any:
            self._value = event.args
            return on_change() if on_change is not None else None

        self.on("change", changed)
        if on_enter is not None:
            enter = on_enter
            self.on("enter", lambda: enter())

    @property
    def value(self) -> Any:
        """What stands in it: text, or whether it is checked."""
        return self._value

    @property
    def text(self) -> str:
        """The text in it, without white space around it."""
        return str(self._value).strip()

    def number(self, lowest: float = float("-inf"), highest: float = float("inf")) -> float | None:
        """The number in it; None if it is empty. Raises InputError for what is no number in the range."""
        if not self.text:
            return None
        try:
            number = float(self.text)
        except ValueError as error:
            raise InputError(f"{self.label}: {self.text[:40]!r} is no number.") from error
        if not lowest <= number <= highest:  # NaN fails too
            raise InputError(f"{self.label}: {self.text[:40]} is not between {lowest:g} and {highest:g}.")
        return number

    def whole(self, lowest: int = 0, highest: int = 2**53) -> int | None:
        """The whole number in it; None if it is empty. Raises InputError."""
        number = self.number(lowest, highest)
        if number is not None and number != int(number):
            raise InputError(f"{self.label}: {self.text[:40]} is no whole number.")
        return None if number is None else int(number)

    def put(self, value: object) -> None:
        """Replace what stands in it."""
        self._value = value
        self.props["value"] = value
        self.props["turn"] = (
            self.props.get("turn", 0) + 1
        )  # the browser may hold another text than we sent last

    def offer(self, options: Mapping[str, str]) -> None:
        """The choices of a select: value to label. A chosen value that is gone gives way to the first."""
        offered = [{"value": value, "label": label} for value, label in options.items()]
        if offered == self.props.get("options"):
            return
        self.props["options"] = offered
        if self._value not in options:
            self._value = next(iter(options), "")
            self.props["value"] = self._value
