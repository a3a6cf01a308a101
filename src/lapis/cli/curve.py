"""A loss curve: smoothed, as a small picture of braille dots for the terminal, and as a PNG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

# Bits of a braille character, by row and column of its 4 x 2 dots (Unicode, U+2800).
DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
SMOOTH_OVER = 0.02  # share of all points, to either side, that a smoothed point is the mean of


def smoothed(values: Sequence[float]) -> list[float]:
    """Each value's mean with its neighbours, 2 % of all values to either side, fewer at the ends."""
    sums = [0.0, *accumulate(values)]
    reach = math.ceil(SMOOTH_OVER * len(values))
    result = []
    for index in range(len(values)):
        left = min(reach, index)  # as many to the right, so that the steep start is not flattened
        low, high = index - left, min(index + left, len(values) - 1) + 1
        result.append((sums[high] - sums[low]) / (high - low))
    return result


def braille(xs: Sequence[float], ys: Sequence[float], width: int, height: int = 10) -> list[str]:
    """Lines of text that draw y over log x, with labels at both axes; `width` counts characters of a line.

    A column of dots shows the mean of its points. x rises from 1 or more, and there are two points at least.
    """
    low, high = min(ys), max(ys)
    spare = (high - low) * 0.05 or 0.5
    low, high = low - spare, high + spare
    labels = [_number(high), _number((low + high) / 2), _number(low)]
    margin = max(len(label) for label in labels) + 2
    columns = max(10, width - margin - 1)
    heights = _column_means(xs, ys, columns * 2)
    cells = [[0] * columns for _ in range(height)]
    before: int | None = None
    for x, y in enumerate(heights):
        row = round((high - y) / (high - low) * (height * 4 - 1))
        # a steep piece is drawn as a vertical line, so that the curve stays in one piece
        between = range(min(row, before + 1), max(row, before - 1) + 1) if before is not None else (row,)
        for dot in between:
            cells[dot // 4][x // 2] |= DOTS[dot % 4][x % 2]
        before = row
    at_row = {0: labels[0], height // 2: labels[1], height - 1: labels[2]}
    lines = [
        f"{at_row.get(row, ''):>{margin - 2}} {'┤' if row in at_row else '│'}"
        + "".join(chr(0x2800 + cell) for cell in line)
        for row, line in enumerate(cells)
    ]
    return [*lines, " " * (margin - 1) + "└" + "─" * columns, " " * margin + _x_labels(xs, columns)]


def plot(
    steps: Sequence[Mapping[str, Any]],
    title: str,
    resumes: Sequence[int],
    checkpoints: Sequence[int],
    out: Path,
) -> None:
    """Draw loss (or reward), tokens per second and learning rate over the steps of a run into a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 9), dpi=120, layout="constrained")
    panels = figure.subplots(3, 1, sharex=True, height_ratios=[3, 1.5, 1.5])
    figure.suptitle(title, fontsize=12)
    if told_by(steps) == "reward":
        _panel(panels[0], steps, "reward", "reward (mean of a step)", "tab:blue")
    else:
        _panel(panels[0], steps, "loss", "loss (nats per token, logarithmic)", "tab:blue")
        _logarithmic(panels[0])
    _panel(panels[1], steps, "tokens_per_s", "speed (tokens per second)", "tab:green")
    _panel(panels[2], steps, "lr", "learning rate", "tab:orange", smooth=False)
    for panel in panels[1:]:
        panel.set_ylim(bottom=0)
    panels[2].set_xlabel("optimizer step")
    for panel in panels:
        for step in resumes:
            panel.axvline(step, color="tab:red", linestyle="--", linewidth=1, label="resumed")
    low = panels[0].get_ylim()[0]
    marks = {"color": "black", "linestyle": "none", "marker": "^", "markersize": 5, "clip_on": False}
    panels[0].plot(checkpoints, [low] * len(checkpoints), **marks, label="checkpoint kept")
    panels[0].set_ylim(bottom=low)
    _tokens_axis(panels[0], steps[-1])
    entries = dict(zip(*reversed(panels[0].get_legend_handles_labels()), strict=True))  # one of each label
    panels[0].legend(entries.values(), entries.keys(), loc="upper right", frameon=False)
    figure.savefig(out, format="png")


def told_by(steps: Sequence[Mapping[str, Any]]) -> str:
    """What tells how a run went: its loss; where rewards are earned the loss is always near 0, and they tell it."""
    return "reward" if steps and steps[-1].get("reward") is not None else "loss"


def _panel(
    panel: Any, steps: Sequence[Mapping[str, Any]], key: str, label: str, color: str, smooth: bool = True
) -> None:
    known = [step for step in steps if step.get(key) is not None]
    xs, ys = [step["step"] for step in known], [step[key] for step in known]
    if smooth:
        panel.plot(xs, ys, color=color, alpha=0.3, linewidth=0.8, label="as measured")
        panel.plot(xs, smoothed(ys), color=color, linewidth=1.8, label="smoothed")
    else:
        panel.plot(xs, ys, color=color, linewidth=1.8)
    panel.set_ylabel(label)
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)
    panel.margins(x=0.01)
    panel.yaxis.set_major_formatter(lambda value, _: _number(value))
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")


def _logarithmic(panel: Any) -> None:
    """A logarithmic y axis with plain numbers: the long slow end of a loss curve takes most of the room."""
    from matplotlib.ticker import LogLocator, NullLocator

    panel.set_yscale("log")
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 2.5, 3, 4, 5, 6, 8)))
    panel.yaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_formatter(lambda value, _: _number(value))


def _tokens_axis(panel: Any, last: Mapping[str, Any]) -> None:
    """A second axis at the top: tokens seen, where the events say how many."""
    if not last.get("tokens"):
        return
    per_step = last["tokens"] / last["step"]
    axis = panel.secondary_xaxis(
        "top", functions=(lambda step: step * per_step / 1e6, lambda tokens: tokens * 1e6 / per_step)
    )
    axis.set_xlabel("tokens seen (millions)")
    axis.spines["top"].set_visible(False)


def _column_means(xs: Sequence[float], ys: Sequence[float], columns: int) -> list[float]:
    """Mean of the points in each column of a logarithmic axis; columns without points lie in between."""
    first, last = math.log(xs[0]), math.log(xs[-1])
    sums, counts = [0.0] * columns, [0] * columns
    for x, y in zip(xs, ys, strict=True):
        column = round((math.log(x) - first) / (last - first) * (columns - 1))
        sums[column] += y
        counts[column] += 1
    known = [column for column in range(columns) if counts[column]]
    means = {column: sums[column] / counts[column] for column in known}
    result = []
    for left, right in pairwise(known):
        for column in range(left, right):
            share = (column - left) / (right - left)
            result.append(means[left] * (1 - share) + means[right] * share)
    return [*result, means[known[-1]]]


def _x_labels(xs: Sequence[float], columns: int) -> str:
    """First, middle and last step under their columns."""
    middle = math.exp((math.log(xs[0]) + math.log(xs[-1])) / 2)
    left, centre, right = f"{xs[0]:,.0f}", f"{middle:,.0f}", f"step {xs[-1]:,.0f}"
    if len(left) + len(centre) + len(right) + 4 > columns:
        return left + right.rjust(columns - len(left))
    line = left.ljust(columns // 2 - len(centre) // 2) + centre
    return line + right.rjust(columns - len(line))


def _number(value: float) -> str:
    """Four digits at most, without an exponent where one can do without."""
    if value == 0 or 1e-4 <= abs(value) < 1e-2:
        return f"{value:.2g}" if value else "0"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
