"""Ranks on several nodes: one agent on each, spares among them with everything imported. For the supervisor.

An agent's word arrives four times a second. A node is lost when its connection ends, when it was silent for a lease,
or when the cluster says that it is down though its agent still speaks: half dead, it is told to end its ranks.
"""

from __future__ import annotations

import hmac
import json
import os
import secrets
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lapis.errors import UnavailableError
from lapis.log import EventLog, logger
from lapis.storage import HELD
from lapis.train.agent import LEASE, TOKEN
from lapis.train.heartbeat import Beat, decode
from lapis.train.launch import LOST, Program

MARGIN_S = 0.5  # for an agent whose lease ran out to have killed its ranks
LOOK_DOWN_S = 3.0  # between two questions to the cluster which nodes are down
JOIN_S = 120.0  # for the agents to be there at the beginning
LATE_S = 15.0  # for the spare ones, once enough are there
CLOSE_S = 5.0
MESSAGE = 1 << 20  # bytes; a longer line is no agent's


@dataclass(frozen=True)
class Allocation:
    """Nodes that are ours for a while. `launch` is put before the agent's command to start it once on each node."""

    nodes: int
    address: str  # of this node, as the others reach it
    launch: tuple[str, ...]
    down: Callable[[], Collection[str]]  # the nodes that the cluster holds for lost


@dataclass
class _Agent:
    """What is known of the agent on one node."""

    channel: socket.socket
    node: str = ""  # empty until it has shown its token
    address: str = ""
    heard: float = field(default_factory=time.monotonic)
    unread: bytes = b""
    dismissed: str = ""  # why it is to end
    gone: str = ""  # why it is lost, its ranks with it
    told: dict[str, Any] = field(default_factory=dict)  # its last tick


