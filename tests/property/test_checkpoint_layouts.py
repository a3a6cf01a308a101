"""Whatever layout saved a checkpoint, any other loads it: equal bits. What misses or repeats an element is refused."""

from __future__ import annotations

import itertools
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lapis.checkpoint.piece import Box, Part, Sharded, uncovered
from lapis.checkpoint.sharded import Groups, load
from lapis.checkpoint.tensors import DTYPES
from lapis.errors import InputError
from tests.checkpoints import saved_by

Shape = tuple[int, ...]


def elements(box: Box) -> set[Shape]:
    """The slow form of a box: every element of it."""
    return set(
        itertools.product(*(range(start, end) for start, end in zip(box.offset, box.end, strict=True)))
    )


@st.composite
def boxes(draw: st.DrawFn, shape: Shape) -> Box:
    """Any box inside a tensor, also one without elements."""
    sides = [sorted((draw(st.integers(0, size)), draw(st.integers(0, size)))) for size in shape]
    return Box(tuple(low for low, _ in sides), tuple(high - low for low, high in sides))


@st.composite
def cuts(draw: st.DrawFn, shape: Shape) -> list[Box]:
    """A tensor cut into boxes, by cutting any of them in two, up to six times."""
    parts = [Box.whole(shape)]
    for _ in range(draw(st.integers(0, 6)) if shape else 0):
        box = parts.pop(draw(st.integers(0, len(parts) - 1)))
        dim = draw(st.integers(0, len(shape) - 1))
        size = draw(st.integers(0, box.shape[dim]))
        first = (*box.shape[:dim], size, *box.shape[dim + 1 :])
        rest = (*box.shape[:dim], box.shape[dim] - size, *box.shape[dim + 1 :])
        after = (*box.offset[:dim], box.offset[dim] + size, *box.offset[dim + 1 :])
        parts += [Box(box.offset, first), Box(after, rest)]
    return parts


SHAPES = st.lists(st.integers(0, 7), max_size=3).map(tuple)


@settings(derandomize=True, max_examples=200, deadline=None)
@given(st.data())
def test_the_intersection_is_what_both_have(data: st.DataObject) -> None:
    shape = data.draw(SHAPES)
    one, other = data.draw(boxes(shape)), data.draw(boxes(shape))
    both = one.intersection(other)
    assert (elements(both) if both else set()) == elements(one) & elements(other)
    if both:
        grid = torch.arange(Box.whole(shape).volume).reshape(shape)
        whole = Box.whole(shape)
        assert torch.equal(grid[one.inside(whole)][both.inside(one)], grid[both.inside(whole)])


@settings(derandomize=True, max_examples=300, deadline=None)
@given(st.data())
def test_boxes_pass_only_if_they_hold_every_element_once(data: st.DataObject) -> None:
    shape = data.draw(SHAPES)
    parts = data.draw(cuts(shape))
    assert uncovered(shape, parts) is None
    changed = list(parts)
    if data.draw(st.booleans()):
        changed.append(data.draw(boxes(shape)))
    if data.draw(st.booleans()):
        changed.pop(data.draw(st.integers(0, len(changed) - 1)))
    held = [element for box in changed for element in elements(box)]
    exactly = sorted(held) == sorted(elements(Box.whole(shape)))
    assert (uncovered(shape, changed) is None) == exactly


def test_a_box_outside_of_its_tensor_is_named() -> None:
    assert uncovered((4,), [Box((0,), (4,)), Box((4,), (1,))]) == "[4:5] lies outside of [0:4]"
    assert uncovered((4, 1), [Box((0,), (4,))]) == "[0:4] lies outside of [0:4, 0:1]"
    assert uncovered((4,), [Box((0,), (3,)), Box((2,), (2,))]) == "[2:3] is held twice"
    assert uncovered((4,), [Box((0,), (3,))]) == "1 of 4 elements are missing"


@settings(derandomize=True, max_examples=60, deadline=None)
@given(data=st.data(), ranks=st.integers(1, 4), dtype=st.sampled_from(sorted(DTYPES)))
def test_any_layout_loads_what_any_other_saved(data: st.DataObject, ranks: int, dtype: str) -> None:
    shapes = data.draw(st.lists(SHAPES, min_size=1, max_size=3))
    tensors = {
        f"t.{index}": torch.randn(shape).mul(9).to(DTYPES[dtype]) for index, shape in enumerate(shapes)
    }
    held: list[dict[str, Sharded[Tensor]]] = [{} for _ in range(ranks)]
    for name, tensor in tensors.items():
        shape = tuple(tensor.shape)
        parts: list[list[Part[Tensor]]] = [[] for _ in range(ranks)]
        for box in data.draw(cuts(shape)):
            owner, replica = data.draw(st.integers(0, ranks - 1)), data.draw(st.integers(0, ranks - 1))
            piece = tensor[box.inside(Box.whole(shape))]
            parts[owner].append(Part(box, piece))
            parts[replica].append(Part(box, piece.clone(), owned=False))
        for rank in range(ranks):
            held[rank][name] = Sharded(shape, tuple(parts[rank]))
    wanted = {
        name: Sharded(
            tuple(tensor.shape),
            tuple(
                Part(box, torch.zeros(box.shape, dtype=tensor.dtype))
                for box in data.draw(st.lists(boxes(tuple(tensor.shape)), max_size=3))
            ),
        )
        for name, tensor in tensors.items()
    }
    folder = Path(tempfile.mkdtemp())
    try:
        groups: list[Groups] = [{"model": values} for values in held]
        saved = saved_by(folder, 1, groups, {})
        for name, tensor in load(saved).groups["model"].items():
            assert torch.equal(tensor, tensors[name])
            assert tensor.shape == tensors[name].shape
        load(saved, {"model": wanted})
    finally:
        shutil.rmtree(folder)
    for name, value in wanted.items():
        for part in value.parts:
            assert torch.equal(part.data, tensors[name][part.box.inside(Box.whole(value.shape))])


def test_ranks_that_leave_out_or_repeat_an_element_are_refused_with_the_tensor_named(tmp_path: Path) -> None:
    def half(start: int, rows: int) -> Groups:
        box = Box((start, 0), (rows, 3))
        return {"model": {"w": Sharded((4, 3), (Part(box, torch.zeros(rows, 3)),)), "u": torch.zeros(1)}}

    def without_u(groups: Groups) -> Groups:
        return {"model": {"w": groups["model"]["w"]}}

    with pytest.raises(InputError, match=r"tensor w of model: 3 of 12 elements are missing"):
        saved_by(tmp_path / "1", 1, [half(0, 2), without_u(half(2, 1))], {})
    with pytest.raises(InputError, match=r"tensor w of model: \[1:2, 0:3\] is held twice"):
        saved_by(tmp_path / "2", 1, [half(0, 2), without_u(half(1, 3))], {})
    with pytest.raises(InputError, match=r"tensor u of model: \[0:1\] is held twice"):
        saved_by(tmp_path / "3", 1, [half(0, 2), half(2, 2)], {})
    with pytest.raises(InputError, match=r"different tensors by u of model"):
        saved_by(tmp_path / "4", 1, [half(0, 4), {"model": {"u": torch.zeros(2)}}], {})
