"""A pipeline's stages: who holds what, how evenly, and which recipes fit their meshes."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lapis import config
from lapis.data.loader import TokenBatch
from lapis.errors import ConfigError
from lapis.model.shapes import shapes
from lapis.train import layout
from lapis.train.mesh import Mesh
from lapis.train.recipe import Recipe, TrainSection
from lapis.train.stages import PER_RANK, Pipelining, Stages, even
from tests.parallel_worker import LLAMA, MODELS

RECIPES = Path(__file__).parents[2] / "recipes"


@given(st.lists(st.integers(1, 9), min_size=1, max_size=7), st.integers(1, 7))
def test_no_other_cut_has_a_cheaper_dearest_stage(costs: list[int], count: int) -> None:
    count = min(count, len(costs))
    spans = even(costs, count)
    assert [layer for span in spans for layer in span] == list(range(len(costs))) and all(spans)
    every = ((0, *borders, len(costs)) for borders in itertools.combinations(range(1, len(costs)), count - 1))
    dearest = min(max(sum(costs[a:b]) for a, b in itertools.pairwise(borders)) for borders in every)
    assert max(sum(costs[layer] for layer in span) for span in spans) == dearest


@pytest.mark.parametrize("schedule", PER_RANK)
@pytest.mark.parametrize("model", MODELS)
def test_every_weight_is_kept_by_one_rank_and_used_where_its_layer_is(
    model: str, schedule: Pipelining
) -> None:
    shape = replace(MODELS[model], layers=9)
    stages = Stages.cut(shape, 3, schedule, 32)
    held = sorted(stage for rank in range(3) for stage in stages.of(rank))
    assert held == list(range(len(stages.spans))) and len(held) == 3 * PER_RANK[schedule]
    for name in shapes(shape):
        assert sum(stages.keeps(rank, name) for rank in range(3)) == 1, name
        users = [stage for stage in held if stages.uses(stage, name)]
        assert len(users) == (2 if name == "embed" and shape.tied else 1), name
        for stage in users:
            rank = next(rank for rank in range(3) if stage in stages.of(rank))
            assert stages.keeps(rank, name) or (name == "embed" and stages.borrower() == rank)


def test_a_v_leads_down_the_ranks_and_up_again() -> None:
    shape = replace(LLAMA, layers=6)
    assert [Stages.cut(shape, 3, "zero-bubble-v", 32).of(rank) for rank in range(3)] == [
        (0, 5),
        (1, 4),
        (2, 3),
    ]
    assert [Stages.cut(shape, 3, "interleaved", 32).of(rank) for rank in range(3)] == [(0, 3), (1, 4), (2, 5)]
    assert Stages.cut(shape, 3, "zero-bubble-v", 32).borrower() is None, (
        "first and last stage are on one rank"
    )
    assert Stages.cut(shape, 3, "1f1b", 32).borrower() == 2


def test_a_large_head_takes_layers_from_the_last_stage() -> None:
    small, large = (replace(LLAMA, layers=8, vocab_size=size) for size in (96, 2048))
    assert [len(span) for span in Stages.cut(small, 2, "1f1b", 32).spans] == [4, 4]
    assert [len(span) for span in Stages.cut(large, 2, "1f1b", 32).spans] == [6, 2]


def test_what_does_not_fit_a_pipeline_is_named() -> None:
    with pytest.raises(ConfigError, match="makes 4 stages .* only 2 layers"):
        Stages.cut(LLAMA, 2, "interleaved", 32)
    with pytest.raises(ConfigError, match="has 1 micro-batches"):
        layout.plan(LLAMA, Mesh(pp=2), TrainSection(steps=1, sequence=32, batch=8))
    with pytest.raises(ConfigError, match="needs a multiple of 2"):
        Stages.cut(replace(LLAMA, layers=4), 2, "interleaved", 32).check(5)
    Stages.cut(LLAMA, 2, "1f1b", 32).check(5)


def test_a_dry_run_tells_the_layers_of_every_stage_and_what_waits() -> None:
    shape = replace(LLAMA, layers=8)
    section = TrainSection(steps=1, sequence=32, batch=8, micro_batch=1, pipeline="zero-bubble-v")
    layouts = layout.plan(shape, Mesh(pp=2, fsdp=2), section)
    assert [row[:2] for row in layout.rows(layouts)] == [("0–1", "0–1 and 6–7"), ("2–3", "2–3 and 4–5")]
    held = sum(rank.parameters for rank in layouts)
    assert held == shape.parameters
    one, all_at_once = (
        layout.plan(shape, Mesh(pp=2), section.model_copy(update={"pipeline": kind}))[0].activations
        for kind in ("1f1b", "gpipe")
    )
    assert one < all_at_once / 3, "two of eight micro-batches wait, not all"


def test_a_padded_batch_ends_with_a_document_that_counts_nothing() -> None:
    ids = np.arange(5)
    batch = TokenBatch(ids, ids + 1, (2, 3), np.ones(5, np.float32), np.ones((2, 5), np.float32))
    padded = batch.padded(4)
    assert padded.lengths == (2, 3, 3) and batch.padded(5) is batch
    assert all(part is not None and part.shape[-1] == 8 for part in (*padded[:2], *padded[3:]))
    assert list(padded.targets_T[5:]) == [-1] * 3, "a target that is none"
    assert padded.weights_T is not None and padded.weights_T.sum() == 5


@pytest.mark.parametrize(
    "path",
    [path for path in sorted(RECIPES.glob("*.toml")) if "mesh =" in path.read_text()],
    ids=lambda path: path.stem,
)
def test_the_layout_of_every_recipe_with_a_mesh_holds_the_model_once(path: Path) -> None:
    recipe = config.load(path, Recipe)
    shape = recipe.model.resolve(recipe.tokenizer.vocab_size)
    mesh = Mesh.parse(recipe.train.mesh)
    layouts = layout.plan(shape, mesh, recipe.train)
    kept = sum(rank.parameters for rank in layouts if rank.place.dp == 0)
    assert shape.parameters <= kept <= 1.01 * shape.parameters * mesh.tp, "norms are on every tp rank"
    layout.check_memory(layouts, 80 * 10**9)
