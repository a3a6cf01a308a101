"""Where the files of a source lie: a walk over a folder, or the listing of a URL; what is not entered is noted."""

from __future__ import annotations

import fnmatch
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from lapis.data.report import Step
from lapis.errors import InputError, nearest
from lapis.storage import list_url

NOT_ENTERED = frozenset({"__pycache__", "node_modules"})
HIDDEN = "hidden files and folders, not entered"
CACHES = "__pycache__ and node_modules, not entered"


@dataclass(frozen=True, slots=True)
class Place:
    """A file: its name inside the source and its path or URL; size and digest if a store has told them."""

    name: str
    path: str
    size: int = -1
    digest: str = ""
    reason: str = ""  # why it cannot be read
    alone: bool = False  # whether the recipe names this very file


def local_places(path: str, step: Step) -> Iterator[Place]:
    """One file, all files below a folder, or those that a pattern with `*` matches."""
    root = Path(path).expanduser()
    pattern = ""
    if "*" in str(root) and not root.exists():
        fixed = next(parent for parent in root.parents if "*" not in str(parent))
        pattern = root.relative_to(fixed).as_posix()
        root = fixed
    if not root.exists():
        siblings = [entry.name for entry in root.parent.iterdir()] if root.parent.is_dir() else []
        raise InputError(f"There is no file or folder {path}.", hint=nearest(root.name, siblings))
    if not root.is_dir():
        yield Place(root.name, str(root), alone=True)
        return
    found = False
    for place in _walk(root, root, step):
        if not pattern or _matches(place.name, pattern):
            found = True
            yield place
    if not found:
        raise InputError(
            f"No file matches {path}." if pattern else f"The folder {path} holds no files.",
            hint="Hidden files and folders, __pycache__ and node_modules are not entered.",
        )


def remote_places(url: str, step: Step) -> Iterator[Place]:
    """The files behind a URL; one whose store keeps a checksum is named by that, others by their bytes."""
    found = list_url(url)
    for file in found:
        parts = PurePosixPath(file.name).parts
        if what := next((mark for part in parts if (mark := _not_entered(part))), ""):
            step.note(what)
            continue
        digest = hashlib.sha256(f"{file.url}\0{file.checksum}".encode()).hexdigest() if file.checksum else ""
        yield Place(file.name, file.url, file.size, digest, alone=len(found) == 1 and url == file.url)


def _walk(root: Path, folder: Path, step: Step) -> Iterator[Place]:
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        if folder == root:
            raise InputError(f"The folder {folder} cannot be read: {error.strerror}.") from error
        yield _place(root, folder, "unreadable")
        return
    for entry in entries:
        path = Path(entry.path)
        if what := _not_entered(entry.name):
            step.note(what)
        elif entry.is_dir(follow_symlinks=False):
            yield from _walk(root, path, step)
        elif path.is_file():
            yield _place(root, path)
        else:  # such links are not followed, so none leads in a circle
            yield _place(root, path, "link to a folder" if path.is_dir() else "unreadable")


def _place(root: Path, path: Path, reason: str = "") -> Place:
    name = os.fsencode(path.relative_to(root)).decode("utf-8", errors="replace")
    return Place(name, str(path), reason=reason)


def _not_entered(name: str) -> str:
    if name.startswith("."):
        return HIDDEN
    return CACHES if name in NOT_ENTERED else ""


def _matches(name: str, pattern: str) -> bool:
    """Whether a path matches part by part; `**` stands for any number of parts."""
    return _match_parts(name.split("/"), pattern.split("/"))


def _match_parts(parts: list[str], patterns: list[str]) -> bool:
    if not patterns:
        return not parts
    if patterns[0] == "**":
        return any(_match_parts(parts[n:], patterns[1:]) for n in range(len(parts) + 1))
    return (
        bool(parts) and fnmatch.fnmatchcase(parts[0], patterns[0]) and _match_parts(parts[1:], patterns[1:])
    )
