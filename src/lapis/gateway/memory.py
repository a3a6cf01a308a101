"""Which models stay loaded: the memory they may take together, and which of them make room for another."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lapis.release.registry import Servable

# Of the machine's memory, unless told otherwise; the rest is for what is computed, and for others.
SHARE = 0.6
GROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")  # of a container


@dataclass(frozen=True)
class MemoryBudget:
    """The bytes that loaded models may take together, and how many each takes (weights and a full cache)."""

    bytes: int
    size: Callable[[Servable], int]


@dataclass(frozen=True)
class Held:
    """A loaded model, or one that is being loaded: its bytes, whether it is in use, when it last was."""

    name: str
    bytes: int
    busy: bool
    used_at: float


def to_unload(wanted: int, budget: int, held: Sequence[Held]) -> list[str] | None:
    """Whom to unload so that `wanted` more bytes fit: those idle for longest, and no more than needed.

    None where even without all idle ones there is no room.
    """
    free = budget - sum(model.bytes for model in held)
    chosen: list[str] = []
    for model in sorted((model for model in held if not model.busy), key=lambda model: model.used_at):
        if free >= wanted:
            break
        chosen.append(model.name)
        free += model.bytes
    return chosen if free >= wanted else None


def machine_memory() -> int:
    """Bytes of memory that this process may have: the machine's, or less where its container is limited."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(total, int(GROUP_LIMIT.read_text(encoding="ascii")))
    except (OSError, ValueError):  # not on Linux, or "max"
        return total
