"""What a checkpoint is on disk, decided without touching a disk: layout, digests, the commit rule.

    checkpoints/
      step-00000100-3f9a0c1b2d4e/        committed: the name carries the step and the start of the digest
        model.safetensors                one file per group of tensors, or one per group and rank:
        optimizer.0003-of-0008.safetensors
        state.json                       everything that is not a tensor
        manifest.json                    every whole tensor: shape, dtype, and where its pieces lie, with digests
      .saving-…, .removing-…             left behind by a killed process; the next save clears them

The manifest carries its own digest too. Commit rule: a folder gets its `step-…` name, by one rename, only
after its files were flushed to disk and read back with the right digests. So whatever has such a name was
whole once, and what has not never counts.

Format 1 had one file per group, a digest of each whole file, and no shapes: those stand in the files' headers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from lapis.checkpoint.piece import Box, Shape, uncovered
from lapis.errors import InputError, IntegrityError
from lapis.hashing import digest_json

FORMAT = 2
MANIFEST = "manifest.json"
STATE = "state.json"
TENSORS = ".safetensors"
SAVING = ".saving-"
REMOVING = ".removing-"

GROUP = re.compile(r"[a-z][a-z0-9_]*")
FOLDER = re.compile(r"step-(\d{8,})-([0-9a-f]{12})")


class Name(NamedTuple):
    """What the name of a committed folder says."""

    step: int
    digest: str  # the first 12 digits of the manifest's digest


class Region(NamedTuple):
    """A stretch of a file with a digest of its own, and what lies there, in words."""

    file: str
    start: int
    bytes: int
    sha256: str
    what: str


@dataclass(frozen=True)
class FileEntry:
    """A file's size and the SHA-256 of its first `head` bytes: what lies behind them belongs to pieces."""

    bytes: int
    head: int
    sha256: str

    def region(self, name: str) -> Region:
        """The head of this file, which has this name."""
        return Region(name, 0, self.head, self.sha256, "its header" if name.endswith(TENSORS) else "")


@dataclass(frozen=True)
class Piece:
    """A box of a whole tensor: where its bytes lie in which file, and their SHA-256."""

    file: str
    offset: Shape
    shape: Shape
    start: int
    bytes: int
    sha256: str

    @property
    def box(self) -> Box:
        return Box(self.offset, self.shape)

    def region(self, tensor: str) -> Region:
        """The bytes of this piece, which belongs to this tensor."""
        return Region(self.file, self.start, self.bytes, self.sha256, f"tensor {tensor}")


@dataclass(frozen=True)
class TensorEntry:
    """A whole tensor: its dtype as safetensors writes it, its shape, and the pieces that hold each element once."""

    dtype: str
    shape: Shape
    pieces: tuple[Piece, ...]


Groups = Mapping[str, Mapping[str, TensorEntry]]


@dataclass(frozen=True)
class Manifest:
    """The list of everything in a checkpoint."""

    step: int
    files: Mapping[str, FileEntry]
    groups: Groups
    score: float | None = None  # a loss, for retention
    format: int = FORMAT

    @property
    def digest(self) -> str:
        """SHA-256 over everything: equal checkpoints of equally many ranks have equal digests, on any machine."""
        return digest_json(_body(self))

    @property
    def bytes(self) -> int:
        """Size of all files, without the manifest itself."""
        return sum(entry.bytes for entry in self.files.values())

    def pieces(self) -> Iterator[tuple[str, Piece]]:
        """Every piece, with the name of its tensor."""
        for tensors in self.groups.values():
            for name, tensor in tensors.items():
                for piece in tensor.pieces:
                    yield name, piece

    def regions(self) -> list[Region]:
        """Every byte of every file: first the tensors, then the heads (in format 1 a head is the whole file)."""
        tensors = [piece.region(name) for name, piece in self.pieces()]
        return tensors + [entry.region(name) for name, entry in self.files.items()]


def folder_name(manifest: Manifest) -> str:
    """The name that a checkpoint is committed under."""
    return f"step-{manifest.step:08d}-{manifest.digest[:12]}"


def file_name(group: str, rank: int, ranks: int) -> str:
    """The file in which a rank writes its pieces of a group."""
    place = f".{rank + 1:04d}-of-{ranks:04d}" if ranks > 1 else ""
    return f"{group}{place}{TENSORS}"


def parse_name(name: str) -> Name | None:
    """Step and digest in the name of a committed folder; None for every other name."""
    match = FOLDER.fullmatch(name)
    return Name(int(match[1]), match[2]) if match else None


