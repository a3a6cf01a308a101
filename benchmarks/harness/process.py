"""An engine's process group: started, stopped and continued while others are measured, weighed, ended."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

END_SECONDS = 20.0


class EngineFailed(Exception):
    """An engine did not start or did not answer; the text has the end of its log."""


class Group:
    """A command and all its children. Its standard error goes to a log that a failure shows."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], *, talk: bool) -> None:
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `end`
        self.process = subprocess.Popen(
            list(command),
            env={**os.environ, **environment},
            stdin=subprocess.PIPE if talk else subprocess.DEVNULL,
            stdout=subprocess.PIPE if talk else self.log,
            stderr=self.log,
            start_new_session=True,
        )

    @property
    def input(self) -> IO[bytes]:
        """Where a worker reads."""
        assert self.process.stdin is not None
        return self.process.stdin

    @property
    def output(self) -> IO[bytes]:
        """Where a worker writes."""
        assert self.process.stdout is not None
        return self.process.stdout

    def pause(self) -> None:
        """Take the cores away from it: engines that wait may spin."""
        self._signal(signal.SIGSTOP)

    def proceed(self) -> None:
        """Let it run on."""
        self._signal(signal.SIGCONT)

    def resident(self) -> int:
        """Bytes of memory that its processes hold, shared pages counted once."""
        return sum(_proportional(pid) for pid in self._members())

    def failure(self, what: str) -> EngineFailed:
        """An error with the last lines of the log."""
        self.log.seek(0)
        lines = [line.strip() for line in self.log.read().decode(errors="replace").splitlines()]
        return EngineFailed(f"{what}: {' | '.join([line for line in lines if line][-3:])[-600:]}")

    def end(self) -> None:
        """End all its processes, gently first."""
        self.proceed()
        self._signal(signal.SIGTERM)
        give_up = time.monotonic() + END_SECONDS
        while self._members() and time.monotonic() < give_up:
            self.process.poll()
            time.sleep(0.05)
        self._signal(signal.SIGKILL)
        self.process.wait()
        for file in (self.process.stdin, self.process.stdout, self.log):
            if file is not None:
                with contextlib.suppress(BrokenPipeError):
                    file.close()

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def _members(self) -> list[int]:
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    fields = (entry / "stat").read_text().rpartition(")")[2].split()
                    if int(fields[2]) == self.process.pid and fields[0] != "Z":
                        found.append(int(entry.name))
        return found


def _proportional(pid: int) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) << 10
    return 0
