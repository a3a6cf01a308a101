"""The nursery: a process that has imported the training program (and torch) and bears ranks by fork. No torch here.

A rank that comes from it is at work in milliseconds, where a new interpreter needs seconds, and all share the
pages of what was imported. It forks while it has one thread: nothing that is imported may start one.

    stdin    one JSON object a line: {"start": [{"rank", "environment", "output", "speaks"}, …]} or {"signal": number}
    stdout   the same: {"ready": threads}, {"started": rank, "pid": pid}, {"ended": rank, "status": code or -signal}

Nobody is left behind: when the supervisor dies, the kernel kills the nursery, and with it the ranks; when a rank
ends, the rest of its process group is killed.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import select
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import ModuleType
from typing import Any, NoReturn

from lapis.errors import LapisError

PR_SET_PDEATHSIG = 1
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main(arguments: Sequence[str]) -> None:
    """Import the program `arguments[0]`, then bear ranks that call its `main(arguments[2:])`, until stdin ends.

    `arguments[1]` is the process that waits for this one: when that is gone, this one ends too.
    """
    module, parent, *rest = arguments
    die_with(int(parent))
    for number in STOPS:  # whoever stops a whole job means the ranks, which the supervisor tells
        signal.signal(number, signal.SIG_IGN)
    channel = os.dup(1)
    os.set_inheritable(channel, False)
    os.dup2(2, 1)  # what the program prints while it is imported does not belong into the channel
    program = importlib.import_module(module)
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    _Nursery(program, rest, channel, woken).loop()
    os._exit(0)  # what was imported has nothing to clean up


def die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent dies, and end now if that has happened already (Linux)."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


class _Nursery:
    def __init__(self, program: ModuleType, arguments: Sequence[str], channel: int, woken: int) -> None:
        self.run: Callable[[Sequence[str]], None] = program.main
        self.arguments, self.channel, self.woken = arguments, channel, woken
        self.ranks: dict[int, int] = {}  # by process

    def loop(self) -> None:
        self._tell(ready=len(os.listdir("/proc/self/task")))
        rest = b""
        while True:
            readable, _, _ = select.select([0, self.woken], [], [])
            if self.woken in readable:
                os.read(self.woken, 4096)
                self._reap()
            if 0 in readable:
                data = os.read(0, 1 << 16)
                if not data:
                    self._signal(signal.SIGKILL)
                    return
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    self._obey(json.loads(line))

    def _obey(self, order: dict[str, Any]) -> None:
        parent = os.getpid()
        for member in order.get("start", ()):
            pid = os.fork()
            if pid == 0:
                self._become(member, parent)
            self.ranks[pid] = member["rank"]
            self._tell(started=member["rank"], pid=pid)
        if "signal" in order:
            self._signal(order["signal"])

    def _signal(self, number: int) -> None:
        for pid in self.ranks:  # none of them is reaped: the numbers are theirs
            if number == signal.SIGKILL:
                _kill_group(pid)
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def _reap(self) -> None:
        while self.ranks:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is None:
                return
            _kill_group(ended.si_pid)  # before its number is given back
            _, status = os.waitpid(ended.si_pid, 0)
            rank = self.ranks.pop(ended.si_pid)
            self._tell(ended=rank, status=os.waitstatus_to_exitcode(status))

    def _tell(self, **facts: int) -> None:
        os.write(self.channel, (json.dumps(facts) + "\n").encode())

    def _become(self, member: dict[str, Any], parent: int) -> NoReturn:
        """Be that rank and nothing else, to the end of the process."""
        status = 1
        try:
            die_with(parent)
            os.setpgid(0, 0)
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGCHLD, *STOPS):
                signal.signal(number, signal.SIG_DFL)
            os.close(self.woken)
            os.close(self.channel)
            _redirect(member["output"], member["speaks"])
            os.environ.update(member["environment"])
            status = self._run()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)  # threads that wait for lost ranks do not hold it

    def _run(self) -> int:
        try:
            self.run(self.arguments)
        except LapisError as error:
            print(f"error: {error}", file=sys.__stderr__)
            return error.exit_status
        except KeyboardInterrupt:
            return 130
        except SystemExit as error:
            return error.code if isinstance(error.code, int) else int(error.code is not None)
        except BaseException:
            sys.stderr = sys.__stderr__  # many ranks fail when one is lost: the terminal hears of that one
            sys.excepthook(*sys.exc_info())
            raise
        return 0


def _redirect(output: str, speaks: bool) -> None:
    """Nothing to read; what it prints goes to the end of that file, but of the rank that speaks what it tells the
    user while it runs (`sys.stderr`) goes to where the supervisor's errors go."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if speaks:
        sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace")
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)


def _kill_group(pid: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1:])
