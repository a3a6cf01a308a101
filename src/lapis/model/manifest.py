"""lapis.json, the manifest of a model folder: source, licence, digest of every file. No torch here."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lapis.errors import ConflictError, InputError, IntegrityError, NotFoundError
from lapis.hashing import digest_file, digest_json
from lapis.log import Progress, silent
from lapis.model.layout import CARD, LOADED, model_card, refuse_pickles
from lapis.storage import atomic_folder

NAME = "lapis.json"
FORMAT = 1


@dataclass(frozen=True)
class Source:
    """Where weights came from. `digest` is that of the original file or commit, where there is one."""

    kind: str  # "run", "gguf", "huggingface", "hub", "wheel"
    reference: str
    licence: str = "unknown"
    digest: str | None = None


@dataclass(frozen=True)
class FileEntry:
    """One file of a model folder: its size and its SHA-256."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What lapis.json says. `digest` names the contents: equal files, equal digests, whatever the source."""

    digest: str
    source: Source
    files: Mapping[str, FileEntry]
    parameters: int
    add_bos: bool
    bos_id: int | None
    stop_ids: tuple[int, ...]  # the first is the end-of-sequence token
    base: str | None = None  # the name of the model that this is an adapter of

    @property
    def bytes(self) -> int:
        """Size of all files together."""
        return sum(entry.bytes for entry in self.files.values())

    def to_json(self) -> str:
        """The text of lapis.json; its last key seals all the others."""
        facts = {"format": FORMAT, **asdict(self)}
        if self.base is None:
            del facts["base"]
        return json.dumps({**facts, "seal": digest_json(facts)}, indent=2, ensure_ascii=False) + "\n"


def describe_files(folder: Path) -> dict[str, FileEntry]:
    """Size and digest of every file of a folder (not of those below), lapis.json left out."""
    return {
        path.name: FileEntry(path.stat().st_size, digest_file(path))
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name != NAME
    }


def digest_of_files(files: Mapping[str, FileEntry]) -> str:
    """The digest that names a model: of the names and digests of its files."""
    return digest_json({name: entry.sha256 for name, entry in files.items()})


def read_manifest(folder: Path) -> Manifest:
    """Read lapis.json and check its seal.

    Raises NotFoundError without a folder, InputError for no model folder, IntegrityError for a changed text.
    """
    path = folder / NAME
    if not folder.is_dir():
        raise NotFoundError(
            f"There is no model folder {folder}.", hint="`lapis models list` shows what is there."
        )
    if not path.exists():
        refuse_pickles(folder)
        raise InputError(
            f"{folder} is not a model folder of Lapis: it has no {NAME}.",
            hint=f"A Hugging Face folder is imported with: lapis pull {folder}",
        )
    try:
        facts = json.loads(path.read_bytes())
        seal = facts.pop("seal")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise _corrupt(path, "it cannot be read") from error
    if seal != digest_json(facts):
        raise _corrupt(path, "its text does not match its own digest")
    if facts.pop("format", None) != FORMAT:
        raise InputError(f"{path} was written by a newer Lapis.", hint="Update this installation of Lapis.")
    try:
        return _from_facts(facts)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise _corrupt(path, f"it is no manifest ({error})") from error


def verify(folder: Path, progress: Progress = silent) -> Manifest:
    """Compare every file of a folder with its manifest. Raises IntegrityError naming the first bad file."""
    manifest = read_manifest(folder)
    _compare(folder, manifest, progress)
    return manifest


def copy_folder(folder: Path, target: Path, *, sealed: bool, progress: Progress = silent) -> Manifest:
    """Copy a model folder and verify the copy: `sealed` with lapis.json, else as a plain Hugging Face folder.

    There the licence, which lapis.json keeps, is in a model card.
    Raises IntegrityError if a file does not match its digest, ConflictError if `target` holds something.
    """
    manifest = read_manifest(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConflictError(f"{target} is there already.", hint="Choose a folder that is new or empty.")
    with atomic_folder(target) as place:
        for name in [*manifest.files, *([NAME] if sealed else [])]:
            if not (folder / name).is_file():
                raise _corrupt(folder / name, "the file is missing")
            shutil.copyfile(folder / name, place / name)
        _compare(place, manifest, progress, said=folder)
        if not sealed and CARD not in manifest.files and manifest.source.licence != "unknown":
            (place / CARD).write_text(model_card(manifest.source.licence), encoding="utf-8")
    return manifest


def _from_facts(facts: dict[str, Any]) -> Manifest:
    for name in facts["files"]:
        if name != Path(name).name:  # a manifest must not lead out of its folder
            raise ValueError(f"{name!r} is no plain file name")
    facts["source"] = Source(**facts["source"])
    facts["files"] = {name: FileEntry(**entry) for name, entry in facts["files"].items()}
    facts["stop_ids"] = tuple(facts["stop_ids"])
    return Manifest(**facts)


def _compare(folder: Path, manifest: Manifest, progress: Progress, said: Path | None = None) -> None:
    """Raise IntegrityError naming the first file (below `said`) that is missing or differs."""
    for name in LOADED:
        if (folder / name).exists() and name not in manifest.files:
            raise _corrupt((said or folder) / name, f"{NAME} has no digest of it")
    done = 0
    for name, entry in manifest.files.items():
        path, named = folder / name, (said or folder) / name
        if not path.is_file():
            raise _corrupt(named, "the file is missing")
        if path.stat().st_size != entry.bytes:
            raise _corrupt(named, f"it has {path.stat().st_size} bytes instead of {entry.bytes}")
        if digest_file(path) != entry.sha256:
            raise _corrupt(named, "its bytes do not match their digest")
        done += entry.bytes
        progress(done, manifest.bytes, f"verified {name}")


def _corrupt(path: Path, cause: str) -> IntegrityError:
    return IntegrityError(
        f"{path} is corrupt: {cause}.",
        hint="Remove the model and fetch or make it again: lapis models remove NAME, then lapis pull …",
    )
