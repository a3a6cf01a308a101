"""Which models are unloaded for another: as few as needed, those idle for longest, never one in use."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given

from lapis.gateway.memory import Held, to_unload

MODELS = st.lists(
    st.builds(
        Held,
        name=st.uuids().map(str),
        bytes=st.integers(0, 40),
        busy=st.booleans(),
        used_at=st.integers(0, 5).map(float),
    ),
    max_size=8,
)


@given(wanted=st.integers(0, 60), budget=st.integers(0, 120), held=MODELS)
def test_as_few_as_needed_and_the_longest_idle_first(wanted: int, budget: int, held: list[Held]) -> None:
    chosen = to_unload(wanted, budget, held)
    idle = [model for model in held if not model.busy]
    if chosen is None:
        assert sum(model.bytes for model in held if model.busy) + wanted > budget
        return
    gone = [model for model in held if model.name in chosen]
    assert all(not model.busy for model in gone)
    assert sum(model.bytes for model in held if model not in gone) + wanted <= budget
    stay = [model.used_at for model in idle if model not in gone]
    assert all(model.used_at <= min(stay, default=model.used_at) for model in gone)
    last = next((model for model in gone if model.name == chosen[-1]), None)
    if last is not None:
        fewer = [model for model in held if model not in gone] + [last]
        assert sum(model.bytes for model in fewer) + wanted > budget
