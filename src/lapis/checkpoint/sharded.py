"""Save and load tensors with proof. A save is written beside, flushed, read back, then renamed into place.

Several ranks write their own parts of the tensors, in files of their own; a load fills any other parts.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lapis.checkpoint import tensors
from lapis.checkpoint.folder import (
    Checkpoint,
    check_names,
    check_regions,
    clear_leftovers,
    discard,
    latest,
    read,
    retain,
    verify,
)
from lapis.checkpoint.manifest import (
    GROUP,
    MANIFEST,
    SAVING,
    STATE,
    FileEntry,
    Manifest,
    Piece,
    TensorEntry,
    file_name,
    folder_name,
    incomplete,
    render,
)
from lapis.checkpoint.piece import Box, Part, Sharded
from lapis.checkpoint.ranks import Outcome, Ranks
from lapis.checkpoint.retention import Retention
from lapis.errors import InputError, IntegrityError, LapisError
from lapis.hashing import canonical_json, digest_bytes
from lapis.storage import HELD, lock, storage_errors, sync_folder

__all__ = ["Checkpoint", "Groups", "Loaded", "Value", "latest", "load", "save"]

Value = Tensor | Sharded[Tensor]  # a plain tensor is held whole, and owned, by this rank
Groups = Mapping[str, Mapping[str, Value]]


class Loaded(NamedTuple):
    """What a checkpoint holds: tensors by group and name (on the CPU), and the JSON state."""

    groups: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


class Written(NamedTuple):
    """What one rank wrote: its files, and what it knows of the tensors, with the pieces that it owns."""

    files: dict[str, FileEntry]
    groups: dict[str, dict[str, TensorEntry]]


def save(
    folder: Path,
    step: int,
    groups: Groups,
    state: Mapping[str, Any],
    keep: Retention,
    *,
    score: float | None = None,
    ranks: Ranks | None = None,
) -> Checkpoint:
    """Commit a checkpoint of `step` below `folder`; older ones go by `keep`, after the new one was verified.

    `state` is plain JSON (no NaN); of several `ranks`, which call this together, the first one's counts, and each
    writes the parts that it owns. Every element has to be owned once (InputError naming the tensor). `score` is a
    loss. Raises StorageError (disk full), IntegrityError (the disk returned other bytes than were written),
    ConflictError (another run saves here), UnavailableError (a rank is gone): then nothing is committed, on any rank.
    """
    ranks = ranks or Ranks()
    text = canonical_json(dict(state)).encode()  # before anything is written: a bad state must cost nothing
    canonical_json(score)
    assert all(GROUP.fullmatch(group) for group in groups), "group names are lower-case words"
    with _room(folder, ranks) as temporary:
        written = ranks.gather(Outcome.of(lambda: write(temporary, groups, ranks.rank, ranks.size)))
        return ranks.decide(
            lambda: commit(temporary, step, [part.unwrap() for part in written], text, keep, score)
        )


def load(checkpoint: Checkpoint, into: Groups | None = None) -> Loaded:
    """Read a checkpoint, verifying the digest of all bytes that are used before any tensor is made of them.

    With `into`, the tensors and parts in it are filled, from whatever layout was saved, and only what they need is
    read; the returned groups are empty. Raises IntegrityError naming the file and the tensor (some of `into` may be
    filled by then), InputError for a tensor that is not there or has another shape or dtype (nothing is filled).
    """
    checkpoint = read(checkpoint.folder)
    manifest, folder = checkpoint.manifest, checkpoint.folder
    check_names(checkpoint)
    if manifest.format == 1:  # its shapes stand in the files, which have to be proved first
        check_regions(checkpoint, manifest.regions())
    state = json.loads(bytes(tensors.read(folder, manifest.files[STATE].region(STATE)).numpy()))
    with ThreadPoolExecutor(max_workers=4) as pool:
        if into is not None:
            pieces = _needed(manifest, into)
            _check_heads(checkpoint, {piece.file for _, piece, _ in pieces})
            list(pool.map(lambda item: _fill(folder, *item), pieces))
            return Loaded({}, state)
        _check_heads(checkpoint, manifest.files.keys())
        reading = {
            group: {name: pool.submit(_whole, folder, name, entry) for name, entry in entries.items()}
            for group, entries in manifest.groups.items()
        }
        return Loaded(
            {
                group: {name: made.result() for name, made in futures.items()}
                for group, futures in reading.items()
            },
            state,
        )


@contextmanager
def _room(folder: Path, ranks: Ranks) -> Iterator[Path]:
    """A new folder to write into, made by the first rank, which holds the lock until the end and clears up."""
    if not ranks.first:
        opened: Outcome[Path] = ranks.share(None)
        yield opened.unwrap()
        return
    temporary = folder / f"{SAVING}{uuid.uuid4().hex}"
    told = False
    try:
        with storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        what = f"The checkpoint folder {folder}"
        with nullcontext() if os.environ.get(HELD) else lock(folder / ".lock", what):
            clear_leftovers(folder)
            with storage_errors(folder):
                temporary.mkdir()
            told = True
            ranks.share(Outcome(temporary))
            yield temporary
    except (LapisError, OSError) as error:
        if not told:
            ranks.share(Outcome[Path](error=error))
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write(folder: Path, groups: Groups, rank: int, ranks: int) -> Written:
    """Write and verify the files of one rank. Raises StorageError, IntegrityError, InputError."""
    written = Written({}, {})
    with storage_errors(folder), ThreadPoolExecutor(max_workers=4) as pool:
        writing = {}  # a thread per file: writing and hashing release the interpreter
        for group, values in groups.items():
            held = {name: sharded(value) for name, value in values.items()}
            written.groups[group] = {
                name: TensorEntry(tensors.code_of(name, value.parts[0].data), value.shape, ())
                for name, value in held.items()
                if value.parts
            }
            shares = [
                tensors.Share(name, value.shape, part.box, part.data)
                for name, value in held.items()
                for part in value.parts
                if part.owned
            ]
            if shares:
                path = folder / file_name(group, rank, ranks)
                writing[group] = pool.submit(tensors.write, path, shares)
        for group, future in writing.items():
            name = file_name(group, rank, ranks)
            written.files[name], pieces = future.result()
            entries = written.groups[group]
            for tensor, piece in pieces:
                entries[tensor] = replace(entries[tensor], pieces=(*entries[tensor].pieces, piece))
    _verify_written(folder, Manifest(0, written.files, written.groups))
    return written


def commit(
    temporary: Path, step: int, written: Sequence[Written], state: bytes, keep: Retention, score: float | None
) -> Checkpoint:
    """Make a checkpoint of what all ranks wrote into a folder: add state and manifest, verify, rename, retain.

    Raises InputError naming a tensor that the ranks' pieces do not hold exactly once.
    """
    folder = temporary.parent
    files = {name: entry for part in written for name, entry in part.files.items()}
    files[STATE] = FileEntry(len(state), len(state), digest_bytes(state))
    manifest = Manifest(step, files, _joined([part.groups for part in written]), score)
    if fault := incomplete(manifest):
        raise InputError(f"The checkpoint of step {step} is refused: {fault}.")
    with storage_errors(folder):
        _write_bytes(temporary / STATE, state)
        _write_bytes(temporary / MANIFEST, render(manifest).encode())
        sync_folder(temporary)
        _verify_written(temporary, replace(manifest, files={STATE: files[STATE]}, groups={}))
        if (temporary / MANIFEST).read_bytes() != render(manifest).encode():
            raise IntegrityError(f"{MANIFEST} came back from the disk with other bytes than were written.")
        target = folder / folder_name(manifest)
        _place(temporary, target)
    checkpoint = Checkpoint(target, manifest)
    retain(folder, checkpoint, keep)
    return checkpoint


def _joined(ranks: Sequence[Mapping[str, Mapping[str, TensorEntry]]]) -> dict[str, dict[str, TensorEntry]]:
    """The whole tensors: every rank's pieces together. Raises InputError if two ranks mean different tensors."""
    found: dict[str, dict[str, list[TensorEntry]]] = {}
    for groups in ranks:
        for group, entries in groups.items():
            known = found.setdefault(group, {})
            for name, entry in entries.items():
                known.setdefault(name, []).append(entry)
    return {
        group: {name: _whole_entry(f"{name} of {group}", entries) for name, entries in known.items()}
        for group, known in found.items()
    }


