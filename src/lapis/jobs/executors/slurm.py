"""Jobs as Slurm jobs. Slurm orders and places them; each attempt has a folder, as on one machine, that all nodes see.

An attempt starts at most once: the batch script links `pid` into place, or finds it taken and ends. So it does not
matter whether a controller died before, while or after it submitted, or that two of them did.
Slurm never requeues our jobs: the queue does, with a new attempt. What a node that Slurm gave up still runs is ended
by a guard in the script once the file `fenced` is there, and the next attempt waits for that.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from lapis.errors import ConflictError, NotFoundError, UnavailableError
from lapis.jobs.cluster import SlurmSection
from lapis.jobs.executor import Status
from lapis.jobs.executors.local import MARK, search_path
from lapis.jobs.job import Job, Node
from lapis.jobs.slurm import (
    FENCED,
    QUEUE_FORMAT,
    Row,
    Usage,
    accounted_rows,
    best_row,
    name_of,
    queue_rows,
    refuses_for_the_moment,
    settings,
    status,
    submission,
    usages,
)
from lapis.storage import storage_errors, write_text

COMMANDS = ("sbatch", "squeue", "scancel")
ANSWER_S = 30.0  # for a command of Slurm
FRESH_S = 1.0  # what squeue said holds for so long: one question a tick, however many jobs there are
# Of the server's environment nothing else reaches a job: it has secrets.
PASSED = (
    "PATH",
    "HOME",
    "USER",
    "LOGNAME",
    "LANG",
    "LC_ALL",
    "TZ",
    "PYTHONPATH",
    "VIRTUAL_ENV",
    "LD_LIBRARY_PATH",
)
OWN = ("LAPIS_HOME", "LAPIS_DATABASE_URL")
UNSURE = ("timed out", "unable to contact", "connect failure", "zero bytes", "communication")

SCRIPT = r"""#!/bin/sh
# An attempt of a job of Lapis: $1 is its folder.
cd "$1" || exit 126
echo "slurm $SLURM_JOB_ID $SLURMD_NODENAME" > "pid.$SLURM_JOB_ID" && ln "pid.$SLURM_JOB_ID" pid 2>/dev/null
taken=$?
rm -f "pid.$SLURM_JOB_ID"
[ "$taken" = 0 ] || { echo "This attempt was started or fenced elsewhere." >&2; exit 125; }
# What a lost node still runs of an earlier attempt ends when its guard sees that it is fenced: a few seconds.
for earlier in ../*/fenced; do
    for second in 1 2 3 4 5 6 7 8 9 10; do
        if [ ! -e "$earlier" ] || [ -e "${earlier%fenced}gone" ] || [ -e "${earlier%fenced}exit" ]; then break; fi
        sleep 1
    done
done
. ./settings
end_all() {
    for process in /proc/[0-9]*; do
        if tr '\0' '\n' < "$process/environ" 2>/dev/null | grep -qxF "LAPIS_JOB=$LAPIS_JOB"; then
            kill -s KILL "${process#/proc/}" 2>/dev/null
        fi
    done
}
( while sleep 1; do [ ! -e fenced ] || { end_all; : > gone; kill -s KILL "$$"; exit; }; done ) > /dev/null 2>&1 &
guard=$!
( cd "$1" || exit 126; shift; exec "$@" ) &
child=$!
trap 'kill -s TERM "$child" 2>/dev/null' TERM INT HUP
wait "$child"
status=$?
while kill -s 0 "$child" 2>/dev/null; do wait "$child"; status=$?; done  # a signal interrupts a wait
kill "$guard" 2>/dev/null
echo "$status" > exit.part && mv exit.part exit
exit "$status"
"""


class SlurmExecutor:
    """Hands every job to Slurm at once, and follows it there. Raises UnavailableError without Slurm's commands."""

    name = "slurm"
    nodes: tuple[Node, ...] | None = None

    def __init__(self, folder: Path, section: SlurmSection) -> None:
        absent = [command for command in COMMANDS if shutil.which(command) is None]
        if absent:
            raise UnavailableError(
                f"Slurm's commands are not here: {', '.join(absent)}.", hint="apt install slurm-client"
            )
        self.folder, self.section = folder, section
        self._rows: dict[str, list[Row]] = {}
        self._asked_at = float("-inf")

    def attempt(self, job: Job) -> Path:
        """The folder of the job's current attempt."""
        return self.folder / job.id / str(job.attempt)

    def log(self, job: Job) -> Path:
        """The file with all output of the job's current attempt."""
        return self.attempt(job) / "log"

    def start(self, job: Job) -> None:
        """Submit the attempt.

        Raises UnavailableError if Slurm refuses it (with `retry_after`: for the moment), ConflictError if it was
        fenced, or if Slurm did not answer: whether the attempt is there is then seen by whoever takes the job over.
        """
        folder = self.attempt(job)
        if _read(folder / "pid"):
            raise ConflictError(
                f"Attempt {job.attempt} of {job.id} was started or fenced by another controller."
            )
        environment = {name: os.environ[name] for name in (*PASSED, *OWN) if name in os.environ}
        environment["PATH"] = search_path()
        threads = {"OMP_NUM_THREADS": str(max(1, int(job.spec.resources.cpus)))}
        told = {**environment, **threads, **job.spec.env, MARK: f"{job.id}/{job.attempt}"}
        with storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "settings").touch(mode=0o600)
            (folder / "settings").write_text(settings(job, told))
            write_text(folder / "script", SCRIPT)
        self._asked_at = float("-inf")  # what squeue said is out of date
        try:
            _call("sbatch", *submission(job, self.section, folder), str(folder / "script"), str(folder))
        except UnavailableError as error:
            if any(word in error.message.lower() for word in UNSURE):
                raise ConflictError(
                    f"Whether {job.id} was submitted is not known: {error.message}"
                ) from error
            if refuses_for_the_moment(error.message):
                raise UnavailableError(error.message, retry_after=1.0) from error
            raise

    def fence(self, job: Job) -> bool:
        """Make sure that the attempt never starts, unless Slurm has it: then False."""
        row = best_row(self._named(job), _read(self.attempt(job) / "pid"))
        if row is not None and row.active:
            return False
        return self._take_place(job) == FENCED

    def poll(self, job: Job) -> Status:
        """What became of the attempt. Raises UnavailableError if Slurm does not answer."""
        folder = self.attempt(job)
        rows = self._named(job)
        place, code = _read(folder / "pid"), _read(folder / "exit")
        row = best_row(rows, place)
        if row is None and not code and place != FENCED:  # squeue forgets what has ended for some minutes
            row = best_row(self._accounted(job), place)
        return status(place, code, row)

    def terminate(self, job: Job) -> None:
        """SIGTERM to the job's script, which passes it on; what still waits is taken out of Slurm's queue."""
        for row in self._named(job):
            if row.active:
                running = () if status("", "", row).kind == "waiting" else ("--batch", "--signal=TERM")
                _cancel(row, *running)

    def kill(self, job: Job) -> None:
        """End the attempt for good: in Slurm, and by its guard where a lost node runs on."""
        folder = self.attempt(job)
        place = self._take_place(job)
        if place != FENCED and not _read(folder / "exit"):
            write_text(folder / FENCED, "")
        for row in self._named(job):
            if row.active and not (row.state == "COMPLETING" or _read(folder / "exit")):
                _cancel(row)

    def usage(self, since: float) -> list[Usage]:
        """What all attempts since then had of the cluster, as sacct tells it. Raises UnavailableError."""
        columns = "JobName,Account,State,ElapsedRaw,AllocTRES"
        return usages(_call("sacct", "-X", "-n", "-P", "-S", _moment(since), "-o", columns))

    def _take_place(self, job: Job) -> str:
        """Take the place of an attempt's script, so that it never starts; what is in the place now."""
        folder = self.attempt(job)
        mine = folder / f"pid.fence-{os.getpid()}"
        write_text(mine, FENCED)
        with suppress(FileExistsError):
            os.link(mine, folder / "pid")
        mine.unlink()
        return _read(folder / "pid")

    def _named(self, job: Job) -> list[Row]:
        if time.monotonic() - self._asked_at > FRESH_S:
            text = _call("squeue", "--me", "-h", "-t", "all", "-o", QUEUE_FORMAT)
            self._rows = {}
            for row in queue_rows(text):
                self._rows.setdefault(row.name, []).append(row)
            self._asked_at = time.monotonic()
        return self._rows.get(name_of(job), [])

    def _accounted(self, job: Job) -> list[Row]:
        columns = "JobIDRaw,JobName,State,Start,End"
        try:
            text = _call(
                "sacct",
                "-X",
                "-n",
                "-P",
                "--name",
                name_of(job),
                "-S",
                _moment(job.created_at),
                "-o",
                columns,
            )
        except (UnavailableError, NotFoundError):  # a cluster may keep no accounts
            return []
        return accounted_rows(text)


def _cancel(row: Row, *options: str) -> None:
    with suppress(UnavailableError):  # it has just ended; else it is tried again
        _call("scancel", *options, str(row.id))


def _call(*command: str) -> str:
    """What a command of Slurm says. Raises UnavailableError with its words."""
    kept = {
        name: value for name, value in os.environ.items() if name in PASSED or name.startswith("SLURM_CONF")
    }
    try:
        done = subprocess.run(
            command, env=kept, capture_output=True, text=True, timeout=ANSWER_S, check=False
        )
    except (subprocess.TimeoutExpired, FileNotFoundError) as error:
        raise UnavailableError(f"{command[0]} timed out or is not here: {error}") from error
    if done.returncode:
        raise UnavailableError(f"{command[0]}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%dT%H:%M:%S")


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except FileNotFoundError:
        return ""
