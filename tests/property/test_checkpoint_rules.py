"""Rules of checkpoints that hold for every input: flipped bits, any tensors, retention."""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lapis.checkpoint.manifest import parse_name, superseded
from lapis.checkpoint.sharded import DTYPES, Checkpoint, latest, load, save
from lapis.errors import IntegrityError


@pytest.fixture(scope="module")
def saved() -> Iterator[Checkpoint]:
    folder = Path(tempfile.mkdtemp())
    groups = {
        "model": {"a": torch.randn(64, 3).bfloat16(), "b": torch.ones(5)},
        "optimizer": {"m": torch.randn(99)},
    }
    yield save(folder, 3, groups, {"seed": 1, "text": "é"}, keep=1)
    shutil.rmtree(folder)


@pytest.mark.parametrize("seed", range(60))
def test_every_flipped_bit_is_refused_with_the_file_named(saved: Checkpoint, seed: int) -> None:
    """One random bit of one random file: tensors, headers, state and the manifest itself."""
    chance = random.Random(seed)
    path = chance.choice(sorted(saved.folder.iterdir()))
    whole = path.read_bytes()
    bit = chance.randrange(len(whole) * 8)
    changed = bytearray(whole)
    changed[bit // 8] ^= 1 << bit % 8
    path.write_bytes(changed)
    try:
        with pytest.raises(IntegrityError, match=path.name):
            load(saved)
        assert latest(saved.folder.parent) is None
    finally:
        path.write_bytes(whole)
    assert latest(saved.folder.parent) == saved


@settings(derandomize=True, max_examples=25, deadline=None)
@given(
    dtype=st.sampled_from(sorted(DTYPES)),
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=3), max_size=4),
    state=st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=6,
    ),
)
def test_any_tensors_and_state_come_back(
    tmp_path_factory: pytest.TempPathFactory, dtype: str, shapes: list[list[int]], state: object
) -> None:
    tensors = {f"t.{i}": torch.randn(shape).to(DTYPES[dtype]) for i, shape in enumerate(shapes)}
    extra = {"one": torch.ones(3, dtype=torch.uint8), **tensors}  # mixed element sizes in one file
    loaded = load(save(tmp_path_factory.mktemp("c"), 1, {"model": extra}, {"value": state}, keep=1))
    assert loaded.state == {"value": state}
    assert loaded.groups["model"].keys() == extra.keys()
    assert all(torch.equal(loaded.groups["model"][name], tensor) for name, tensor in extra.items())
    assert all(loaded.groups["model"][name].shape == tensor.shape for name, tensor in extra.items())


def names(steps: list[int]) -> list[str]:
    return [f"step-{step:08d}-{index:012x}" for index, step in enumerate(steps)]


@settings(derandomize=True, max_examples=200)
@given(steps=st.lists(st.integers(0, 30), max_size=12), step=st.integers(0, 30), keep=st.integers(1, 5))
def test_retention_keeps_the_new_one_and_those_just_before_it(steps: list[int], step: int, keep: int) -> None:
    new = f"step-{step:08d}-ffffffffffff"
    committed = [*names(steps), new, ".saving-1", "notes"]
    gone = superseded(committed, new, keep)
    assert new not in gone
    left = [parsed.step for name in committed if name not in gone and (parsed := parse_name(name))]
    before = sorted((other for other in steps if other < step), reverse=True)[: keep - 1]
    assert sorted(left, reverse=True) == [step, *before]
