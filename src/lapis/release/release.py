"""A release: a governed model. Its states, and the legal moves between them, in one table."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from lapis.errors import ConflictError, InputError
from lapis.release.lineage import Lineage

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,95}")  # the same as for a pulled model: both are served by name


class State(StrEnum):
    """How far a release has come."""

    DRAFT = "draft"  # the weights are kept and verified
    EVALUATED = "evaluated"  # there is a report
    APPROVED = "approved"  # somebody vouched for it: it may be served
    LIVE = "live"  # it has been taken into service
    RETIRED = "retired"  # it is served no more, and its record stays


# A draft reaches `approved` only where its missing evaluation is overridden by a stated reason (see gates).
MOVES = {
    State.DRAFT: (State.EVALUATED, State.APPROVED, State.RETIRED),
    State.EVALUATED: (State.APPROVED, State.RETIRED),
    State.APPROVED: (State.LIVE, State.RETIRED),
    State.LIVE: (State.RETIRED,),
    State.RETIRED: (),
}
SERVABLE = (State.APPROVED, State.LIVE)


@dataclass(frozen=True)
class Release:
    """One version of a release. `digest` names its weights; `report` is its evaluation, None without one."""

    name: str
    version: int
    state: State
    folder: Path
    digest: str
    manifest_digest: str
    run_id: str | None
    report: dict[str, Any] | None
    lineage: Lineage
    created_at: float
    created_by: str
    approved_by: str | None
    reason: str

    @property
    def id(self) -> str:
        """`name:version`."""
        return f"{self.name}:{self.version}"


def check_move(release_id: str, state: State, to: State) -> None:
    """Raises ConflictError naming the legal moves if a release cannot go from one state to the other."""
    if to in MOVES[state]:
        return
    legal = ", ".join(MOVES[state]) or "none, this is its end"
    raise ConflictError(
        f"The release {release_id} is {state} and cannot become {to}. Legal: {legal}.",
        hint=f"lapis release show {release_id}",
    )


def parse_reference(reference: str) -> tuple[str, int | None]:
    """`name` or `name:version` as its parts; without a version, None. Raises InputError."""
    name, colon, version = reference.partition(":")
    check_name(name)
    if not colon:
        return name, None
    if not version.isascii() or not version.isdecimal() or len(version) > 9 or int(version) < 1:
        raise InputError(f"{reference!r}: a version is a number from 1 on.", hint="Example: my-model:2")
    return name, int(version)


def check_name(name: str) -> None:
    """Raises InputError for a text that cannot be the name of a release."""
    if not NAME.fullmatch(name):
        raise InputError(
            f"{name[:60]!r} cannot be the name of a release.",
            hint="Lower-case letters, digits, '.', '_' and '-', at most 96, the first a letter or a digit.",
        )
