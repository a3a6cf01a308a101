"""A Slurm cluster on this one host, of its own munge key, database and daemons, all below one folder. Needs root.

    python -m tests.slurm.cluster up FOLDER      # prints the SLURM_CONF to use
    python -m tests.slurm.cluster down FOLDER

Its nodes n1 to n4 have four CPUs and two GPUs each that are none (device nodes of /dev/null). Accounts `teama` and
`teamb`; partitions `low`, whose jobs may be pushed out, and `high`. A node is lost by `kill_node` (all of it),
`freeze_node` (it is silent, and nothing is closed), or `kill_manager` (its slurmd alone: what it started runs on).
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

NODES = ("n1", "n2", "n3", "n4")
PROGRAMS = ("slurmctld", "slurmd", "slurmdbd", "munged", "mariadbd", "sbatch", "sacct")
PORTS = ("ctld", "dbd", "sql", *NODES)
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
WAIT_SECONDS = 60.0


def missing() -> str:
    """Why there can be no cluster here; empty if there can."""
    absent = [program for program in PROGRAMS if shutil.which(program, path=PATH) is None]
    if absent:
        return f"not installed: {', '.join(absent)} (make test-slurm installs them)"
    return "" if os.geteuid() == 0 else "a private Slurm needs root"


class SlurmCluster:
    """One cluster in a folder. `with` starts it, and stops all of its daemons by their pid files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.conf = folder / "slurm.conf"
        self.database: subprocess.Popen[bytes] | None = None
        self.environment = {**os.environ, "PATH": PATH, "SLURM_CONF": str(self.conf)}

    def __enter__(self) -> SlurmCluster:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Bring all daemons up and wait until every node is idle."""
        for name in ("state", "spool", "dev", "run", "log"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        ports = dict(zip(PORTS, _free_ports(len(PORTS)), strict=True))
        self._write("slurm.conf", _slurm_conf(self.folder, ports))
        self._write("gres.conf", f"NodeName=n[1-4] Name=gpu File={self.folder}/dev/gpu[0-1]\n")
        self._write("slurmdbd.conf", _slurmdbd_conf(self.folder, ports), mode=0o600)
        for number in range(2):
            os.mknod(self.folder / f"dev/gpu{number}", 0o20666, os.makedev(1, 3))
        self._start_munge()
        self._start_database(ports["sql"])
        self.call("slurmdbd")
        self.until(lambda: self.tries("sacctmgr", "-n", "list", "cluster"))
        self._sacctmgr("add cluster lab", "add account teama fairshare=60", "add account teamb fairshare=40")
        self._sacctmgr("add user root account=teama", "add user root account=teamb")
        self.call("slurmctld")
        for node in NODES:
            self.start_node(node)
        self.until(lambda: self.states() == dict.fromkeys(NODES, "idle"))

    def stop(self) -> None:
        """End every job and every daemon; munge last, which the others speak through."""
        if self.tries("scancel", "--user=root"):
            with contextlib.suppress(TimeoutError):
                self.until(lambda: not self.call("squeue", "-h"), seconds=20)
        for node in NODES:
            self.thaw_node(node)
            self.kill_node(node)
        for name in ("slurmctld", "slurmdbd", "mariadbd", "munged"):
            self._end(self.folder / "run" / f"{name}.pid")
        if self.database is not None:
            self.database.wait()

    def start_node(self, node: str) -> None:
        """Start a node's slurmd."""
        self.call("slurmd", "-N", node)

    def kill_node(self, node: str) -> None:
        """A node dies: all of its processes at once."""
        for process in self.processes(node):
            _signal(process, signal.SIGKILL)

    def freeze_node(self, node: str) -> None:
        """A node gives no sign any more, and its connections stay as they are: like a lost network, or power."""
        for process in self.processes(node):
            _signal(process, signal.SIGSTOP)

    def thaw_node(self, node: str) -> None:
        """A frozen node goes on as if nothing had happened."""
        for process in self.processes(node):
            _signal(process, signal.SIGCONT)

    def kill_manager(self, node: str) -> None:
        """A node half dies: its slurmd alone."""
        _signal(int((self.folder / f"run/slurmd-{node}.pid").read_text()), signal.SIGKILL)

    def states(self) -> dict[str, str]:
        """Every node's state."""
        lines = self.call("sinfo", "-h", "-N", "-p", "low", "-o", "%N %T").splitlines()
        return dict(line.split() for line in lines)

    def call(self, *command: str) -> str:
        """What a command of Slurm says. Raises RuntimeError with its words if it fails."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout.strip()

    def tries(self, *command: str) -> bool:
        """Whether a command works."""
        with contextlib.suppress(RuntimeError, FileNotFoundError):
            self.call(*command)
            return True
        return False

    def until(self, true: Callable[[], bool], seconds: float = WAIT_SECONDS) -> None:
        """Wait until it is true. Raises TimeoutError."""
        give_up = time.monotonic() + seconds
        while not true():
            if time.monotonic() > give_up:
                raise TimeoutError(f"waited {seconds} s for nothing; logs are in {self.folder / 'log'}")
            time.sleep(0.1)

    def _start_munge(self) -> None:
        key, run = self.folder / "munge.key", self.folder / "run"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        places = {"key-file": key, "socket": self.folder / "munge.socket", "pid-file": run / "munged.pid",
                  "log-file": self.folder / "log/munged.log", "seed-file": run / "munge.seed"}  # fmt: skip
        self.call("munged", "--force", *(f"--{name}={path}" for name, path in places.items()))

    def _start_database(self, port: int) -> None:
        data, at = self.folder / "sql", self.folder / "sql.socket"
        self.call("mariadb-install-db", f"--datadir={data}", "--auth-root-authentication-method=normal",
                  "--skip-test-db", "--user=root")  # fmt: skip
        options = {"datadir": data, "socket": at, "port": port, "pid-file": self.folder / "run/mariadbd.pid",
                   "bind-address": "127.0.0.1", "innodb-buffer-pool-size": "64M", "user": "root"}  # fmt: skip
        with (self.folder / "log/mariadbd.log").open("w") as log:
            self.database = subprocess.Popen(
                ["mariadbd", "--no-defaults", *(f"--{name}={value}" for name, value in options.items())],
                env=self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        speak = ("mariadb", "--no-defaults", f"--socket={at}", "--user=root", "-e")
        self.until(lambda: self.tries(*speak, "select 1"))
        for host in ("127.0.0.1", "localhost"):
            self.call(*speak, f"create user slurm@'{host}'; grant all on slurm.* to slurm@'{host}'")
        self.call(*speak, "create database slurm")

    def _sacctmgr(self, *commands: str) -> None:
        for command in commands:
            self.call("sacctmgr", "-i", *command.split())

    def _write(self, name: str, text: str, mode: int = 0o644) -> None:
        (self.folder / name).write_text(text)
        (self.folder / name).chmod(mode)

    def processes(self, node: str) -> list[int]:
        """All processes of a node: its slurmd, the managers of steps that came from it, and what they started."""
        path = self.folder / f"run/slurmd-{node}.pid"
        managers = {path.read_text().strip()} if path.is_file() else set()
        found = []
        for process in (int(entry) for entry in os.listdir("/proc") if entry.isdecimal()):
            with contextlib.suppress(OSError):
                group = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[2]
                variables = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
                ours = f"SLURM_CONF={self.conf}".encode() in variables
                told = f"SLURMD_NODENAME={node}".encode() in variables
                if str(process) in managers or (ours and (told or group in managers)):
                    found += [process, *_step_manager(process)]
        return list(dict.fromkeys(found))

    def _end(self, pid_file: Path) -> None:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, ValueError):
            process = int(pid_file.read_text())
            os.kill(process, signal.SIGTERM)
            self.until(lambda: not Path(f"/proc/{process}").exists() or _is_zombie(process), seconds=20)


def _slurm_conf(folder: Path, ports: dict[str, int]) -> str:
    host = socket.gethostname().partition(".")[0]
    munge = folder / "munge.socket"
    settings = {
        "ClusterName": "lab", "SlurmctldHost": f"{host}(127.0.0.1)", "SlurmUser": "root", "SlurmdUser": "root",
        "AuthType": "auth/munge", "AuthInfo": f"socket={munge}", "SlurmctldPort": ports["ctld"],
        "StateSaveLocation": folder / "state", "SlurmdSpoolDir": folder / "spool/%n",
        "SlurmctldPidFile": folder / "run/slurmctld.pid", "SlurmdPidFile": folder / "run/slurmd-%n.pid",
        "SlurmctldLogFile": folder / "log/slurmctld.log", "SlurmdLogFile": folder / "log/slurmd-%n.log",
        "ProctrackType": "proctrack/linuxproc", "TaskPlugin": "task/none", "SwitchType": "switch/none",
        "MpiDefault": "none", "SchedulerType": "sched/backfill", "SelectType": "select/cons_tres",
        "SchedulerParameters": "bf_interval=1,sched_interval=1,sched_min_interval=0",
        "SelectTypeParameters": "CR_Core_Memory", "ReturnToService": 2, "SlurmdTimeout": 10, "KillWait": 5,
        "InactiveLimit": 0, "EnforcePartLimits": "ALL", "MinJobAge": 300, "GresTypes": "gpu",
        "SlurmdParameters": "config_overrides",
        "PreemptType": "preempt/partition_prio", "PreemptMode": "REQUEUE", "JobRequeue": 1,
        "JobAcctGatherType": "jobacct_gather/linux", "JobAcctGatherFrequency": 5,
        "AccountingStorageType": "accounting_storage/slurmdbd", "AccountingStorageHost": "localhost",
        "AccountingStoragePort": ports["dbd"], "AccountingStoragePass": munge,
        "AccountingStorageTRES": "gres/gpu", "AccountingStorageEnforce": "associations,limits,qos",
        "PriorityType": "priority/multifactor", "PriorityWeightFairshare": 100000, "PriorityCalcPeriod": 1,
    }  # fmt: skip
    lines = [f"{name}={value}" for name, value in settings.items()]
    lines += [
        f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[node]} CPUs=4 RealMemory=6000 Gres=gpu:2"
        for node in NODES
    ]
    every = "Nodes=n[1-4] MaxTime=INFINITE State=UP"
    lines += [f"PartitionName=low {every} Default=YES PriorityTier=1 PreemptMode=REQUEUE"]
    lines += [f"PartitionName=high {every} PriorityTier=10 PreemptMode=OFF"]
    return "\n".join(lines) + "\n"


def _slurmdbd_conf(folder: Path, ports: dict[str, int]) -> str:
    settings = {
        "AuthType": "auth/munge", "AuthInfo": f"socket={folder / 'munge.socket'}", "DbdHost": "localhost",
        "DbdPort": ports["dbd"], "SlurmUser": "root", "LogFile": folder / "log/slurmdbd.log",
        "PidFile": folder / "run/slurmdbd.pid", "StorageType": "accounting_storage/mysql",
        "StorageHost": "127.0.0.1", "StoragePort": ports["sql"], "StorageUser": "slurm", "StorageLoc": "slurm",
    }  # fmt: skip
    return "".join(f"{name}={value}\n" for name, value in settings.items())


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def _signal(process: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, number)


def _step_manager(process: int) -> list[int]:
    """The slurmstepd that a process was started by, if it was."""
    parent = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    is_manager = parent > 1 and Path(f"/proc/{parent}/comm").read_text().startswith("slurmstepd")
    return [parent] if is_manager else []


def _is_zombie(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def main(arguments: Sequence[str]) -> None:
    """`up FOLDER` or `down FOLDER`."""
    act, folder = arguments
    cluster = SlurmCluster(Path(folder).absolute())
    if act == "down":
        cluster.stop()
        return
    why = missing()
    if why:
        sys.exit(f"No Slurm here: {why}")
    cluster.start()
    print(f"export SLURM_CONF={cluster.conf}")


if __name__ == "__main__":
    main(sys.argv[1:])
