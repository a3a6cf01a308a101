"""Jobs as processes of this machine. Each attempt has a folder: `pid`, `log`, and `exit` when it has ended.

A small shell stands before the job's own process. It outlives the controller, writes down how the job ended,
and leads the process group. `pid` is linked into place, which happens once: by that shell or by a fence.
"""

from __future__ import annotations

import errno
import os
import platform
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lapis.errors import ConflictError, UnavailableError
from lapis.jobs.executor import Status
from lapis.jobs.executors.limits import (
    MemoryLimit,
    machine_gpus,
    machine_memory,
    make_group,
    parent_group,
    remove_group,
)
from lapis.jobs.job import Job, Node, Resources
from lapis.storage import storage_errors, write_text

SHELL = "/bin/sh"
FENCED = "fenced"
MARK = "LAPIS_JOB"  # every process of an attempt has it in its environment

# `trap :` lets the shell live through the signals that end the job; its children get them as usual.
# At the end it ends its whole group, so that nothing of the job outlives it.
# What holds the job to its memory is put on that shell too, so that no process of the job is without it.
WRAPPER = """
cd "$1" || exit 126
[ -z "$2" ] || echo "$$" > "$2/cgroup.procs" || exit 125
[ -z "$3" ] || ulimit -d "$3" || exit 125
shift 3
echo "$$ $(cut -d' ' -f22 /proc/$$/stat)" > "pid.$$" && ln "pid.$$" pid || exit 125
rm -f "pid.$$"
trap : TERM INT HUP
( cd "$1" || exit 126; shift; exec "$@" )
echo "$?" > exit.part && mv exit.part exit
kill -s KILL 0
"""