class NodeGroup:
    """The rank processes of one run on the nodes of an allocation: `nodes` in use, all others spare.

    Node number i, by the order in which the agents came, has the slots i * block and so on.
    """

    def __init__(
        self, program: Program, ranks: int, nodes: int, folder: Path, allocation: Allocation, lease_s: float,
        events: EventLog,
    ) -> None:  # fmt: skip
        self.program, self.ranks, self.folder, self.allocation = program, ranks, folder, allocation
        self.block = ranks // nodes
        self.spares = (allocation.nodes - nodes) * self.block
        self.lease_s, self.events = lease_s, events
        self.exits: list[int | None] = [None] * ranks
        self.order: list[int] = []
        self.attempt = 0
        self._slots: tuple[int, ...] = ()
        self._agents: list[_Agent] = []  # those that have shown their token, by node number
        self._beats: list[Beat | None] = [None] * ranks
        self._frozen: set[int] = set()
        self._token = secrets.token_hex(32)
        self._select = selectors.DefaultSelector()
        self._looked = time.monotonic()

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._listener = socket.create_server((self.allocation.address, 0), backlog=self.allocation.nodes)
        self._listener.setblocking(False)
        self._select.register(self._listener, selectors.EVENT_READ, None)
        self._launcher = self._launch()
        try:
            self._join()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for key in list(self._select.get_map().values()):
            if key.data is not None:
                key.data.channel.close()  # the agent kills its ranks and ends
        self._listener.close()
        self._select.close()
        for number in (None, signal.SIGTERM, signal.SIGKILL):  # a lost node's agent never ends
            if number is not None:
                self._launcher.send_signal(number)
            with suppress(subprocess.TimeoutExpired):
                self._launcher.wait(CLOSE_S)
                return

    def start(self, slots: Sequence[int]) -> None:
        """Start all ranks anew, at a new meeting point, with fresh heartbeats. All earlier ones must have ended."""
        self.attempt += 1
        self.exits, self.order, self._slots = [None] * self.ranks, [], tuple(slots)
        self._beats, self._frozen = [None] * self.ranks, set()
        first = self._agents[slots[0] // self.block]
        meeting = {"MASTER_ADDR": first.address, "MASTER_PORT": str(first.told["port"])}
        for number in dict.fromkeys(slot // self.block for slot in slots):
            environments = [
                {
                    **meeting,
                    HELD: "1",
                    "RANK": str(rank),
                    "WORLD_SIZE": str(self.ranks),
                    "LOCAL_RANK": str(slot % self.block),
                    "LOCAL_WORLD_SIZE": str(self.block),
                }
                for rank, slot in enumerate(slots)
                if slot // self.block == number
            ]
            self._send(self._agents[number], start=environments, attempt=self.attempt)
        nodes = [self._agents[slot // self.block].node for slot in slots]
        self.events.write("placed", nodes=nodes, attempt=self.attempt)
        self._count_lost()

    def signal(self, number: int) -> None:
        """Send a signal to every living rank."""
        for agent in self._agents:
            self._send(agent, signal=number)

    def renew(self) -> None:
        """Kill what the ranks come from, and them with it."""
        for agent in self._agents:
            self._send(agent, renew=True)

    def wait(self, seconds: float) -> None:
        """Wait so long, or until a node says something; then `exits` and `order` are up to date."""
        for key, _ in self._select.select(seconds):
            if key.data is None:
                self._welcome()
            else:
                self._hear(key.data)
        now = time.monotonic()
        for agent in self._agents:
            if not agent.gone and now - agent.heard > self.lease_s + MARGIN_S:
                self._lose(agent, f"gave no sign for {now - agent.heard:,.1f} s")
        if now - self._looked > LOOK_DOWN_S:
            self._looked = now
            down = self.allocation.down()
            for agent in self._agents:
                if agent.node in down and not (agent.dismissed or agent.gone):
                    agent.dismissed = "is down, as the cluster says"
                    agent.channel.shutdown(socket.SHUT_WR)  # it kills its ranks, then ends the connection
        self._count_lost()

    def beats(self) -> list[Beat | None]:
        """The last heartbeat of each rank; None where there is none yet."""
        return list(self._beats)

    def frozen(self) -> tuple[int, ...]:
        """The ranks that their node's kernel does not let run."""
        return tuple(sorted(self._frozen))

    def gone(self) -> tuple[int, ...]:
        """The slots whose node is lost, or never came."""
        there = {number for number, agent in enumerate(self._agents) if not agent.gone}
        return tuple(slot for slot in range(self.ranks + self.spares) if slot // self.block not in there)

    def log(self, rank: int) -> Path:
        """The file with a rank's output."""
        return self.folder / f"rank-{rank:04d}.log"

    def _launch(self) -> subprocess.Popen[bytes]:
        address, port = self._listener.getsockname()[:2]
        place = [address, str(port), str(self.folder), str(self.block)]
        command = [sys.executable, "-m", "lapis.train.agent", *place, self.program.module]
        return subprocess.Popen(
            [*self.allocation.launch, *command, *self.program.arguments],
            stdin=subprocess.DEVNULL,
            env={**os.environ, TOKEN: self._token, LEASE: str(self.lease_s)},
            start_new_session=True,
        )

    def _join(self) -> None:
        """Wait for the agents: for all, or a while after enough are there. Raises UnavailableError."""
        began, enough = time.monotonic(), self.ranks // self.block
        complete: float | None = None
        while len(self._ready()) < self.allocation.nodes:
            now = time.monotonic()
            if len(self._ready()) >= enough:
                complete = complete or now
                if now - complete > LATE_S:
                    logger.warning("nodes: %d of %d are there", len(self._ready()), self.allocation.nodes)
                    return
            if now - began > JOIN_S or self._launcher.poll() is not None:
                raise UnavailableError(
                    f"Of {self.allocation.nodes} nodes {len(self._ready())} answered; {enough} are needed.",
                    hint=f"What was tried: {' '.join(self.allocation.launch)} … ; its errors stand above.",
                )
            self.wait(0.1)

    def _ready(self) -> list[_Agent]:
        return [agent for agent in self._agents if agent.told and not agent.gone]

    def _welcome(self) -> None:
        channel, _ = self._listener.accept()
        channel.settimeout(self.lease_s)
        channel.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._select.register(channel, selectors.EVENT_READ, _Agent(channel))

    def _hear(self, agent: _Agent) -> None:
        try:
            data = agent.channel.recv(1 << 16)
        except OSError as error:
            self._lose(agent, f"cannot be heard: {error}")
            return
        if not data or len(agent.unread) > MESSAGE:
            self._lose(agent, agent.dismissed or "ended its connection")
            return
        *lines, agent.unread = (agent.unread + data).split(b"\n")
        for line in lines:
            if agent.gone:
                return
            self._take(agent, line)

    def _take(self, agent: _Agent, line: bytes) -> None:
        try:
            told = json.loads(line)
        except ValueError:
            told = {}
        if not agent.node:
            shown = str(told.get("hello", "")) if isinstance(told, dict) else ""
            if not hmac.compare_digest(shown.encode(), self._token.encode()):
                self._lose(agent, "is a stranger")
                return
            agent.node, agent.address = told["node"], told["address"]
            self._agents.append(agent)
            return
        agent.heard, agent.told = time.monotonic(), told
        self._send(agent, ack=told["tick"])
        if told["attempt"] == self.attempt and self.attempt:
            self._note(agent)

    def _note(self, agent: _Agent) -> None:
        """Take over what a node says of its ranks."""
        number, told = self._agents.index(agent), agent.told
        ranks = [rank for rank, slot in enumerate(self._slots) if slot // self.block == number]
        for index, rank in enumerate(ranks):
            beat = told["beats"][index] if index < len(told["beats"]) else None
            self._beats[rank] = (decode(bytes.fromhex(beat)) if beat else None) or self._beats[rank]
            (self._frozen.add if index in told["frozen"] else self._frozen.discard)(rank)
        for index in [*told["order"], *range(len(ranks))]:
            rank, code = ranks[index], told["exits"][index]
            if code is not None and self.exits[rank] is None:
                self.exits[rank] = code
                self.order.append(rank)

    def _count_lost(self) -> None:
        """The ranks of lost nodes have ended: with their agent, or by it when its lease ran out."""
        gone = set(self.gone())
        for rank, slot in enumerate(self._slots):
            if slot in gone and self.exits[rank] is None:
                self.exits[rank] = LOST
                self.order.append(rank)

    def _lose(self, agent: _Agent, why: str) -> None:
        if agent.gone:
            return
        agent.gone = why
        with suppress(KeyError):
            self._select.unregister(agent.channel)
        agent.channel.close()
        if agent.node:
            self.events.write("node_lost", node=agent.node, cause=why, attempt=self.attempt)
            logger.warning("the node %s %s", agent.node, why)

    def _send(self, agent: _Agent, **order: Any) -> None:
        if agent.gone or agent.dismissed:
            return
        try:
            agent.channel.sendall(json.dumps(order).encode() + b"\n")
        except OSError as error:
            self._lose(agent, f"cannot be reached: {error}")
