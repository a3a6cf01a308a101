"""Fine-tuning with parts of a model on every rank: losses, norms and held-out figures are those of one process."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from lapis.train.mesh import Mesh
from tests.tuning_worker import CASES, Case, in_one_process, objective

from .test_parallel_run import launch

SHORT = [
    case
    for case in CASES
    if (case.objective, case.mesh, case.model)
    in [
        ("sft", "fsdp=2", "llama"),
        ("sft", "tp=2", "gpt2"),
        ("dpo", "cp=2", "llama"),
        ("dpo", "ep=2", "mixtral"),
    ]
]
PAIRS, FOURS = (
    [case for case in CASES if Mesh.parse(case.mesh).size == size and case not in SHORT] for size in (2, 4)
)


def tune(folder: Path, cases: list[Case]) -> None:
    """Run the cases, of as many ranks each, in one launch."""
    names, size = [case.name for case in cases], Mesh.parse(cases[0].mesh).size
    ranks = launch([sys.executable, "-W", "error", "-m", "tests.tuning_worker", str(folder), *names], size)
    outputs = [rank.communicate(timeout=250)[0] for rank in ranks]
    assert not any(rank.returncode for rank in ranks), "\n".join(text[-3000:] for text in outputs)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks wrote of the short cases."""
    folder = tmp_path_factory.mktemp("tuned")
    tune(folder, SHORT)
    return folder


def check(folder: Path, case: Case) -> None:
    """The case's ranks against one process."""
    expected = in_one_process(case)
    for rank in range(Mesh.parse(case.mesh).size):
        found = json.loads((folder / f"{case.name}.{rank}.json").read_text())
        assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert found["norms"] == pytest.approx(expected["norms"], rel=1e-4)
        for ours, theirs in zip(found["heldout"], expected["heldout"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)
    assert expected["losses"][-1] != pytest.approx(expected["losses"][0], rel=1e-3), "it learns"
    assert expected["heldout"][0] != expected["heldout"][1]


@pytest.mark.parametrize("case", SHORT, ids=lambda case: case.name)
def test_two_ranks_tune_like_one_process(tuned: Path, case: Case) -> None:
    check(tuned, case)


@pytest.mark.parametrize("case", [SHORT[0], SHORT[2]], ids=lambda case: case.objective)
def test_a_step_has_as_many_tokens_on_any_number_of_ranks(case: Case) -> None:
    goal = objective(case)
    for step in range(6):
        batch = goal.step(step, 0, 1)
        assert batch.tokens == sum(len(micro.ids_T) for micro in batch.micros)
        assert [goal.step(step, rank, 2).tokens for rank in range(2)] == [batch.tokens] * 2


@pytest.mark.long
@pytest.mark.parametrize("cases", [PAIRS, FOURS], ids=["two ranks", "four ranks"])
def test_every_mesh_tunes_like_one_process(tmp_path: Path, cases: list[Case]) -> None:
    tune(tmp_path, cases)
    for case in cases:
        check(tmp_path, case)
