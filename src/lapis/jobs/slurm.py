"""What Slurm is told of a job, and what it says of one. Only texts: `executors/slurm.py` calls the commands."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from lapis.jobs.cluster import SlurmSection
from lapis.jobs.executor import Status
from lapis.jobs.job import Job

FENCED = "fenced"
QUEUE_FORMAT = "%A|%j|%T|%r|%S|%e|%N"
WAITING = frozenset({"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT"})
RUNNING = frozenset({"RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "RESIZING", "STAGE_OUT"})
LOST = frozenset({"NODE_FAIL", "BOOT_FAIL", "REVOKED"})
MOMENTARY = (
    "submitjob",  # of AssocMaxSubmitJobLimit, QOSMaxSubmitJobPerUserLimit, …
    "temporarily unable",
    "temporarily unavailable",
    "try again",
    "in standby mode",
)
WARNING_S = 60  # before Slurm's time limit: SIGTERM
SLACK_S = 120  # Slurm's limit lies behind ours, which ends a job with its reason


@dataclass(frozen=True)
class Row:
    """One job as squeue or sacct tells it. Times are seconds since 1970, None where they are not known."""

    id: int
    name: str
    state: str
    reason: str = ""
    start: float | None = None
    end: float | None = None
    nodes: str = ""  # as Slurm writes them: n[1-3,7]

    @property
    def active(self) -> bool:
        """Whether Slurm still has something to do with it."""
        return self.state in WAITING or self.state in RUNNING


@dataclass(frozen=True)
class Usage:
    """What one attempt had of the cluster, as Slurm accounts it."""

    job_id: str
    attempt: int
    account: str
    state: str
    seconds: int
    cpu_seconds: int
    gpu_seconds: int
    nodes: int


def name_of(job: Job) -> str:
    """The name that an attempt has in Slurm: by it a new controller finds what an old one submitted."""
    return f"lapis-{job.id}.{job.attempt}"


def submission(job: Job, section: SlurmSection, folder: Path) -> list[str]:
    """The options of sbatch for an attempt whose files lie in `folder`."""
    spec, each = job.spec, job.spec.resources
    cpus = max(1, math.ceil(each.cpus))
    options = {
        "job-name": name_of(job),
        "comment": spec.name[:200],
        "chdir": folder,
        "output": _escaped(folder / "log"),
        "open-mode": "append",
        "partition": section.partition,
        "account": section.account_of(job.project_id),
        "qos": section.qos.get(spec.priority),
        "ntasks": spec.ranks,
        "cpus-per-task": cpus,
        "signal": f"B:TERM@{WARNING_S}",
    }
    alone = spec.spread or spec.ranks == 1  # one rank a node: what it asks for is what it asks of the node
    if alone:
        options |= {"nodes": spec.ranks, "ntasks-per-node": 1}
    if each.gpus:
        options |= {"gres": f"gpu:{each.gpus}"} if alone else {"gpus-per-task": each.gpus}
    if each.memory:
        mebibytes = math.ceil(each.memory / 2**20)
        options |= {"mem": mebibytes} if alone else {"mem-per-cpu": math.ceil(mebibytes / cpus)}
    if spec.time_limit is not None:
        options["time"] = math.ceil((spec.time_limit + SLACK_S + WARNING_S) / 60)
    told = [f"--{name}={value}" for name, value in options.items() if value is not None]
    lone = ["--parsable", "--no-requeue", *(["--no-kill"] if spec.spread else [])]
    return [*lone, *told, *section.options]


def settings(job: Job, environment: Mapping[str, str]) -> str:
    """The shell text that gives a script the job's environment and, as its arguments, its folder and its argv."""
    lines = [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    return "\n".join([*lines, f"set -- {shlex.join([job.spec.folder or '.', *job.spec.argv])}"]) + "\n"


def refuses_for_the_moment(text: str) -> bool:
    """Whether sbatch takes no job now, as it says, but may take this one later."""
    text = text.lower()
    if any(words in text for words in MOMENTARY):
        return True
    # One text for several limits: it is that on how many jobs there are, unless another one is named.
    return "job submit limit" in text and not re.search(r"\b(assoc|qos)\w*limit\b", text)


def queue_rows(text: str) -> list[Row]:
    """The answer of squeue in QUEUE_FORMAT."""
    rows = []
    for line in text.splitlines():
        number, name, state, reason, start, end, nodes = line.split("|")
        rows.append(Row(int(number), name, state, reason, _time(start), _time(end), nodes))
    return rows


def accounted_rows(text: str) -> list[Row]:
    """The answer of `sacct -X -n -P -o JobIDRaw,JobName,State,Start,End`."""
    rows = []
    for line in text.splitlines():
        number, name, state, start, end = line.split("|")
        rows.append(Row(int(number), name, state.split(" ")[0], "", _time(start), _time(end)))
    return rows


def usages(text: str) -> list[Usage]:
    """The answer of `sacct -X -n -P -o JobName,Account,State,ElapsedRaw,AllocTRES` without jobs of others."""
    found = []
    for line in text.splitlines():
        name, account, state, elapsed, given = line.split("|")
        job_id, dot, attempt = name.removeprefix("lapis-").rpartition(".")
        if not (name.startswith("lapis-job_") and dot and attempt.isdecimal()):
            continue
        amounts = dict(item.partition("=")[::2] for item in given.split(",") if item)
        seconds = int(elapsed or 0)
        cpus, gpus, nodes = (int(amounts.get(key, 0)) for key in ("cpu", "gres/gpu", "node"))
        found.append(
            Usage(
                job_id,
                int(attempt),
                account,
                state.split(" ")[0],
                seconds,
                cpus * seconds,
                gpus * seconds,
                nodes,
            )
        )
    return found


def status(place: str, code: str, row: Row | None) -> Status:
    """What became of an attempt, by its files `pid` and `exit` (empty if they are not there) and by Slurm's row."""
    if place == FENCED:
        return Status("fenced")
    code = (
        code if code.isdecimal() else ""
    )  # the job works beside it: it may have written something else there
    seconds = row.end - row.start if row and row.start and row.end and row.end > row.start else None
    if row is not None and row.state in WAITING:
        return Status("waiting", reason=_waits(row))
    if row is not None and row.state == "RUNNING" and not code and not _has_script(place, row):
        return Status("lost", reason="the node of its script failed", seconds=seconds)
    if row is not None and row.state in RUNNING and code != "0":
        return Status("running")  # also if it has ended with an error: Slurm will say whether it stopped it
    if row is not None and row.state == "PREEMPTED" and code != "0":
        return Status("preempted", reason="Slurm stopped it for another job", seconds=seconds)
    if code:
        return Status("exited", int(code), seconds=seconds)
    if row is None or row.state in LOST:
        return Status("lost", reason="its node failed" if row else "", seconds=seconds)
    reason = {
        "TIMEOUT": "it ran into Slurm's time limit",
        "OUT_OF_MEMORY": "it took more memory than it asked for",
        "CANCELLED": "it was cancelled in Slurm",
        "DEADLINE": "Slurm could not finish it before its deadline",
    }.get(row.state)
    if reason is None:  # it ended, and could not write how
        return Status("lost", reason=f"Slurm says {row.state}", seconds=seconds)
    return Status("exited", None, reason, seconds)


def best_row(rows: Iterable[Row], place: str) -> Row | None:
    """Of the rows with an attempt's name, which more than one submission can have, the one that took its place."""
    words = place.split()
    mine = [row for row in rows if len(words) > 1 and str(row.id) == words[1]]
    found = mine or sorted(rows, key=lambda row: (row.active, row.id))
    return found[-1] if found else None


def account_commands(section: SlurmSection, weights: Mapping[str, float], user: str) -> list[Sequence[str]]:
    """The sacctmgr commands that give every project's account its share; each may be run again.

    Shares are Slurm's whole numbers, a hundred for a weight of one.
    """
    commands: list[Sequence[str]] = []
    totals: dict[str, float] = {}
    for project_id, weight in weights.items():
        account = section.account_of(project_id)
        if account is not None:
            totals[account] = totals.get(account, 0.0) + weight
    for account, weight in sorted(totals.items()):
        share = f"fairshare={max(1, round(100 * weight))}"
        commands.append(("sacctmgr", "-i", "add", "account", f"name={account}", share))
        commands.append(("sacctmgr", "-i", "modify", "account", "where", f"name={account}", "set", share))
        commands.append(("sacctmgr", "-i", "add", "user", f"name={user}", f"account={account}"))
    return commands


def node_names(text: str) -> set[str] | None:
    """The nodes in a list as Slurm writes it; None where it has a form that is not read here."""
    names: set[str] = set()
    for item in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text):
        match = re.fullmatch(r"([^\[\]]*)(?:\[([^\]]*)\])?", item)
        if match is None:
            return None
        if match[2] is None:
            names.add(item)
            continue
        for numbers in match[2].split(","):
            first, _, last = numbers.partition("-")
            every = range(int(first), int(last or first) + 1)
            names.update(f"{match[1]}{number:0{len(first)}d}" for number in every)
    return names


def _has_script(place: str, row: Row) -> bool:
    """Whether a job still has the node of its script: with --no-kill it outlives that, and does nothing any more."""
    words, nodes = place.split(), node_names(row.nodes)
    return len(words) < 3 or not nodes or words[2] in nodes


def _waits(row: Row) -> str:
    text = f"it waits in Slurm: {row.reason}" if row.reason not in ("", "None") else "it waits in Slurm"
    if row.start is None:
        return text
    return f"{text}; likely from {datetime.fromtimestamp(row.start).isoformat(sep=' ')}"


def _time(text: str) -> float | None:
    try:
        return datetime.fromisoformat(text).timestamp()  # Slurm prints local time
    except ValueError:
        return None  # N/A, Unknown, NONE


def _escaped(path: Path) -> str:
    """A path in which sbatch replaces nothing."""
    return str(path).replace("%", "%%")
