"""Heartbeats: a rank tells its supervisor how far it is, in a small file that it overwrites in place. No torch.

No clock is in it: the supervisor notes when it saw something new. A full disk does not silence a rank, because
the file has its size from the start.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import IntEnum
from pathlib import Path

VARIABLE = "LAPIS_HEARTBEAT"  # names the file; without it nobody listens
FACTS = struct.Struct("<QqdIQ")  # count, step, seconds of own work, phase, place
CHECK = struct.Struct("<I")  # CRC-32 of the facts: a torn read is seen
SIZE = FACTS.size + CHECK.size


class Phase(IntEnum):
    """What a rank does."""

    BUSY = 0  # long work outside of steps: it starts, compiles, loads, saves
    WORKING = 1  # on its own part of a step
    WAITING = 2  # for the other ranks, or it works in step with them


@dataclass(frozen=True)
class Beat:
    """One sign of life."""

    count: int  # grows with every beat
    step: int  # steps done
    own_s: float  # seconds of own work since the process began, over all steps done
    phase: Phase
    place: int = (
        0  # signs since the last step was done: of ranks that do the same, the one with fewest is behind
    )


class Heartbeat:
    """The rank's side. Every call is one small write; without a supervisor it does nothing."""

    def __init__(self, path: Path | None) -> None:
        self._file = None if path is None else os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        self._beat = Beat(0, -1, 0.0, Phase.BUSY)
        self._own_s = 0.0  # also of the step in progress
        self._busy = True  # until the first step is done: it loads, and compiles

    @staticmethod
    def of_environment() -> Heartbeat:
        """The heartbeat that the supervisor asked for in this process's environment."""
        path = os.environ.get(VARIABLE)
        return Heartbeat(Path(path) if path else None)

    def stepped(self, step: int) -> None:
        """So many steps are done; the next one begins."""
        self._busy = False
        self._beat = replace(self._beat, step=step, own_s=self._own_s, place=-1)
        self._sign(Phase.WORKING)

    def works(self) -> None:
        """It begins something that it does by itself."""
        self._sign(Phase.WORKING)

    def waits(self, own_s: float = 0.0) -> None:
        """It did something by itself, which took so many seconds; now it meets the others."""
        if not self._busy:
            self._own_s += own_s
        self._sign(Phase.WAITING)

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Long work that is no step: a checkpoint, an evaluation, a compilation."""
        before, self._busy = self._busy, True
        self._sign(Phase.BUSY)
        yield
        self._busy = before
        self._sign(Phase.WORKING)

    def _sign(self, phase: Phase) -> None:
        beat, phase = self._beat, Phase.BUSY if self._busy else phase
        self._beat = replace(beat, count=beat.count + 1, place=beat.place + 1, phase=phase)
        if self._file is not None:
            os.pwrite(self._file, encode(self._beat), 0)


def encode(beat: Beat) -> bytes:
    """A beat as the bytes of the file."""
    facts = FACTS.pack(beat.count, beat.step, beat.own_s, beat.phase, beat.place)
    return facts + CHECK.pack(zlib.crc32(facts))


def decode(data: bytes) -> Beat | None:
    """The beat in a file's bytes; None if there is none yet, or it was read while it was written."""
    if len(data) != SIZE or CHECK.unpack(data[FACTS.size :])[0] != zlib.crc32(data[: FACTS.size]):
        return None
    count, step, own_s, phase, place = FACTS.unpack(data[: FACTS.size])
    return Beat(count, step, own_s, Phase(phase), place)
