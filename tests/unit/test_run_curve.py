"""The loss curve in the terminal and as a PNG."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lapis.cli.curve import braille, plot, smoothed


def dots(line: str) -> int:
    return sum((ord(char) - 0x2800).bit_count() for char in line if 0x2800 <= ord(char) < 0x2900)


def test_smoothing_keeps_constants_and_slopes_and_removes_noise() -> None:
    assert smoothed([3.0] * 50) == pytest.approx([3.0] * 50)
    slope = [float(value) for value in range(300)]
    assert smoothed(slope)[:-6] == pytest.approx(slope[:-6])  # not shifted, not at the start either
    noise = random.Random(0)
    values = [noise.gauss(2.0, 0.5) for _ in range(1000)]
    assert max(abs(value - 2.0) for value in smoothed(values)[40:-40]) < 0.6
    assert smoothed([1.5]) == [1.5]


@pytest.mark.parametrize("width", [24, 47, 78, 120])
def test_the_picture_is_as_wide_as_asked_and_labels_both_axes(width: int) -> None:
    steps = list(range(1, 500))
    lines = braille(steps, [10 * step**-0.5 for step in steps], width)
    assert len(lines) == 12
    assert max(len(line) for line in lines) <= width
    assert lines[0].lstrip().startswith("10.")
    assert lines[-1].split()[0] == "1"
    assert lines[-1].endswith("499")


def test_a_falling_curve_falls_without_gaps() -> None:
    steps = [1, 2, 10, 100, 5000]  # sparse: columns between the points are filled
    lines = braille(steps, [5.0, 4.0, 3.0, 2.0, 1.0], 60)
    body = [line.split("│")[-1].split("┤")[-1] for line in lines[:-2]]
    rows = [
        next(row for row in range(len(body)) if ord(body[row][column]) != 0x2800)
        for column in range(len(body[0]))
    ]
    assert rows == sorted(rows)
    assert rows[0] == 0
    assert rows[-1] == len(body) - 1
    assert sum(dots(line) for line in body) >= 2 * len(body[0])


def test_a_flat_curve_has_one_row_of_dots() -> None:
    body = braille([1, 2, 3], [2.0, 2.0, 2.0], 40)[:-2]
    assert len([line for line in body if dots(line)]) == 1


def test_the_png_holds_three_panels(tmp_path: Path) -> None:
    steps: list[dict[str, Any]] = [
        {"step": step, "loss": 5.0 / step, "tokens_per_s": 100.0, "lr": 0.1, "tokens": step * 64}
        for step in range(1, 50)
    ]
    steps[5]["loss"] = None
    plot(steps, "a run", resumes=[20], checkpoints=[40], out=tmp_path / "run.png")
    with Image.open(tmp_path / "run.png") as image:
        assert image.format == "PNG"
        assert image.width > 800
        assert image.height > 800
        colors = image.convert("RGB").getcolors(1 << 24)
    assert colors is not None
    found = {color for _, color in colors}
    assert {(31, 119, 180), (44, 160, 44), (255, 127, 14)} <= found  # the lines of the three panels


def test_a_run_of_one_step_can_be_drawn(tmp_path: Path) -> None:
    plot([{"step": 1, "loss": 2.0, "tokens_per_s": 10.0, "lr": 0.1}], "short", [], [], tmp_path / "run.png")
    assert (tmp_path / "run.png").stat().st_size > 1000
