"""What this machine has and how busy it is: processors, memory, GPUs. No torch."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

MEMORY = Path("/proc/meminfo")
QUERY = (
    "nvidia-smi",
    "--query-gpu=name,utilization.gpu,memory.used,memory.total",
    "--format=csv,noheader,nounits",
)
SECONDS = 5.0  # that the driver may take to answer


@dataclass(frozen=True)
class Gpu:
    """A GPU; `busy` is a share, memory is in bytes. None where the driver does not say."""

    name: str
    busy: float | None
    used: int | None
    total: int | None


@dataclass(frozen=True)
class Machine:
    """`load` is the mean number of threads that want a processor, over a minute; memory is in bytes."""

    cpus: int
    load: float
    memory: int | None
    free: int | None
    gpus: tuple[Gpu, ...]


def look() -> Machine:
    """The machine now. Starts the GPU driver's command where there is one: call it in a thread."""
    facts = memory_facts(MEMORY.read_text()) if MEMORY.exists() else {}
    return Machine(
        cpus=len(os.sched_getaffinity(0)),
        load=os.getloadavg()[0],
        memory=facts.get("MemTotal"),
        free=facts.get("MemAvailable"),
        gpus=tuple(_gpus()),
    )


def memory_facts(text: str) -> dict[str, int]:
    """Bytes by name, of /proc/meminfo."""
    lines = (line.split() for line in text.splitlines())
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if len(words) == 3}


def gpu(line: str) -> Gpu:
    """A GPU of a line of nvidia-smi's answer to QUERY."""
    name, busy, used, total = (part.strip() for part in line.rsplit(",", 3))
    numbers = [int(part) if part.isdecimal() else None for part in (busy, used, total)]
    megabytes = [None if number is None else number * 2**20 for number in numbers[1:]]
    return Gpu(name, None if numbers[0] is None else numbers[0] / 100, megabytes[0], megabytes[1])


def _gpus() -> list[Gpu]:
    if shutil.which(QUERY[0]) is None:
        return []
    try:
        done = subprocess.run(QUERY, capture_output=True, text=True, check=False, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return []  # a driver that hangs is the machine's trouble, not this page's
    return (
        [gpu(line) for line in done.stdout.splitlines() if line.count(",") >= 3]
        if not done.returncode
        else []
    )