class LocalExecutor:
    """Runs each job in a process group of its own, with its output in a file. Needs Linux (/proc)."""

    def __init__(self, folder: Path, capacity: Resources | None = None, groups: Path | None = None) -> None:
        """`capacity`: what jobs may have of this machine, by default all. `groups`: where to make control groups."""
        self.folder = folder
        self.name = f"local@{platform.node()}"
        self.groups = groups or parent_group()
        gpus = machine_gpus()
        cpus = float(len(os.sched_getaffinity(0)))
        resources = capacity or Resources(cpus, len(gpus), machine_memory())
        self.gpus = gpus if len(gpus) >= resources.gpus else tuple(map(str, range(resources.gpus)))
        self.nodes: tuple[Node, ...] | None = (Node(platform.node(), resources),)

    def attempt(self, job: Job) -> Path:
        """The folder of the job's current attempt."""
        return self.folder / job.id / str(job.attempt)

    def log(self, job: Job) -> Path:
        """The file with all output of the job's current attempt."""
        return self.attempt(job) / "log"

    def start(self, job: Job) -> None:
        """Start the attempt. Raises as `Executor.start`."""
        folder = self.attempt(job)
        with _refusals(job), storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            child = _spawn(job, folder, self._environment(job), self._limit(job))
        while not (folder / "pid").exists():
            if os.waitpid(child, os.WNOHANG) != (0, 0):
                if (folder / "pid").exists():
                    break  # a short job: it began and ended between the two looks
                raise UnavailableError(f"The job {job.id} could not be started; see {folder / 'log'}.")
            time.sleep(0.002)
        if _read(folder / "pid").split()[:1] != [str(child)]:
            with suppress(ChildProcessError):  # reaped above
                os.waitpid(child, 0)  # it ends by itself: it saw that the place is taken
            raise ConflictError(
                f"Attempt {job.attempt} of {job.id} was started or fenced by another controller."
            )

    def fence(self, job: Job) -> bool:
        """Take the place of the attempt's process, so that it never starts; False if it has."""
        folder = self.attempt(job)
        mine = folder / f"pid.fence-{os.getpid()}"
        write_text(mine, FENCED)
        with suppress(FileExistsError):
            os.link(mine, folder / "pid")
        mine.unlink()
        return _read(folder / "pid") == FENCED

    def poll(self, job: Job) -> Status:
        """What became of the attempt, by its process and its files."""
        folder = self.attempt(job)
        if _read(folder / "pid") == FENCED:
            return Status("fenced")
        if _leader(folder) is not None:
            return Status("running")
        code = _read(folder / "exit")  # written before the shell ends, so it is looked at after that
        # The job works in this folder: it may have written something else there.
        return Status("exited", int(code)) if code.isdecimal() else Status("lost")

    def terminate(self, job: Job) -> None:
        """SIGTERM to the attempt's process group."""
        self._signal(job, signal.SIGTERM)

    def kill(self, job: Job) -> None:
        """SIGKILL to the attempt's process group, also where its shell has died before the others."""
        self._signal(job, signal.SIGKILL)
        for process in _members(self.attempt(job), f"{MARK}={_mark(job)}"):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        if self.groups is not None:
            remove_group(self.groups / _group(job))

    def _environment(self, job: Job) -> dict[str, str]:
        """A job sees its own GPUs only, is told how many threads its CPUs are good for, and finds `lapis`."""
        threads = {"OMP_NUM_THREADS": str(max(1, int(job.spec.resources.cpus)))}
        gpus = ",".join(self.gpus[number] for place in job.places for number in place.gpus)
        mine = {**os.environ, "PATH": search_path(), **threads, **job.spec.env}
        return {**mine, "CUDA_VISIBLE_DEVICES": gpus, MARK: _mark(job)}

    def _limit(self, job: Job) -> MemoryLimit:
        memory = job.spec.total.memory
        if not memory:
            return MemoryLimit()
        group = make_group(self.groups, _group(job), memory) if self.groups is not None else None
        return MemoryLimit(group) if group else MemoryLimit(None, memory // 1024)

    def _signal(self, job: Job, number: int) -> None:
        leader = _leader(self.attempt(job))
        if leader is not None:
            with suppress(ProcessLookupError):
                os.killpg(leader, number)


def search_path() -> str:
    """The PATH of a job: the server's, behind the folder of its Python, where `lapis` is."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def _spawn(job: Job, folder: Path, environment: dict[str, str], limit: MemoryLimit) -> int:
    limits = [str(limit.group or ""), str(limit.kilobytes or "")]
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        return os.posix_spawn(
            SHELL,
            [SHELL, "-c", WRAPPER, SHELL, str(folder), *limits, job.spec.folder or ".", *job.spec.argv],
            environment,
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_DUP2, log, 1),
                (os.POSIX_SPAWN_DUP2, log, 2),
            ],
            setsid=True,
            setsigmask=[],
            setsigdef=[signal.SIGPIPE, signal.SIGTERM, signal.SIGINT, signal.SIGHUP],
        )
    finally:
        os.close(log)


@contextmanager
def _refusals(job: Job) -> Iterator[None]:
    """Say why the system starts no process: for good, or for the moment (no process, file or memory is free)."""
    try:
        yield
    except OSError as error:
        text = f"The job {job.id} could not be started: {error.strerror}."
        if error.errno == errno.E2BIG:
            raise UnavailableError(
                f"{text} Its command and variables are longer than they may be."
            ) from error
        raise UnavailableError(text, retry_after=1.0) from error


def _mark(job: Job) -> str:
    return f"{job.id}/{job.attempt}"


def _group(job: Job) -> str:
    return f"lapis-{job.id}-{job.attempt}"


def _leader(folder: Path) -> int | None:
    """The pid of the attempt's shell if it lives: the same number with the same start time, and no zombie."""
    words = _read(folder / "pid").split()
    if len(words) != 2 or not words[0].isdecimal():
        return None  # nobody started it, or it was fenced
    pid = int(words[0])
    with suppress(ChildProcessError):  # the child of an earlier controller is not ours to reap
        os.waitpid(pid, os.WNOHANG)
    facts = _stat(pid)
    return pid if facts and facts[0] != "Z" and facts[19] == words[1] else None


def _members(folder: Path, mark: str) -> list[int]:
    """Living processes of the attempt's group. The mark tells them from a later group of the same number."""
    words = _read(folder / "pid").split()
    if len(words) != 2:
        return []
    found = []
    for process in (int(entry) for entry in os.listdir("/proc") if entry.isdecimal()):
        facts = _stat(process)
        if facts and facts[2] == words[0] and mark in _read(Path(f"/proc/{process}/environ")).split("\0"):
            found.append(process)
    return found


def _stat(pid: int) -> list[str]:
    """/proc/PID/stat from the state on (0: state, 2: process group, 19: start time); empty if gone."""
    return _read(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()


def _read(path: Path) -> str:
    """A small file's text; empty if it is not there, or is that of a process that has gone or is not ours."""
    try:
        return path.read_text(errors="replace").strip("\n")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return ""
