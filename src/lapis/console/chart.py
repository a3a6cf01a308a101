"""Curves over steps or days, drawn by the browser; several series in one chart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nicegui import ui

Points = Sequence[tuple[float | str, float]]

# Readable on light and on dark, told apart by the colour-blind (Okabe and Ito's order, our blue first).
COLOURS = ("#4a7de0", "#d98a00", "#1a9a73", "#c45a9a", "#8a6fd8", "#7a8493")
AXIS = "#808898"
POINTS = 500  # of a curve: more than a screen has columns for


class Chart(ui.echart):
    """Lines, or bars over days. The title and the last values are also there as text for screen readers."""

    def __init__(self, title: str, *, bars: bool = False, from_zero: bool = True) -> None:
        axis = {"axisLabel": {"color": AXIS}, "nameTextStyle": {"color": AXIS}}
        options: dict[str, Any] = {
            "color": list(COLOURS),
            "title": {"text": title, "left": 0, "top": -4,
                      "textStyle": {"fontSize": 13, "fontWeight": 600, "color": AXIS}},
            "grid": {"left": 8, "right": 20, "top": 56, "bottom": 8, "containLabel": True},
            "legend": {"top": 22, "left": 0, "type": "scroll", "textStyle": {"color": AXIS}, "icon": "roundRect"},
            "xAxis": {"type": "category" if bars else "value", "min": None if bars else "dataMin",
                      "max": None if bars else "dataMax", "splitLine": {"show": False}, **axis},
            "yAxis": {"type": "value", "scale": not from_zero, **axis,
                      "splitLine": {"lineStyle": {"color": AXIS, "opacity": 0.2}}},
            "tooltip": {"trigger": "axis", "confine": True},
            "animation": False,
            "series": [],
        }  # fmt: skip
        super().__init__(options, renderer="svg")
        self._kind = {"type": "bar", "stack": "all"} if bars else {"type": "line", "showSymbol": False}
        self._title = title
        self.classes("chart").props('role="img"')
        self.put({})

    def put(self, series: Mapping[str, Points]) -> None:
        """Show these curves by their names."""
        drawn = [{**self._kind, "name": name, "data": [list(point) for point in points]}
                 for name, points in series.items()]  # fmt: skip
        if drawn == self.options["series"]:
            return
        several = len(series) > 1
        self.options["series"] = drawn
        self.options["legend"]["show"] = several
        self.options["grid"]["top"] = 56 if several else 36
        last = ", ".join(f"{name}: {points[-1][1]:,.6g}" for name, points in series.items() if points)
        self.props["aria-label"] = f"{self._title}. {'Last values: ' + last if last else 'No values yet.'}"
        self.update()


def thinned(points: Points) -> Points:
    """At most POINTS of them; the last one is kept."""
    stride = max(1, -(-len(points) // POINTS))
    return points[::-1][::stride][::-1]
