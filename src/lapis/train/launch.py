"""The ranks of this machine as processes: started together, signalled together, none left behind. No torch.

A rank is a plain torch.distributed program: all it is given is RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE,
MASTER_ADDR and MASTER_PORT, so torchrun or srun starts it as well.
"""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from lapis.train.heartbeat import SIZE, VARIABLE, Beat, decode

LOST = -9  # the status of ranks whose nursery is gone: the kernel killed them
CLOSE_S = 5.0  # for a nursery to end its ranks and itself


@dataclass(frozen=True)
class Program:
    """What every rank runs: `main(arguments)` of a module that can be imported."""

    module: str
    arguments: tuple[str, ...]


def environment(rank: int, slots: Sequence[int], port: int) -> dict[str, str]:
    """What torch.distributed wants to know, for a rank of a group on this machine. A slot is a device's number."""
    names = {
        "RANK": rank,
        "WORLD_SIZE": len(slots),
        "LOCAL_RANK": slots[rank],
        "LOCAL_WORLD_SIZE": len(slots),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    return {name: str(value) for name, value in names.items()}


def threads_per_rank(ranks: int) -> int:
    """The cores of this process (or OMP_NUM_THREADS, where set) shared among the ranks; at least one each."""
    told = os.environ.get("OMP_NUM_THREADS", "")
    cores = int(told) if told.isdecimal() else len(os.sched_getaffinity(0))
    return max(1, cores // ranks)


def free_port() -> int:
    """A TCP port of this machine that nobody listens on now. If somebody takes it meanwhile, the start fails once."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Ranks(Protocol):
    """The rank processes of a run, wherever they run, as the supervisor sees them.

    A slot is a place for a rank: there are `spares` more of them than ranks, and those of one node, `block` of them,
    are taken and left together. `gone` are those whose node is lost.
    """

    ranks: int
    spares: int
    block: int
    exits: list[int | None]
    order: list[int]  # the ranks that ended, the first one first

    def start(self, slots: Sequence[int]) -> None:
        """Start all ranks anew, at a new meeting point, with fresh heartbeats. All earlier ones must have ended."""

    def signal(self, number: int) -> None:
        """Send a signal to every living rank."""

    def renew(self) -> None:
        """Kill what the ranks come from, and them with it."""

    def wait(self, seconds: float) -> None:
        """Wait so long, or until something happens to a rank; then `exits` and `order` are up to date."""

    def beats(self) -> list[Beat | None]:
        """The last heartbeat of each rank; None where there is none yet."""

    def frozen(self) -> tuple[int, ...]:
        """The ranks that the kernel does not let run."""

    def gone(self) -> tuple[int, ...]:
        """The slots that are lost for good."""

    def log(self, rank: int) -> Path:
        """The file with a rank's output."""


class Group:
    """The rank processes of this machine, from one nursery. `with` ends them all.

    `folder` takes the ranks' output (rank-0000.log …), `beats` their heartbeats; `near`: the run has no ranks
    elsewhere. Only what the first one tells while all is well, such as its progress, goes to the terminal.
    """

    block = 1

    def __init__(
        self,
        program: Program,
        ranks: int,
        folder: Path,
        spares: int = 0,
        beats: Path | None = None,
        near: bool = True,
    ) -> None:
        self.program, self.ranks, self.folder, self.spares = program, ranks, folder, spares
        self.exits: list[int | None] = [None] * ranks
        self.order: list[int] = []  # the ranks that ended, the first one first
        self.pids: list[int | None] = [None] * ranks
        self._near = near
        self._beats_folder = beats or folder
        self._beats: list[int] = []
        self._unread = b""
        self._nursery = self._new_nursery()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._beats:
            os.close(file)
        self._close_nursery()

    def start(self, slots: Sequence[int]) -> None:
        """Start all ranks anew, at a new meeting point, with fresh heartbeats. All earlier ones must have ended."""
        port = free_port()
        self.bear([environment(rank, slots, port) for rank in range(self.ranks)])

    def bear(self, environments: Sequence[Mapping[str, str]]) -> None:
        """Start anew those ranks of a group that are here, each with what it is to find in its environment."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for file in self._beats:
            os.close(file)
        self._beats = [_fresh(self.heartbeat(index)) for index in range(self.ranks)]
        if self._nursery.poll() is not None:
            self.renew()
        self.exits, self.order, self.pids = [None] * self.ranks, [], [None] * self.ranks
        members = [
            {
                "rank": index,
                "environment": {**told, VARIABLE: str(self.heartbeat(index))},
                "output": str(self.log(int(told["RANK"]))),
                "speaks": told["RANK"] == "0",
            }
            for index, told in enumerate(environments)
        ]
        self._order({"start": members})

    def signal(self, number: int) -> None:
        """Send a signal to every living rank."""
        self._order({"signal": number})

    def renew(self) -> None:
        """Take another nursery; the ranks of the old one die with it."""
        self._close_nursery(at_once=True)
        self._unread = b""
        self._nursery = self._new_nursery()
        self.exits = [LOST if code is None else code for code in self.exits]

    def wait(self, seconds: float) -> None:
        """Wait so long, or until something happens to a rank; then `exits` and `pids` are up to date."""
        assert self._nursery.stdout is not None
        channel = self._nursery.stdout.fileno()
        if not select.select([channel], [], [], seconds)[0]:
            return
        data = os.read(channel, 1 << 16)
        if not data:
            self.renew()
            return
        *lines, self._unread = (self._unread + data).split(b"\n")
        for line in lines:
            fact = json.loads(line)
            if "started" in fact:
                self.pids[fact["started"]] = fact["pid"]
            elif "ended" in fact:
                self.exits[fact["ended"]] = fact["status"]
                self.order.append(fact["ended"])

    def beats(self) -> list[Beat | None]:
        """The last heartbeat of each rank; None where there is none yet, or it is being written just now."""
        return [decode(os.pread(file, SIZE, 0)) for file in self._beats]

    def frozen(self) -> tuple[int, ...]:
        """The ranks that the kernel does not let run: stopped, or in a call to a device that does not answer."""
        return tuple(rank for rank, pid in enumerate(self.pids) if pid is not None and _state(pid) in "TtD")

    def gone(self) -> tuple[int, ...]:
        """No slot is lost while the machine is there."""
        return ()

    def log(self, rank: int) -> Path:
        """The file with a rank's output."""
        return self.folder / f"rank-{rank:04d}.log"

    def heartbeat(self, rank: int) -> Path:
        """The file that a rank writes its heartbeat to."""
        return self._beats_folder / f"rank-{rank:04d}.beat"

    def _new_nursery(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "lapis.train.nursery", self.program.module, str(os.getpid())]
        surroundings = {**os.environ, "OMP_NUM_THREADS": str(threads_per_rank(self.ranks))}
        if self._near and any(name == "lo" for _, name in socket.if_nameindex()):
            surroundings.setdefault(
                "GLOO_SOCKET_IFNAME", "lo"
            )  # a host name that does not resolve is no matter
        return subprocess.Popen(
            [*command, *self.program.arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=surroundings,
            start_new_session=True,  # Ctrl-C in the terminal reaches the supervisor alone, which passes it on
        )

    def _close_nursery(self, at_once: bool = False) -> None:
        nursery = self._nursery
        assert nursery.stdin is not None
        assert nursery.stdout is not None
        with suppress(BrokenPipeError):  # it is gone already
            nursery.stdin.close()  # it kills its ranks and ends
        if at_once:
            nursery.kill()
        try:
            nursery.wait(CLOSE_S)
        except subprocess.TimeoutExpired:
            nursery.kill()
            nursery.wait()
        nursery.stdout.close()

    def _order(self, order: dict[str, object]) -> None:
        assert self._nursery.stdin is not None
        with suppress(BrokenPipeError):  # it is gone: the next wait sees that, and takes another one
            self._nursery.stdin.write((json.dumps(order) + "\n").encode())
            self._nursery.stdin.flush()


def _state(pid: int) -> str:
    """A process's state, as one letter (Linux); "X" if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][:1] or "X"
    except OSError:
        return "X"


def _fresh(path: Path) -> int:
    """An empty heartbeat file of full size, open for reading."""
    path.write_bytes(bytes(SIZE))
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
