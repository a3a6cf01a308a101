"""A release's states, gates and lineage: pure rules."""

from __future__ import annotations

import pytest

from lapis.errors import ConflictError, InputError
from lapis.release.gates import judge, require
from lapis.release.lineage import Lineage, from_facts
from lapis.release.release import MOVES, State, check_move, parse_reference

GOOD = {"bits_per_byte": 1.5, "yardsticks": {"5-gram": 2.0, "xz -9e": 1.8}}
COUNTED = Lineage(licences={"MIT": 90, "unknown": 10})


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("to", State)
def test_illegal_moves_are_refused_with_the_legal_ones(state: State, to: State) -> None:
    if to in MOVES[state]:
        check_move("m:1", state, to)
        return
    with pytest.raises(ConflictError) as caught:
        check_move("m:1", state, to)
    assert f"is {state} and cannot become {to}" in caught.value.message
    assert all(legal in caught.value.message for legal in MOVES[state])


def test_every_state_can_be_reached_and_only_retired_is_an_end() -> None:
    assert {to for moves in MOVES.values() for to in moves} == set(State) - {State.DRAFT}
    assert [state for state, moves in MOVES.items() if not moves] == [State.RETIRED]


def test_a_good_release_passes_and_what_is_unlicensed_is_counted() -> None:
    gates = {gate.name: gate for gate in judge(GOOD, COUNTED)}
    assert {name: gate.verdict for name, gate in gates.items()} == {
        "digest": "pass", "evaluation": "pass", "yardstick": "pass", "licences": "warn",
    }  # fmt: skip
    assert "10 of 100" in gates["licences"].text
    require("m:1", list(gates.values()))


@pytest.mark.parametrize(
    ("report", "lineage", "refused"),
    [
        (None, COUNTED, "evaluation"),
        ({"perplexity": 7.0}, COUNTED, "evaluation"),
        ({"bits_per_byte": 2.0, "yardsticks": {"5-gram": 2.0}}, COUNTED, "yardstick"),
        (GOOD, Lineage(), "licences"),
        ({**GOOD, "weights": "an older checkpoint"}, COUNTED, "evaluation"),
    ],
)
def test_what_is_missing_refuses_until_it_is_forced(
    report: dict[str, object] | None, lineage: Lineage, refused: str
) -> None:
    gates = judge(report, lineage)
    with pytest.raises(ConflictError, match=rf"\[{refused}\]") as caught:
        require("m:1", gates)
    assert "--force --reason" in caught.value.hint
    require("m:1", gates, force=True)


def test_an_evaluation_counts_for_the_weights_it_measured() -> None:
    lineage = Lineage(checkpoint="c" * 64, licences={"MIT": 1})
    for weights in ("c" * 64, "w" * 64, ""):
        require("m:1", judge({**GOOD, "weights": weights}, lineage, weights="w" * 64))


def test_no_force_passes_damaged_weights() -> None:
    with pytest.raises(ConflictError, match=r"\[digest\] model\.safetensors"):
        require("m:1", judge(GOOD, COUNTED, damage="model.safetensors is corrupt"), force=True)


def test_an_evaluation_without_a_yardstick_is_a_warning() -> None:
    assert [g.verdict for g in judge({"bits_per_byte": 1.5}, COUNTED) if g.name == "yardstick"] == ["warn"]


def test_the_weights_own_licence_is_enough_where_the_data_are_not_ours() -> None:
    assert judge(GOOD, Lineage(licence="Apache-2.0"))[-1].verdict == "pass"


def test_a_lineage_counts_documents_per_licence_of_a_dataset_s_table() -> None:
    table = [
        {"source": "a", "licence": "MIT", "documents": 2, "bytes": 10, "tokens": 3},
        {"source": "b", "licence": "", "documents": 3, "bytes": 10, "tokens": 3},
        {"source": "b", "licence": "MIT", "documents": 4, "bytes": 10, "tokens": 3},
    ]
    lineage = from_facts({"run": "r", "dataset": "d" * 64, "licences": table})
    assert lineage.licences == {"MIT": 6, "unknown": 3}
    assert (lineage.documents, lineage.unlicensed) == (9, 3)
    with pytest.raises(InputError, match="Did you mean 'dataset'"):
        from_facts({"datasets": "d"})


@pytest.mark.parametrize(
    "reference", ["", "../etc", "A", "m:", "m:0", "m:x", "m:-1", "m:1:2", "a/b", "m:²", ".m", "m" * 97]
)
def test_what_cannot_be_a_release_is_refused(reference: str) -> None:
    with pytest.raises(InputError):
        parse_reference(reference)


def test_references() -> None:
    assert parse_reference("my-model") == ("my-model", None)
    assert parse_reference("my-model:12") == ("my-model", 12)