def _whole_entry(name: str, entries: Sequence[TensorEntry]) -> TensorEntry:
    kinds = {(entry.dtype, entry.shape) for entry in entries}
    if len(kinds) > 1:
        raise InputError(f"The ranks mean different tensors by {name}: {sorted(kinds)}.")
    pieces = [piece for entry in entries for piece in entry.pieces]
    return replace(entries[0], pieces=tuple(sorted(pieces, key=lambda piece: (piece.offset, piece.file))))


def sharded(value: Value) -> Sharded[Tensor]:
    """A value with its parts: those of a plain tensor are one, the whole."""
    if isinstance(value, Sharded):
        return value
    shape = tuple(value.shape)
    return Sharded(shape, (Part(Box.whole(shape), value),))


def _write_bytes(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _verify_written(folder: Path, manifest: Manifest) -> None:
    try:
        check_regions(Checkpoint(folder, manifest), manifest.regions(), from_disk=True)
    except IntegrityError as error:
        raise IntegrityError(
            f"What was written came back from the disk with other bytes: {error.message}",
            hint="It was not committed; the older ones stay. Check this machine's disk and memory.",
        ) from error


def _place(temporary: Path, target: Path) -> None:
    """Rename a verified folder into place. One of that name holds the same bytes, unless damaged since."""
    if target.exists():
        try:
            verify(read(target))
            return
        except IntegrityError:
            discard(target)
    os.rename(temporary, target)
    sync_folder(target.parent)


def _check_heads(checkpoint: Checkpoint, files: Iterable[str]) -> None:
    heads = [checkpoint.manifest.files[name].region(name) for name in sorted(files)]
    check_regions(checkpoint, heads)


def _needed(manifest: Manifest, into: Groups) -> list[tuple[str, Piece, Sharded[Tensor]]]:
    """The pieces that have elements of the wanted parts, each with its tensor's name and those parts."""
    needed = []
    for group, values in into.items():
        entries = manifest.groups.get(group, {})
        for name, value in values.items():
            wanted = sharded(value)
            if name not in entries:
                raise InputError(
                    f"The checkpoint has no tensor {name} in {group}: it is of another model.", hint=_OTHER
                )
            entry = entries[name]
            dtypes = {part.data.dtype for part in wanted.parts} - {tensors.DTYPES[entry.dtype]}
            if wanted.shape != entry.shape or dtypes:
                dtype = f" {tensors.CODES[dtypes.pop()]}" if dtypes else ""
                raise InputError(
                    f"The tensor {name} of {group} is {entry.dtype} {entry.shape} in the checkpoint, "
                    f"not{dtype} {wanted.shape}.",
                    hint=_OTHER,
                )
            boxes = [part.box for part in wanted.parts]
            needed += [
                (name, piece, wanted)
                for piece in entry.pieces
                if any(piece.box.intersection(box) for box in boxes)
            ]
    return needed


_OTHER = "Give the recipe another name, so that it becomes a run of its own."


def _fill(folder: Path, name: str, piece: Piece, wanted: Sharded[Tensor]) -> None:
    """Copy what a piece has of the wanted parts, after its bytes were verified."""
    data: Tensor | None = None
    for part in wanted.parts:
        both = piece.box.intersection(part.box)
        if both is None:
            continue
        if data is None:
            data = tensors.read(folder, piece.region(name)).view(part.data.dtype).reshape(piece.shape)
        part.data.detach()[both.inside(part.box)].copy_(data[both.inside(piece.box)])


def _whole(folder: Path, name: str, entry: TensorEntry) -> Tensor:
    """A whole tensor. The verified buffer is the memory that it uses, so nothing can change in between."""
    dtype = tensors.DTYPES[entry.dtype]
    if len(entry.pieces) == 1:
        piece = entry.pieces[0]
        return tensors.read(folder, piece.region(name)).view(dtype).reshape(piece.shape)
    whole = torch.empty(entry.shape, dtype=dtype)
    for piece in entry.pieces:
        _fill(folder, name, piece, sharded(whole))
    return whole
