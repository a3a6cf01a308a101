"""A mesh line, the ranks along its axes, and who holds which part of a weight."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from lapis.checkpoint.piece import uncovered
from lapis.cli.train import command as train_command
from lapis.errors import ConfigError
from lapis.kernels.stock import StockOps
from lapis.model.families import skeleton
from lapis.model.shapes import shapes
from lapis.train import layout
from lapis.train.mesh import AXES, Mesh
from lapis.train.placement import placements
from lapis.train.recipe import TrainSection
from tests.parallel_worker import LLAMA, MODELS


def test_a_mesh_line_is_read_and_written() -> None:
    mesh = Mesh.parse("tp=2, fsdp=4,dp=1")
    assert mesh == Mesh(tp=2, fsdp=4) and str(mesh) == "fsdp=4,tp=2" and mesh.size == 8
    assert Mesh.parse(str(mesh)) == mesh and Mesh.parse("") == Mesh()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("fdsp=2", "unknown axis 'fdsp'"),
        ("tp=2,tp=4", "the axis tp is named twice"),
        ("tp=0", "'tp=0'"),
        ("tp", "'tp'"),
        ("tp=-2", "'tp=-2'"),
        ("tp=²", "'tp=²'"),
    ],
)
def test_a_wrong_mesh_line_is_refused(line: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        Mesh.parse(line)
    assert message in error.value.message


def test_every_rank_stands_somewhere_else_and_neighbours_share_tp() -> None:
    mesh = Mesh(pp=2, dp=2, ep=1, fsdp=3, cp=2, tp=2)
    assert [mesh.rank(mesh.place(rank)) for rank in range(mesh.size)] == list(range(48))
    assert len({mesh.place(rank) for rank in range(mesh.size)}) == 48
    assert mesh.peers(5, "tp") == (4, 5) and mesh.peers(0, "fsdp") == (0, 4, 8)
    for axes in itertools.combinations(AXES, 2):
        groups = {mesh.peers(rank, *axes) for rank in range(mesh.size)}
        assert sorted(itertools.chain(*groups)) == list(range(48)), "every rank is in one group"


def test_ranks_that_compute_together_see_the_same_samples() -> None:
    mesh = Mesh(dp=2, ep=2, fsdp=3, cp=2, tp=2)
    for rank in range(mesh.size):
        assert {mesh.data_rank(peer) for peer in mesh.peers(rank, "cp", "tp")} == {mesh.data_rank(rank)}
    assert {mesh.data_rank(rank) for rank in range(mesh.size)} == set(range(mesh.data_ranks))


def test_a_mesh_that_does_not_divide_names_everything() -> None:
    with pytest.raises(ConfigError) as error:
        Mesh(tp=3, cp=2, fsdp=3, ep=2).check(LLAMA, sequence=100, batch=8)
    for part in (
        "heads = 4 does not divide by tp = 3",
        "kv_heads = 2 does not divide by tp = 3",
        "train.sequence = 100 does not divide by 2·cp·tp = 12",
        "train.batch = 8 does not divide by dp·ep·fsdp = 6",
        "ep = 2: a model of the family llama has no experts",
    ):
        assert part in error.value.message
    assert "ffn" not in error.value.message, "96 divides by 3"
    Mesh(tp=2, cp=2, fsdp=4, ep=2).check(MODELS["mixtral"], sequence=128, batch=8)


@pytest.mark.parametrize("name", MODELS)
def test_shapes_are_those_of_the_model(name: str) -> None:
    model = skeleton(MODELS[name], StockOps(), torch.float32)
    assert list(shapes(MODELS[name]).items()) == [(n, tuple(p.shape)) for n, p in model.named_parameters()]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "mesh", [Mesh(fsdp=3), Mesh(tp=2, fsdp=2), Mesh(dp=2, cp=2, tp=2, fsdp=3), Mesh(fsdp=40)], ids=str
)
def test_the_ranks_hold_every_element_as_often_as_there_are_copies(name: str, mesh: Mesh) -> None:
    meshes = [mesh, replace(mesh, ep=2)] if MODELS[name].experts == 4 else [mesh]
    for mesh, (weight, placement) in itertools.product(meshes, placements(MODELS[name]).items()):
        first = [
            rank
            for rank in range(mesh.size)
            if all(getattr(mesh.place(rank), axis) == 0 for axis in placement.copies())
        ]
        boxes = [piece.whole for rank in first for piece in placement.held(mesh, rank)]
        assert uncovered(placement.shape, boxes) is None, weight
        for rank in range(mesh.size):
            twin = mesh.place(rank)._replace(**dict.fromkeys(placement.copies(), 0))
            assert placement.held(mesh, rank) == placement.held(mesh, mesh.rank(twin))


@pytest.mark.parametrize("name", MODELS)
def test_a_dry_run_counts_every_parameter_once_and_what_ranks_hold(name: str) -> None:
    config, section = MODELS[name], TrainSection(steps=1, sequence=32, batch=8, micro_batch=1)
    (alone,) = layout.plan(config, Mesh(), section)
    assert alone.parameters == config.parameters and alone.master == 4 * config.parameters
    sharded = layout.plan(config, Mesh(fsdp=4), section)
    assert sum(rank.parameters for rank in sharded) == config.parameters
    assert max(rank.total for rank in sharded) < alone.total
    copies = layout.plan(config, Mesh(dp=2), section)
    assert {rank.parameters for rank in copies} == {config.parameters}
    halves = layout.plan(config, Mesh(pp=2, tp=2), section)
    assert [list(rank.heads) for rank in halves] == [[0, 1], [2, 3]] * 2
    assert {number for rank in halves for span in rank.layers for number in span} == set(range(config.layers))
    stages = layout.plan(config, Mesh(pp=2), section)
    assert sum(rank.parameters for rank in stages) == config.parameters, "a tied table is kept once"
    again = layout.plan(config, Mesh(), section.model_copy(update={"recompute": "full"}))[0]
    assert again.activations < alone.activations


def test_a_dry_run_says_which_rank_lacks_memory_and_joins_equal_ranks() -> None:
    layouts = layout.plan(LLAMA, Mesh(fsdp=2, tp=2), TrainSection(steps=1, sequence=32, batch=8))
    assert [row[0] for row in layout.rows(layouts)] == ["0, 2", "1, 3"]
    layout.check_memory(layouts, 10**9)
    with pytest.raises(ConfigError, match=r"Rank 0 needs about .* [kM]B, there are .* (bytes|kB)\."):
        layout.check_memory(layouts, 10**5)


def test_the_command_shows_the_layout_of_a_cluster_and_starts_nothing(tmp_path: Path) -> None:
    recipe = Path(__file__).parents[2] / "recipes" / "laptop.toml"
    line = (
        "--dry-run",
        "--ranks",
        "24",
        "--set",
        "train.batch=24",
        "--set",
        "train.mesh=fsdp=12,tp=2",
        "--json",
    )
    done = CliRunner().invoke(train_command, [str(recipe), *line], catch_exceptions=False)
    facts = json.loads(done.stdout)
    assert len(facts["ranks"]) == 24 and facts["ranks"][3]["place"]["fsdp"] == 1
    with pytest.raises(ConfigError, match="24 ranks, but 8 were started"):
        CliRunner().invoke(
            train_command,
            [str(recipe), *line[:2], "8", *line[3:]],
            catch_exceptions=False,
            standalone_mode=False,
        )


@pytest.mark.parametrize(
    ("options", "said"), [(("--memory", "8"), "--dry-run"), (("--spares", "1"), "--ranks")]
)
def test_an_option_that_would_do_nothing_is_refused(options: tuple[str, ...], said: str) -> None:
    recipe = Path(__file__).parents[2] / "recipes" / "laptop.toml"
    done = CliRunner().invoke(train_command, [str(recipe), *options])
    assert done.exit_code == 2
    assert said in done.output
