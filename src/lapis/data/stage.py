"""Content-addressed stages: a folder named by the digest of all that its content depends on."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lapis.errors import ConflictError
from lapis.hashing import digest_json
from lapis.log import Progress, silent
from lapis.storage import lock, storage_errors, sync_folder


@dataclass(frozen=True)
class Stage:
    """One stage of one dataset: its name and digest give its folder."""

    root: Path
    name: str
    digest: str

    @staticmethod
    def of(root: Path, name: str, version: int, facts: Mapping[str, Any]) -> Stage:
        """The stage that these facts make; `version` is a number that changes with the stage's code."""
        return Stage(root, name, digest_json({"stage": name, "version": version, **facts}))

    @property
    def folder(self) -> Path:
        """Where the finished stage lies."""
        return self.root / f"{self.name}-{self.digest[:16]}"

    @property
    def work(self) -> Path:
        """Where an unfinished stage lies; its finished parts are used again."""
        return self.root / f".{self.name}-{self.digest[:16]}.work"

    @property
    def done(self) -> bool:
        """Whether the stage is finished."""
        return self.folder.is_dir()

    @contextmanager
    def making(self, progress: Progress = silent) -> Iterator[None]:
        """Hold the stage while it is made; another process that makes the same one is waited for."""
        with ExitStack() as held:
            while not self._held(held, progress):
                time.sleep(0.2)
            self._sweep()
            try:
                yield
            finally:
                self._sweep()  # a worker that failed has ended the others in the middle of their files

    def commit(self, work: Path) -> None:
        """Give a finished work folder its name. If the stage is there already, it holds the same.

        Its files were written with `atomic_file`, so all that is not on the disk yet are their names.
        """
        with storage_errors(self.folder):
            sync_folder(work)
            if self.done:
                shutil.rmtree(work)
            else:
                os.rename(work, self.folder)
            sync_folder(self.root)

    def _held(self, held: ExitStack, progress: Progress) -> bool:
        place = self.root / ".locks" / self.folder.name
        try:
            held.enter_context(lock(place, f"The stage {self.name}"))
        except ConflictError as error:
            progress(0, None, f"waiting: {error.message}")
            return False
        return True

    def _sweep(self) -> None:
        """Remove what killed writers of this stage left half-written."""
        for path in [*self.root.glob(f".{self.folder.name}.*.part"), *self.work.glob(".*.part")]:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
