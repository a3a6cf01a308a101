"""The nodes that Slurm gave to the job that this process runs in. No torch."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Collection

from lapis.errors import ConfigError, UnavailableError
from lapis.train.nodes import Allocation

LOST = ("down", "fail", "error", "unknown", "reboot")  # how the states begin of nodes that do not work
ASK_S = 20.0  # for Slurm to answer


def slurm_allocation(ranks: int, nodes: int) -> Allocation:
    """The allocation of this Slurm job, for so many ranks on so many of its nodes.

    Raises ConfigError outside of a job, or if they do not fit; UnavailableError if Slurm does not answer.
    """
    count = int(os.environ.get("SLURM_JOB_NUM_NODES", "0"))
    here, names = os.environ.get("SLURMD_NODENAME", ""), os.environ.get("SLURM_JOB_NODELIST", "")
    if not (count and here and names):
        raise ConfigError(
            "--nodes needs a Slurm job: this process runs in none.",
            hint="Submit it: sbatch --nodes 3 --no-kill --no-requeue --wrap 'lapis train …'",
        )
    if nodes > count:
        raise ConfigError(f"--nodes {nodes}, but the Slurm job has {count}.")
    if ranks % nodes:
        raise ConfigError(f"{ranks} ranks cannot be spread evenly over {nodes} nodes.")
    launch = (
        "srun", f"--nodes={count}", f"--ntasks={count}", "--ntasks-per-node=1", "--no-kill", "--wait=0",
        "--kill-on-bad-exit=0", "--mem=0", "--cpu-bind=none", "--input=none", "--job-name=lapis-agents",
    )  # fmt: skip
    return Allocation(count, _address(here), launch, _NodeStates(names))


def _address(node: str) -> str:
    """By which address Slurm reaches a node."""
    asked = subprocess.run(
        ("scontrol", "show", "node", "-o", node), capture_output=True, text=True, timeout=ASK_S, check=False
    )
    words = dict(word.partition("=")[::2] for word in asked.stdout.split())
    if "NodeAddr" not in words:
        raise UnavailableError(f"Slurm does not say where the node {node} is: {asked.stderr.strip()}")
    return words["NodeAddr"]


class _NodeStates:
    """Which of some nodes Slurm holds for lost: the last answer; a question that takes long holds nobody up."""

    def __init__(self, names: str) -> None:
        self.command = ("sinfo", "-h", "-N", "-n", names, "-o", "%N %T")
        self.asked: subprocess.Popen[str] | None = None
        self.since = 0.0
        self.lost: frozenset[str] = frozenset()

    def __call__(self) -> Collection[str]:
        if self.asked is not None:
            if self.asked.poll() is None and time.monotonic() - self.since < ASK_S:
                return self.lost
            self._take(self.asked)
        self.since = time.monotonic()
        self.asked = subprocess.Popen(
            self.command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        return self.lost

    def _take(self, asked: subprocess.Popen[str]) -> None:
        asked.kill()  # nothing, where it has ended
        answer, _ = asked.communicate()
        if asked.returncode == 0:
            lines = (line.split() for line in answer.splitlines())
            self.lost = frozenset(
                words[0] for words in lines if len(words) == 2 and words[1].startswith(LOST)
            )
