"""The one folder under which everything that Lapis keeps lies: `LAPIS_HOME`, by default `~/.lapis`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Home:
    """Paths below the home folder. Nothing is created by asking for a path."""

    root: Path

    @staticmethod
    def default() -> Home:
        """The home named by LAPIS_HOME, or `~/.lapis`."""
        return Home(Path(os.environ.get("LAPIS_HOME") or Path.home() / ".lapis").expanduser().absolute())

    @property
    def data(self) -> Path:
        """Prepared datasets, one folder per digest."""
        return self.root / "data"

    @property
    def runs(self) -> Path:
        """Training runs, one folder per run."""
        return self.root / "runs"

    @property
    def models(self) -> Path:
        """Pulled models, one folder per name."""
        return self.root / "models"

    @property
    def releases(self) -> Path:
        """Weights of releases, one folder per name and version."""
        return self.root / "releases"

    @property
    def files(self) -> Path:
        """Uploaded files and results, one folder per project."""
        return self.root / "files"

    @property
    def jobs(self) -> Path:
        """What jobs write while they run, one folder per job."""
        return self.root / "jobs"

    @property
    def fine_tuning(self) -> Path:
        """What fine-tuning through the API works on and makes, one folder per job."""
        return self.root / "fine-tuning"

    @property
    def prices(self) -> Path:
        """What work costs, as TOML; without it everything is free."""
        return self.root / "prices.toml"

    @property
    def settings(self) -> Path:
        """What a server is told beside its command line."""
        return self.root / "server.toml"

    @property
    def moderation(self) -> Path:
        """Phrases that moderation looks for, as TOML; without it a short list."""
        return self.root / "moderation.toml"

    @property
    def database_url(self) -> str:
        """The database: LAPIS_DATABASE_URL, or SQLite below the home."""
        return os.environ.get("LAPIS_DATABASE_URL") or f"sqlite:///{self.root / 'lapis.db'}"
