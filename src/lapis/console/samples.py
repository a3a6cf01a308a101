"""What a model wrote while it was trained: prompts and texts by step, the newest first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nicegui import ui

from lapis.console.parts import Text

STEPS = 12  # that are shown


class Samples(ui.element):
    """A part of a page that is there once there are samples."""

    def __init__(self) -> None:
        super().__init__("section")
        self.classes("panel samples").props('aria-label="Samples"').set_visibility(False)
        self._shown: list[Mapping[str, Any]] = []

    def fill(self, events: Sequence[Mapping[str, Any]]) -> None:
        """Show the last of a run's samples events."""
        wanted = list(reversed(events))[:STEPS]
        if wanted == self._shown:
            return
        self._shown = wanted
        self.set_visibility(bool(wanted))
        self.clear()
        with self:
            Text("Samples", "h2")
            with (
                ui.element("div").classes("scrolled").props('tabindex="0" role="group" aria-label="By step"')
            ):
                for event in wanted:
                    Text(f"Step {event['step']:,}", "h3")
                    for one in event["samples"]:
                        _draw(one)


def _draw(sample: Mapping[str, Any]) -> None:
    with ui.element("div").classes("sample"):
        Text(sample["prompt"], "span").classes("soft")
        Text(sample["text"], "span")
        if sample.get("reward") is not None:
            Text(f"reward {sample['reward']:.3g}", "span").classes("tone")
