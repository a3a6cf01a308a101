"""Ranks on several nodes, each with an agent: a node may die, fall silent, or be called down; spares take over."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lapis.checkpoint.retention import Retention
from lapis.checkpoint.sharded import save
from lapis.errors import ConflictError, UnavailableError
from lapis.storage import HELD, lock
from lapis.train.launch import Program
from lapis.train.nodes import Allocation, NodeGroup
from lapis.train.recipe import SupervisorSection
from lapis.train.run import Run
from lapis.train.supervisor import End, newest_step, supervise

from .test_supervisor import events_of, paths, told, until

ROOT = Path(__file__).parents[2]
LEASE_S = 4.0
SECTION = SupervisorSection(restarts=3)


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", paths()["PYTHONPATH"])


def group(
    folder: Path, nodes: int = 3, used: int = 2, ranks: int = 2, down: set[str] | None = None
) -> NodeGroup:
    program = Program("tests.rank_program", (str(folder), "60", "10", "0.02"))
    launch = (sys.executable, "-m", "tests.node_launcher", str(nodes))
    allocation = Allocation(nodes, "127.0.0.1", launch, lambda: down or ())
    return NodeGroup(program, ranks, used, folder / "ranks", allocation, LEASE_S, events_of(folder))


def run(folder: Path, harm: Callable[[list[str]], None], ranks: int = 2, down: set[str] | None = None) -> End:
    """Run the small program to its end; once it trains, do some harm to the nodes that it runs on."""

    def wait_and_harm() -> None:
        until(lambda: len(told(folder, "step")) > 12)
        harm(told(folder, "placed")[0]["nodes"])

    harmed = threading.Thread(target=wait_and_harm)
    with group(folder, ranks=ranks, down=down) as nodes:
        harmed.start()
        end = supervise(nodes, SECTION, events_of(folder), lambda: newest_step(folder / "checkpoints"))
        harmed.join()
        assert None not in nodes.exits
    return end


def processes(folder: Path, *nodes: str) -> list[int]:
    """The agents on some nodes, and all below them."""
    marks = {f"SLURMD_NODENAME={node}".encode() for node in nodes}
    found = []
    for process in (int(entry) for entry in os.listdir("/proc") if entry.isdecimal()):
        with contextlib.suppress(OSError):
            variables = set(Path(f"/proc/{process}/environ").read_bytes().split(b"\0"))
            command = Path(f"/proc/{process}/cmdline").read_bytes()
            if marks & variables and str(folder).encode() in command:
                found.append(process)
    return found


def send(folder: Path, number: int, *nodes: str) -> None:
    for process in processes(folder, *nodes):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)


def resumed(folder: Path) -> int:
    """From which step the last attempt went on."""
    return int(told(folder, "resume")[-1]["step"])


def test_a_dead_node_is_replaced_by_the_spare_one(tmp_path: Path) -> None:
    assert run(tmp_path, lambda nodes: send(tmp_path, signal.SIGKILL, nodes[0])) == End("finished", 0)
    first, second = (event["nodes"] for event in told(tmp_path, "placed"))
    assert set(second) == {"n1", "n2", "n3"} - {first[0]}
    assert [event["node"] for event in told(tmp_path, "node_lost")] == [first[0]]
    assert told(tmp_path, "restart")[0]["cause"].startswith("rank 0 was lost with its node")
    assert resumed(tmp_path) >= 10
    assert not processes(tmp_path, "n1", "n2", "n3")


@pytest.mark.long
def test_a_node_that_falls_silent_is_lost_and_ends_its_ranks_when_it_wakes(tmp_path: Path) -> None:
    silent: list[str] = []

    def freeze(nodes: list[str]) -> None:
        silent.append(nodes[1])
        send(tmp_path, signal.SIGSTOP, nodes[1])

    assert run(tmp_path, freeze) == End("finished", 0)
    lost = told(tmp_path, "node_lost")
    assert [(event["node"], event["cause"].split(" for")[0]) for event in lost] == [
        (silent[0], "gave no sign")
    ]
    assert processes(tmp_path, *silent)  # it is still there, as it was
    send(tmp_path, signal.SIGCONT, *silent)
    until(lambda: not processes(tmp_path, *silent))


@pytest.mark.long
def test_a_node_that_the_cluster_calls_down_is_left_though_it_works(tmp_path: Path) -> None:
    down: set[str] = set()
    assert run(tmp_path, lambda nodes: down.add(nodes[1]), down=down) == End("finished", 0)
    assert [event["node"] for event in told(tmp_path, "node_lost")] == list(down)
    assert down.isdisjoint(told(tmp_path, "placed")[-1]["nodes"])


@pytest.mark.long
def test_two_ranks_a_node_move_together_and_without_a_node_it_ends(tmp_path: Path) -> None:
    def kill_two(nodes: list[str]) -> None:
        assert nodes[0] == nodes[1] != nodes[2] == nodes[3]
        send(tmp_path, signal.SIGKILL, nodes[0])
        until(lambda: len(told(tmp_path, "placed")) == 2)
        moved = told(tmp_path, "placed")[1]["nodes"]
        assert moved[0] == moved[1] not in nodes and moved[2:] == nodes[2:]
        send(tmp_path, signal.SIGKILL, nodes[2])

    end = run(tmp_path, kill_two, ranks=4)
    assert (end.outcome, end.status) == ("gave_up", 75)  # elsewhere it can go on


def test_locks_that_a_lost_node_holds_stand_in_nobody_s_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = {"model": {"weights": torch.zeros(3)}}
    run = Run(tmp_path)
    with lock(tmp_path / ".lock", "it"), lock(tmp_path / "checkpoints" / ".lock", "it"):  # by a frozen rank
        with pytest.raises(ConflictError):
            save(run.checkpoints, 1, weights, {}, keep=Retention(2))
        monkeypatch.setenv(HELD, "1")
        with run.hold():
            save(run.checkpoints, 1, weights, {}, keep=Retention(2))
    assert newest_step(run.checkpoints) == 1


def test_agents_that_never_come_are_named(tmp_path: Path) -> None:
    allocation = Allocation(2, "127.0.0.1", ("false",), lambda: ())
    program = Program("tests.rank_program", (str(tmp_path), "1", "1", "0"))
    with (
        pytest.raises(UnavailableError, match="Of 2 nodes 0 answered; 2 are needed"),
        NodeGroup(program, 2, 2, tmp_path / "ranks", allocation, LEASE_S, events_of(tmp_path)),
    ):
        pass


def test_without_the_token_nobody_is_an_agent(tmp_path: Path) -> None:
    with group(tmp_path, nodes=1, used=1, ranks=1) as nodes:
        address = nodes._listener.getsockname()
        with socket.create_connection(address) as stranger:
            stranger.sendall(b'{"hello": "guess", "node": "n9", "address": "127.0.0.1"}\n')
            stranger.settimeout(10)
            until(lambda: nodes.wait(0.05) is None and _ended(stranger))
        assert nodes.gone() == ()


def _ended(channel: socket.socket) -> bool:
    return bool(select.select([channel], [], [], 0)[0]) and channel.recv(1) == b""
