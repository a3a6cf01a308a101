"""Checkpoints of several ranks, written one rank after the other in one process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lapis.checkpoint.manifest import SAVING
from lapis.checkpoint.retention import Retention
from lapis.checkpoint.sharded import Checkpoint, Groups, commit, write
from lapis.hashing import canonical_json


def saved_by(folder: Path, step: int, ranks: Sequence[Groups], state: Mapping[str, Any]) -> Checkpoint:
    """What `save` of so many ranks commits, each with its groups."""
    temporary = folder / f"{SAVING}test"
    temporary.mkdir(parents=True)
    written = [write(temporary, groups, rank, len(ranks)) for rank, groups in enumerate(ranks)]
    return commit(temporary, step, written, canonical_json(dict(state)).encode(), Retention(1), None)
