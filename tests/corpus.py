"""Real text that is on every machine: sources of the standard library, in a folder of the test's own."""

from __future__ import annotations

import shutil
import sysconfig
from pathlib import Path

PACKAGES = ("email", "json", "unittest", "logging", "http", "urllib", "importlib", "asyncio")


def write_corpus(folder: Path, packages: tuple[str, ...] = PACKAGES) -> Path:
    """Copy a few packages' sources (about 2 MB for all of them) into `folder`."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for package in packages:
        for path in sorted((library / package).glob("*.py")):
            target = folder / package / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    return folder
