"""Rules of checkpoints that hold for every input: flipped bits, any tensors and state, retention."""

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

from lapis.checkpoint.folder import read
from lapis.checkpoint.piece import Box, Part, Sharded
from lapis.checkpoint.retention import Kept, Retention, superseded
from lapis.checkpoint.sharded import Checkpoint, Groups, latest, load, save
from lapis.checkpoint.tensors import DTYPES
from lapis.errors import IntegrityError
from tests.checkpoints import saved_by


@pytest.fixture(scope="module")
def saved() -> Iterator[Checkpoint]:
    """Of two ranks: the rows of a are shared between them, b is on one of them."""
    folder = Path(tempfile.mkdtemp())
    a, moment = torch.randn(64, 3).bfloat16(), torch.randn(99)
    ranks: list[Groups] = [
        {
            "model": {"a": Sharded((64, 3), (Part(Box((0, 0), (24, 3)), a[:24]),)), "b": torch.ones(5)},
            "optimizer": {"m": moment},
        },
        {"model": {"a": Sharded((64, 3), (Part(Box((24, 0), (40, 3)), a[24:]),))}},
    ]
    yield saved_by(folder, 3, ranks, {"seed": 1, "text": "é"})
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("seed", "flips"), [(0, 40), *(pytest.param(seed, 40, marks=pytest.mark.long) for seed in range(1, 5))]
)
def test_every_flipped_bit_is_refused_with_its_place_named(saved: Checkpoint, seed: int, flips: int) -> None:
    """One random bit of one random file: tensors, headers, state and the manifest itself."""
    chance = random.Random(seed)
    for _ in range(flips):
        path = chance.choice(sorted(saved.folder.iterdir()))
        whole = path.read_bytes()
        bit = chance.randrange(len(whole) * 8)
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        hit = [
            region.what or "digest"
            for region in saved.manifest.regions()
            if region.file == path.name and region.start <= bit // 8 < region.start + region.bytes
        ]
        place = rf"{path.name} does not match.* {hit[0] if hit else 'own digest'}\.|{path.name} .*name of"
        try:
            with pytest.raises(IntegrityError, match=place):
                load(read(saved.folder))
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
    loaded = load(
        save(tmp_path_factory.mktemp("c"), 1, {"model": extra}, {"value": state}, keep=Retention(1))
    )
    assert loaded.state == {"value": state}
    assert loaded.groups["model"].keys() == extra.keys()
    assert all(torch.equal(loaded.groups["model"][name], tensor) for name, tensor in extra.items())
    assert all(loaded.groups["model"][name].shape == tensor.shape for name, tensor in extra.items())


STEPS = st.lists(
    st.tuples(st.integers(0, 30), st.none() | st.floats(0, 9)), max_size=14, unique_by=lambda item: item[0]
)


@settings(derandomize=True, max_examples=300, deadline=None)
@given(
    committed=STEPS,
    step=st.integers(0, 30),
    score=st.none() | st.floats(0, 9),
    keep=st.integers(1, 5),
    every=st.none() | st.integers(1, 9),
    best=st.integers(0, 3),
)
def test_retention_keeps_the_last_the_round_and_the_best(
    committed: list[tuple[int, float | None]],
    step: int,
    score: float | None,
    keep: int,
    every: int | None,
    best: int,
) -> None:
    new = Kept(step, "new", score)
    others = [Kept(other, f"old-{other}", loss) for other, loss in committed]
    gone = superseded([*others, new], new, Retention(keep, every, best))
    left = {item.name for item in [*others, new]} - set(gone)
    assert len(gone) == len(set(gone))
    assert "new" in left
    past = sorted((item for item in others if item.step < step), reverse=True)
    assert not left & {
        item.name for item in others if item.step >= step
    }  # an abandoned future never comes back
    assert left >= {item.name for item in past[: keep - 1]}
    round_ones = {item.name for item in past if every and item.step % every == 0}
    assert left >= round_ones
    scores = sorted(item.score for item in [*past, new] if item.score is not None)
    better = {item.name for item in past if item.score is not None and item.score in scores[:best]}
    assert left - {"new"} <= {item.name for item in past[: keep - 1]} | round_ones | better
    if best and scores:
        assert (
            min(item.score for item in [*past, new] if item.name in left and item.score is not None)
            == scores[0]
        )
    assert len(left) <= keep + len(round_ones) + best
