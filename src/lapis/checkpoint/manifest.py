"""What a checkpoint is on disk, decided without touching a disk: layout, digests, the commit rule, retention.

    checkpoints/
      step-00000100-3f9a0c1b2d4e/     committed: the name carries the step and the start of the digest
        model.safetensors             one file per group of tensors
        optimizer.safetensors
        state.json                    everything that is not a tensor
        manifest.json                 digest and size of each file, digest and place of each tensor
      .saving-…, .removing-…          left behind by a killed process; the next save clears them

The manifest carries its own digest too. Commit rule: a folder gets its `step-…` name, by one rename, only
after its files were flushed to disk and read back with the right digests. So whatever has such a name was
whole once, and what has not never counts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from lapis.errors import InputError, IntegrityError
from lapis.hashing import digest_json

FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.json"
TENSORS = ".safetensors"
SAVING = ".saving-"
REMOVING = ".removing-"

GROUP = re.compile(r"[a-z][a-z0-9_]*")
FOLDER = re.compile(r"step-(\d{8,})-([0-9a-f]{12})")
SHA256 = re.compile(r"[0-9a-f]{64}")


class Name(NamedTuple):
    """What the name of a committed folder says."""

    step: int
    digest: str  # the first 12 digits of the manifest's digest


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor's bytes lie in its file, and their SHA-256."""

    start: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class FileEntry:
    """A file's size and SHA-256, and the tensors in it (none in state.json)."""

    bytes: int
    sha256: str
    tensors: Mapping[str, TensorEntry]


@dataclass(frozen=True)
class Manifest:
    """The list of everything in a checkpoint."""

    step: int
    files: Mapping[str, FileEntry]

    @property
    def digest(self) -> str:
        """SHA-256 over step, files and tensors: equal checkpoints have equal digests, on any machine."""
        return digest_json(_body(self))

    @property
    def bytes(self) -> int:
        """Size of all files, without the manifest itself."""
        return sum(entry.bytes for entry in self.files.values())


def folder_name(manifest: Manifest) -> str:
    """The name that a checkpoint is committed under."""
    return f"step-{manifest.step:08d}-{manifest.digest[:12]}"


def parse_name(name: str) -> Name | None:
    """Step and digest in the name of a committed folder; None for every other name."""
    match = FOLDER.fullmatch(name)
    return Name(int(match[1]), match[2]) if match else None


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
    if value.get("format") != FORMAT:
        raise InputError(
            f"The checkpoint {name} has format {value.get('format')!r}; this Lapis reads format {FORMAT}.",
            hint="Use the version of Lapis that wrote it, or a newer one.",
        )
    manifest = _manifest(value)
    promised = parse_name(name)
    if render(manifest).encode() != raw or promised != Name(manifest.step, manifest.digest[:12]):
        raise IntegrityError(f"{name}/{MANIFEST} does not match the name of its folder.", hint=_OTHERS)
    return manifest


def superseded(committed: Iterable[str], new: str, keep: int) -> list[str]:
    """The folders that may go once `new` is committed, oldest first.

    Kept are `new` and the `keep - 1` nearest before it. Others at or past its step belong to a future that
    the run has left (it went on from an older checkpoint), so they go too: the highest step is the newest.
    """
    assert keep >= 1, "at least the new checkpoint is kept"
    here = parse_name(new)
    assert here is not None
    others = sorted((parsed, name) for name in committed if name != new and (parsed := parse_name(name)))
    past = [name for parsed, name in others if parsed.step < here.step]
    kept = past[max(0, len(past) - keep + 1) :]
    return [name for _, name in others if name not in kept]


_OTHERS = "Resuming the run goes on from the newest checkpoint that is whole: `lapis runs show` lists them."


def _body(manifest: Manifest) -> dict[str, Any]:
    files = {name: asdict(entry) for name, entry in manifest.files.items()}
    return {"format": FORMAT, "step": manifest.step, "files": files}


def _manifest(value: Mapping[str, Any]) -> Manifest:
    files = {}
    for name, entry in value["files"].items():
        tensors = {tensor: TensorEntry(**place) for tensor, place in entry["tensors"].items()}
        files[name] = FileEntry(entry["bytes"], entry["sha256"], tensors)
    return Manifest(value["step"], files)
