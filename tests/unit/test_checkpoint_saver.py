"""Saving beside the training: a snapshot, one at a time, and no error is lost."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lapis.checkpoint import sharded
from lapis.checkpoint.retention import Retention
from lapis.checkpoint.saver import Saver
from lapis.checkpoint.sharded import latest, load
from lapis.errors import ConflictError
from lapis.storage import lock


@pytest.fixture
def saver(tmp_path: Path) -> Iterator[Saver]:
    saver = Saver(tmp_path, Retention(2))
    yield saver
    saver.close()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """The saving thread waits for this before it writes anything."""
    gate, write = threading.Event(), sharded.write

    def after_gate(*args: object) -> object:
        assert gate.wait(30)
        return write(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(sharded, "write", after_gate)
    return gate


def test_what_is_saved_is_what_was_there_when_it_began(saver: Saver, gate: threading.Event) -> None:
    weight, state = torch.arange(1000.0), {"losses": [1.0]}
    saver.start(1, {"model": {"w": weight}}, state, score=0.5)
    weight.fill_(-1)
    state["losses"].append(2.0)
    assert saver.busy
    assert saver.poll() is None  # does not wait
    gate.set()
    saved = saver.wait()
    assert saved is not None
    assert saved == latest(saver.folder)
    assert saved.manifest.score == 0.5
    groups, state = load(saved)
    assert torch.equal(groups["model"]["w"], torch.arange(1000.0))
    assert state == {"losses": [1.0]}
    assert saver.wait() is None


def test_the_next_one_waits_and_reuses_the_memory(saver: Saver, gate: threading.Event) -> None:
    weight = torch.zeros(1000)
    saver.start(1, {"model": {"w": weight}}, {})
    threading.Timer(0.1, gate.set).start()
    weight.fill_(2)
    first = saver.start(2, {"model": {"w": weight}}, {})  # only now may the staged copy of the first change
    assert first is not None
    assert first.step == 1
    second = saver.wait()
    assert second is not None
    assert [load(saved).groups["model"]["w"][0].item() for saved in (first, second)] == [0, 2]
    assert len(saver._staging) == 1


@pytest.mark.parametrize("call", ["start", "poll", "wait"])
def test_an_error_surfaces_once_at_the_next_call_and_training_may_go_on(saver: Saver, call: str) -> None:
    groups = {"model": {"w": torch.zeros(9)}}
    with lock(saver.folder / ".lock", "a test"):
        saver.start(1, groups, {})
        while saver.busy:
            threading.Event().wait(0.001)
    calls = {"start": lambda: saver.start(2, groups, {}), "poll": saver.poll, "wait": saver.wait}
    with pytest.raises(ConflictError):
        calls[call]()
    assert latest(saver.folder) is None
    saver.start(3, groups, {})
    saved = saver.wait()
    assert saved is not None
    assert saved.step == 3


def test_a_bad_state_is_refused_at_once(saver: Saver) -> None:
    with pytest.raises(ValueError, match="JSON"):
        saver.start(1, {"model": {}}, {"loss": float("nan")})
    assert saver.wait() is None
