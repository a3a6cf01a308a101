"""The supervisor's hand on one node: bears that node's ranks, tells how they are, and ends them when it is cut off.

    python -m lapis.train.agent ADDRESS PORT FOLDER RANKS MODULE ARGUMENT…     with its token in LAPIS_AGENT_TOKEN

One line of JSON a message. The agent says {"hello": token, "node", "address"} once, then four times a second all that
it knows: {"tick", "attempt", "port", "exits", "order", "frozen", "beats"}. The supervisor answers each {"ack": tick},
and sends {"start": environments, "attempt"}, {"signal": number} or {"renew": true}.

An answered tick is the agent's lease, from when it was sent. When the lease has run out, or the connection ends, it
kills its ranks: the supervisor counts from when that tick arrived, which is later, and starts nothing sooner.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lapis.train.heartbeat import encode
from lapis.train.launch import Group, Program, free_port

TOKEN = "LAPIS_AGENT_TOKEN"
LEASE = "LAPIS_AGENT_LEASE"  # seconds
TICK_S = 0.25
LOOK_S = 0.05
CONNECT_S = 30.0


def main(arguments: Sequence[str]) -> None:
    """Serve one supervisor to its end."""
    address, port, folder, ranks, module, *rest = arguments
    token = os.environ.pop(TOKEN)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the supervisor is told too, and lets the ranks save
    with socket.create_connection((address, int(port)), CONNECT_S) as channel:
        own = channel.getsockname()[0]
        if own.startswith("127."):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        with tempfile.TemporaryDirectory(prefix="lapis-agent-") as beats:
            program = Program(module, tuple(rest))
            with Group(program, int(ranks), Path(folder), beats=Path(beats), near=False) as group:
                _Agent(channel, group, own, float(os.environ[LEASE])).serve(token)


class _Agent:
    def __init__(self, channel: socket.socket, group: Group, address: str, lease_s: float) -> None:
        self.channel, self.group, self.address, self.lease_s = channel, group, address, lease_s
        self.sent: dict[int, float] = {}  # ticks that were not answered yet, and when they left
        self.lease = time.monotonic()  # when the last answered one left
        self.attempt = self.ticks = 0
        self.port = free_port()
        self.unread = b""

    def serve(self, token: str) -> None:
        """Go on until the supervisor is gone, or not heard for longer than the lease."""
        node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        channel, next_tick = self.channel, 0.0
        channel.settimeout(self.lease_s)
        try:
            self._tell(hello=token, node=node, address=self.address)
            while time.monotonic() - self.lease < self.lease_s:
                before = (list(self.group.exits), self.attempt)
                self.group.wait(LOOK_S)
                if time.monotonic() >= next_tick or before != (self.group.exits, self.attempt):
                    self._tick()
                    next_tick = time.monotonic() + TICK_S
                if not self._listen():
                    return
            print(
                f"The agent on {node} hears nothing of its supervisor: its ranks are ended.", file=sys.stderr
            )
        except OSError as error:
            print(f"The agent on {node} lost its supervisor: {error}", file=sys.stderr)

    def _tick(self) -> None:
        group = self.group
        self.ticks += 1
        self.sent[self.ticks] = time.monotonic()
        beats = [encode(beat).hex() if beat else None for beat in group.beats()]
        facts = {"exits": group.exits, "order": group.order, "frozen": group.frozen(), "beats": beats}
        self._tell(tick=self.ticks, attempt=self.attempt, port=self.port, **facts)

    def _listen(self) -> bool:
        """Do what the supervisor sent meanwhile; False when it has closed the connection."""
        while select.select([self.channel], [], [], 0)[0]:
            data = self.channel.recv(1 << 16)
            if not data:
                return False
            *lines, self.unread = (self.unread + data).split(b"\n")
            for line in lines:
                self._obey(json.loads(line))
        return True

    def _obey(self, order: dict[str, Any]) -> None:
        if "ack" in order:
            self.lease = max(self.lease, self.sent.get(order["ack"], self.lease))
            self.sent = {tick: at for tick, at in self.sent.items() if tick > order["ack"]}
        elif "start" in order:
            self.attempt = order["attempt"]
            self.group.bear(order["start"])
            self.port = free_port()
        elif "signal" in order:
            self.group.signal(order["signal"])
        elif "renew" in order:
            self.group.renew()

    def _tell(self, **facts: Any) -> None:
        self.channel.sendall(json.dumps(facts).encode() + b"\n")


if __name__ == "__main__":
    main(sys.argv[1:])
