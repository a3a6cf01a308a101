"""How a job of this machine is held to its memory: a control group where one can be made, else per process.

A control group (cgroup v2) bounds all processes of a job together, and can end them all at once. Without the right
to make one, each process gets RLIMIT_DATA: what it may write to that is its own, so a job of several processes may
take it several times over.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

GROUPS = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")


@dataclass(frozen=True)
class MemoryLimit:
    """What is in force for a job: the group to make, or kilobytes for each process; or nothing."""

    group: Path | None = None
    kilobytes: int | None = None


def parent_group(groups: Path = GROUPS, own: Path = OWN) -> Path | None:
    """The control group below which groups with a memory limit can be made; None where none can.

    Beside the own one first: a group with processes of its own may not hand memory on to groups below it.
    """
    try:
        line = next(line for line in own.read_text().splitlines() if line.startswith("0::/"))
    except (OSError, StopIteration):
        return None
    mine = groups / line.removeprefix("0::/")
    for parent in (mine.parent, mine):
        if not parent.is_relative_to(groups):
            continue
        with suppress(OSError):
            hands_on = (parent / "cgroup.subtree_control").read_text().split()
            if "memory" in hands_on and os.access(parent, os.W_OK):
                return parent
    return None


def make_group(parent: Path, name: str, memory: int) -> Path | None:
    """A control group that may take so many bytes; None if the kernel does not let us."""
    group = parent / name
    try:
        group.mkdir(exist_ok=True)
        (group / "memory.max").write_text(str(memory))
        for file, value in (("memory.swap.max", "0"), ("memory.oom.group", "1")):
            if (group / file).exists():
                (group / file).write_text(value)
    except OSError:
        return None
    return group


def remove_group(group: Path) -> None:
    """End all that is still in a control group, and remove it if nothing is."""
    with suppress(OSError):
        if (group / "cgroup.kill").exists():
            (group / "cgroup.kill").write_text("1")
        group.rmdir()  # it stays while a process is being ended; the next call finds it


def machine_gpus() -> tuple[str, ...]:
    """What CUDA_VISIBLE_DEVICES can name here: what it names already, else all of the driver's GPUs."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return tuple(name.strip() for name in visible.split(",") if name.strip() not in ("", "-1"))
    with suppress(OSError):
        return tuple(str(n) for n in range(len(os.listdir("/proc/driver/nvidia/gpus"))))
    return ()


def machine_memory(groups: Path = GROUPS) -> int:
    """Bytes of memory that this process may have: the machine's, or less where its container is limited."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):  # not limited: there is no such file, or it says "max"
        return min(total, int((groups / "memory.max").read_text(encoding="ascii")))
    return total
