"""The text that every machine with Lapis has: Python sources and documentation of the running interpreter."""

from __future__ import annotations

import csv
import sysconfig
from collections.abc import Iterator
from importlib.metadata import Distribution, PathDistribution
from pathlib import Path, PurePosixPath

ENDINGS = frozenset({".py", ".rst", ".md", ".txt"})
NAMES = ("METADATA", "LICENSE", "LICENCE", "COPYING", "NOTICE", "AUTHORS")
PYTHON_LICENCE = "PSF-2.0"


def environment_files() -> Iterator[tuple[str, Path, str]]:
    """Name, path and licence of every text of the standard library and of the installed packages."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    packages = sorted({Path(sysconfig.get_path(key)) for key in ("purelib", "platlib")})
    for path in _texts(stdlib, skip={"site-packages", "dist-packages"}):
        yield f"stdlib/{path.relative_to(stdlib).as_posix()}", path, PYTHON_LICENCE
    for folder in packages:
        licences = _licences(folder)
        for path in _texts(folder):
            name = path.relative_to(folder).as_posix()
            licence = licences.get(name) or licences.get(PurePosixPath(name).parts[0], "")
            yield f"site-packages/{name}", path, licence


def licence_of(package: Distribution) -> str:
    """A package's licence by its metadata: the SPDX expression, the classifiers, or a short text."""
    facts = package.metadata
    if "License-Expression" in facts:
        return facts["License-Expression"]
    marks = [line for line in facts.get_all("Classifier") or [] if line.startswith("License ::")]
    names = [mark.rsplit(" :: ", 1)[-1] for mark in marks if mark != "License :: OSI Approved"]
    if names:
        return " AND ".join(sorted(names))
    text = facts["License"].strip() if "License" in facts else ""
    return text if len(text) <= 100 and "\n" not in text else ""


def _texts(folder: Path, skip: set[str] | None = None) -> Iterator[Path]:
    avoid = {"__pycache__", *(skip or ())}
    for entry in sorted(folder.iterdir()) if folder.is_dir() else ():
        if entry.name in avoid or entry.is_symlink():
            continue
        if entry.is_dir():
            yield from _texts(entry, skip)
        elif entry.suffix.lower() in ENDINGS or entry.name.startswith(NAMES):
            yield entry


def _licences(folder: Path) -> dict[str, str]:
    """Licences by file name, and by top folder where all its files belong to one package."""
    by_file: dict[str, str] = {}
    by_top: dict[str, set[str]] = {}
    for place in sorted(folder.glob("*.dist-info")):
        licence = licence_of(PathDistribution(place))
        by_top.setdefault(place.name, set()).add(licence)
        try:
            rows = list(csv.reader((place / "RECORD").read_text(encoding="utf-8").splitlines()))
        except (OSError, UnicodeDecodeError):
            continue  # without its record a package's licence is unknown, which the tables show as such
        for row in rows:
            by_file[row[0]] = licence
            by_top.setdefault(PurePosixPath(row[0]).parts[0], set()).add(licence)
    tops = {name: found.copy().pop() for name, found in by_top.items() if len(found) == 1}
    return tops | by_file