def incomplete(manifest: Manifest) -> str | None:
    """Why a manifest does not describe whole tensors and whole files, naming the tensor or the file; None if it does.

    Every element of a tensor lies in exactly one piece, every byte of a file in its head or in exactly one piece.
    """
    for group, tensors in manifest.groups.items():
        for name, tensor in tensors.items():
            if fault := uncovered(tensor.shape, (piece.box for piece in tensor.pieces)):
                return f"tensor {name} of {group}: {fault}"
    places: dict[str, list[tuple[int, int]]] = {
        name: [(0, entry.head)] for name, entry in manifest.files.items()
    }
    for _, piece in manifest.pieces():
        places[piece.file].append((piece.start, piece.bytes))
    for name, entry in manifest.files.items():
        position = 0
        for start, count in sorted(places[name]):
            if start != position:
                return f"file {name}: byte {min(start, position)} lies in no piece or in two"
            position += count
        if position != entry.bytes:
            return f"file {name}: {entry.bytes:,} bytes, but pieces for {position:,}"
    return None


def render(manifest: Manifest) -> str:
    """The text of manifest.json. There is exactly one for a manifest, so a changed byte anywhere shows."""
    return json.dumps({**_body(manifest), "digest": manifest.digest}, indent=1, sort_keys=True) + "\n"


def parse(raw: bytes, name: str) -> Manifest:
    """Read manifest.json of the folder `name`. Raises IntegrityError if it is not what was written.

    A whole manifest of a format that this version does not know is an InputError: nothing is broken there.
    """
    try:
        value = json.loads(raw)
        digest = value.pop("digest")
        whole = digest == digest_json(value)
    except (ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise IntegrityError(f"{name}/{MANIFEST} does not match its own digest.", hint=_OTHERS)
    if value.get("format") not in (1, FORMAT):
        raise InputError(
            f"The checkpoint {name} has format {value.get('format')!r}; this Lapis reads formats 1 to {FORMAT}.",
            hint="Use the version of Lapis that wrote it, or a newer one.",
        )
    manifest = _manifest_1(value) if value["format"] == 1 else _manifest(value)
    promised = parse_name(name)
    if render(manifest).encode() != raw or promised != Name(manifest.step, manifest.digest[:12]):
        raise IntegrityError(f"{name}/{MANIFEST} does not match the name of its folder.", hint=_OTHERS)
    return manifest


_OTHERS = "Resuming the run goes on from the newest checkpoint that is whole: `lapis runs show` lists them."


def _body(manifest: Manifest) -> dict[str, Any]:
    if manifest.format == 1:
        return _body_1(manifest)
    return asdict(manifest)


def _manifest(value: Mapping[str, Any]) -> Manifest:
    groups = {
        group: {name: _tensor(entry) for name, entry in tensors.items()}
        for group, tensors in value["groups"].items()
    }
    files = {name: FileEntry(**entry) for name, entry in value["files"].items()}
    return Manifest(value["step"], files, groups, value["score"])


def _tensor(entry: Mapping[str, Any]) -> TensorEntry:
    pieces = tuple(
        Piece(**{**piece, "offset": tuple(piece["offset"]), "shape": tuple(piece["shape"])})
        for piece in entry["pieces"]
    )
    return TensorEntry(entry["dtype"], tuple(entry["shape"]), pieces)


def _manifest_1(value: Mapping[str, Any]) -> Manifest:
    """A manifest of format 1, still without dtypes and shapes. Its heads are whole files."""
    files, groups = {}, {}
    for file, entry in value["files"].items():
        files[file] = FileEntry(entry["bytes"], entry["bytes"], entry["sha256"])
        if file != STATE:
            groups[file.removesuffix(TENSORS)] = {
                name: TensorEntry("", (), (Piece(file, (), (), **place),))
                for name, place in entry["tensors"].items()
            }
    return Manifest(value["step"], files, groups, format=1)


def _body_1(manifest: Manifest) -> dict[str, Any]:
    files: dict[str, Any] = {
        name: {"bytes": entry.bytes, "sha256": entry.sha256, "tensors": {}}
        for name, entry in manifest.files.items()
    }
    for name, piece in manifest.pieces():
        place = {"start": piece.start, "bytes": piece.bytes, "sha256": piece.sha256}
        files[piece.file]["tensors"][name] = place
    return {"format": 1, "step": manifest.step, "files": files}
