"""The models below the home that can be served by name. No torch here."""

from __future__ import annotations

import re
import shutil
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lapis.errors import (
    ConfigError,
    ConflictError,
    InputError,
    IntegrityError,
    LapisError,
    NotFoundError,
    nearest,
)
from lapis.home import Home
from lapis.model import layout
from lapis.model import manifest as manifests
from lapis.model.config import ModelConfig
from lapis.model.manifest import Manifest, Source

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,95}")


@dataclass(frozen=True)
class StoredModel:
    """A model folder and what its manifest says; the files themselves are verified when it is loaded."""

    name: str
    folder: Path
    manifest: Manifest

    @property
    def digest(self) -> str:
        """The digest that names the contents."""
        return self.manifest.digest

    @property
    def source(self) -> Source:
        """Where the weights came from."""
        return self.manifest.source

    @property
    def base(self) -> str | None:
        """The name of the model that this is an adapter of; None for a whole model."""
        return self.manifest.base

    @property
    def licence(self) -> str:
        """The licence as its source states it, or "unknown"."""
        return self.manifest.source.licence

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return self.manifest.bytes

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return self.manifest.parameters

    @property
    def config(self) -> ModelConfig:
        """The shape, from config.json. Raises InputError if the file cannot be read."""
        return layout.read_config(self.folder)


class ModelStore:
    """Model folders by name, below `home.models`."""

    def __init__(self, home: Home) -> None:
        self.folder = home.models

    def list(self) -> list[StoredModel]:
        """All models whose manifest can be read, by name; `damaged` tells of the others."""
        return [found for found in self._entries() if isinstance(found, StoredModel)]

    def damaged(self) -> Sequence[LapisError]:
        """One error for each folder in the store that is no sound model folder."""
        return [found for found in self._entries() if isinstance(found, LapisError)]

    def get(self, name: str) -> StoredModel:
        """A model by name. Raises NotFoundError naming the nearest, IntegrityError for a bad manifest."""
        return open_folder(name, self.find(name))

    def find(self, name: str) -> Path:
        """The folder of a model that is there, sound or not. Raises NotFoundError naming the nearest."""
        folder = self.folder / name
        if NAME.fullmatch(name) and folder.is_dir():
            return folder
        known = nearest(name, [path.name for path in self._folders()])
        raise NotFoundError(
            f"There is no model {name!r}. {known}".rstrip(),
            hint=f"`lapis models list` shows what is there; to fetch it: lapis pull {name}",
        )

    def remove(self, name: str) -> None:
        """Delete a model: it leaves the store at once, then its bytes go. Raises NotFoundError."""
        leaving = self.folder / f".{name}.{uuid.uuid4().hex}.part"
        try:
            self.find(name).rename(leaving)
        except FileNotFoundError as error:
            raise ConflictError(f"The model {name!r} is being removed by another process.") from error
        shutil.rmtree(leaving)

    def place(self, name: str) -> Path:
        """The folder of a name, there or not. Raises ConfigError for what cannot be a name."""
        check_name(name)
        return self.folder / name

    def sweep(self, name: str) -> None:
        """Delete what killed writers of this name left behind. Call it only while holding the name's lock."""
        left = re.compile(re.escape(f".{name}.") + r"[0-9a-f]{32}\.part")
        for path in self.folder.glob(f".{name}.*"):
            if left.fullmatch(path.name):
                shutil.rmtree(path)

    def _folders(self) -> Sequence[Path]:
        if not self.folder.is_dir():
            return ()
        return sorted(path for path in self.folder.glob("[!.]*") if path.is_dir())

    def _entries(self) -> Sequence[StoredModel | LapisError]:
        return [_read(path) for path in self._folders()]


def check_name(name: str) -> None:
    """Raise ConfigError for a text that cannot be the name of a model."""
    if not NAME.fullmatch(name):
        raise ConfigError(
            f"{name!r} cannot be the name of a model.",
            hint="Lower-case letters, digits, '.', '_' and '-', at most 96, the first a letter or a digit.",
        )


def open_folder(name: str, folder: Path) -> StoredModel:
    """A model folder, wherever it lies, under a name. Raises as `read_manifest`."""
    return StoredModel(name, folder, manifests.read_manifest(folder))


def _read(folder: Path) -> StoredModel | LapisError:
    try:
        return open_folder(folder.name, folder)
    except (InputError, IntegrityError) as error:
        return error
