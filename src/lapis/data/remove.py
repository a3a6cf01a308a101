"""Removing documents: new shards without them, and a list by which later datasets leave them out too.

A dataset is never changed. The new one lies beside it, with hard links to the shards that are the same. Its manifest
names the dataset it comes from (`parent`) and what was left out (`removed`); removed.jsonl lists that by document.
The list is `$LAPIS_HOME/data/removed.json`: what is in it, and for each dataset which one stands for it now.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lapis.data.document import Document
from lapis.data.report import Step
from lapis.data.shards import (
    SHARD_FILES,
    Dataset,
    DocumentEntry,
    count_entry,
    entry_line,
    shard_digests,
    write_heldout,
    write_manifest,
)
from lapis.data.stage import Stage
from lapis.errors import InputError, IntegrityError
from lapis.hashing import digest_bytes, digest_json
from lapis.storage import atomic_file, atomic_folder, lock, write_text

VERSION = 1  # raise it when the same removal gives other bytes
LIST = "removed.json"


@dataclass(frozen=True)
class Removal:
    """Which documents are left out: those of which all that is given here is true."""

    source: str | None = None
    document: str | None = None  # the digest of a text: every copy of it
    licence: str | None = None

    def covers(self, document: DocumentEntry | Document) -> bool:
        """Whether a document is left out by this."""
        asked = (
            (self.source, document.source),
            (self.document, document.id),
            (self.licence, document.licence),
        )
        return all(wanted is None or wanted == value for wanted, value in asked)


@dataclass(frozen=True)
class Found:
    """What removals cover in a dataset."""

    shards: dict[str, list[DocumentEntry]]  # by the names of the shards that have some
    heldout: list[Document]

    def __bool__(self) -> bool:
        return bool(self.shards or self.heldout)

    @property
    def documents(self) -> list[DocumentEntry]:
        """The training documents."""
        return [entry for entries in self.shards.values() for entry in entries]


def search(dataset: Dataset, removals: Sequence[Removal]) -> Found:
    """The documents of a dataset that removals cover."""
    shards = {}
    for number, shard in enumerate(dataset.manifest["shards"]):
        found = [entry for entry in dataset.documents_of(number) if covered(entry, removals)]
        if found:
            shards[shard["name"]] = found
    return Found(shards, [document for document in dataset.heldout() if covered(document, removals)])


def without(dataset: Dataset, found: Found, root: Path) -> Dataset:
    """The dataset without these documents, made below `root` if it is not there.

    Raises InputError if nothing would be left.
    """
    lines = sorted([*_removed_lines(found), *_removed_before(dataset)])
    origin = dataset.manifest.get("parent", dataset.digest)
    facts = {"parent": origin, "removed": digest_json([line.decode() for line in lines])}
    stage = Stage.of(root, "tokens", VERSION, facts)
    if len(found.documents) == dataset.manifest["documents"]:
        raise InputError(
            f"Nothing would be left of {dataset.folder}.",
            hint="Remove the dataset itself instead: rm -r FOLDER",
        )
    if not stage.done:
        with stage.making(), atomic_folder(stage.folder) as folder:
            _write(dataset, found, lines, origin, folder)
    return Dataset.open(stage.folder)


class RemovalList:
    """What is to be left out of every dataset of a home."""

    def __init__(self, root: Path) -> None:
        self.root, self.path = root, root / LIST

    def removals(self) -> tuple[Removal, ...]:
        """What is on the list. Raises IntegrityError if it cannot be read."""
        return self._read()[0]

    def add(self, removals: Sequence[Removal]) -> None:
        """Put removals on the list."""
        with self._changing() as (known, standing):
            self._write((*known, *(one for one in removals if one not in known)), standing)

    def stands_for(self, name: str) -> Dataset | None:
        """The dataset that stands for the one of this folder's name now; None if it begins with that one itself.

        So a dataset that was deleted because of what is in it is not made again.
        """
        removals, standing = self._read()
        entry = standing.get(name)
        if entry is None or not (self.root / entry["folder"] / "manifest.json").is_file():
            return None
        if any(one not in _plain(removals) for one in entry["removals"]):
            return None  # something was taken off the list
        dataset = Dataset.open(self.root / entry["folder"])
        return dataset if entry["removals"] == _plain(removals) else self.apply(dataset)

    def apply(self, dataset: Dataset) -> Dataset:
        """The dataset without what is on the list: itself, if nothing of it is in there."""
        removals = self.removals()
        if not removals:
            return dataset
        found = search(dataset, removals)
        result = without(dataset, found, self.root) if found else dataset
        with self._changing() as (known, standing):
            entry = {"folder": result.folder.name, "removals": _plain(removals)}
            replaced = {name: entry for name, old in standing.items() if old["folder"] == dataset.folder.name}
            self._write(
                known, {**standing, **replaced, dataset.folder.name: entry, result.folder.name: entry}
            )
        return result

    def _read(self) -> tuple[tuple[Removal, ...], dict[str, dict[str, Any]]]:
        if not self.path.is_file():
            return (), {}
        try:
            values = json.loads(self.path.read_bytes())
            return tuple(Removal(**one) for one in values["removals"]), dict(values["datasets"])
        except (ValueError, KeyError, TypeError) as error:
            raise IntegrityError(
                f"The list of what is left out of data, {self.path}, is damaged: {error!r}.",
                hint="Restore it from a copy. Removing it lets all of that into new datasets again.",
            ) from error

    def _write(self, removals: Sequence[Removal], datasets: dict[str, Any]) -> None:
        values = {"removals": _plain(removals), "datasets": datasets}
        write_text(self.path, json.dumps(values, indent=1, ensure_ascii=False) + "\n")

    @contextmanager
    def _changing(self) -> Iterator[tuple[tuple[Removal, ...], dict[str, dict[str, Any]]]]:
        with lock(self.root / ".locks" / LIST, "The list of what is left out of data"):
            yield self._read()


def _plain(removals: Sequence[Removal]) -> list[dict[str, str]]:
    return [{key: value for key, value in asdict(one).items() if value is not None} for one in removals]


def covered(document: DocumentEntry | Document, removals: Sequence[Removal]) -> bool:
    """Whether a document is left out by one of some removals."""
    return any(removal.covers(document) for removal in removals)


def _removed_lines(found: Found) -> Iterator[bytes]:
    for entry in found.documents:
        yield entry_line(entry)
    for document in found.heldout:
        yield entry_line(
            DocumentEntry(
                document.id,
                document.source,
                document.path,
                document.licence,
                document.kind,
                len(document.text.encode()),
                0,  # held out: none were trained on
            )
        )


def _removed_before(dataset: Dataset) -> list[bytes]:
    path = dataset.folder / "removed.jsonl"
    return path.read_bytes().splitlines(keepends=True) if "removed" in dataset.manifest else []


def _write(dataset: Dataset, found: Found, lines: Sequence[bytes], origin: str, folder: Path) -> None:
    shards = []
    for number, shard in enumerate(dataset.manifest["shards"]):
        gone = {entry.start for entry in found.shards.get(shard["name"], ())}
        kept = [entry for entry in dataset.documents_of(number) if entry.start not in gone]
        if kept:
            shards.append(_write_shard(dataset, shard, kept, bool(gone), folder))
    dropped = {(one.id, one.source, one.path) for one in found.heldout}
    held = [one for one in dataset.heldout() if (one.id, one.source, one.path) not in dropped]
    heldout = write_heldout(folder, held)
    with atomic_file(folder / "removed.jsonl") as file:
        file.writelines(lines)
    entries = [json.loads(line) for line in lines]
    lineage = {
        "parent": origin,
        "removed": {
            "documents": len(entries),
            "tokens": sum(entry["tokens"] for entry in entries),
            "sha256": digest_bytes(b"".join(lines)),
        },
    }
    policy = dataset.manifest.get("policy", {})
    write_manifest(folder, dataset.tokenizer, shards, heldout, policy, lineage)
    step = Step("remove", documents_in=dataset.manifest["documents"], bytes_in=dataset.manifest["bytes"])
    for entry in found.documents:
        step.drop("removed on request", f"{entry.source}: {entry.path}")
    step.documents_out = sum(shard["documents"] for shard in shards)
    step.bytes_out = sum(shard["bytes"] for shard in shards)
    step.note("held out, removed", len(found.heldout))
    rows = [one.plain() for one in (*dataset.report, step)]
    write_text(folder / "report.json", json.dumps(rows, indent=1, ensure_ascii=False))


def _write_shard(
    dataset: Dataset, shard: dict[str, Any], kept: Sequence[DocumentEntry], changed: bool, folder: Path
) -> dict[str, Any]:
    """One shard of the new dataset; returns its entry for the manifest."""
    name = shard["name"]
    table: dict[str, list[int]] = {}
    for entry in kept:
        count_entry(table, entry)
    if not changed:
        for ending in SHARD_FILES:
            _link(dataset.folder / f"{name}.{ending}", folder / f"{name}.{ending}")
        return {**shard, "licences": table}
    with atomic_file(folder / f"{name}.tokens") as file:
        for entry in kept:
            file.write(dataset.read(entry.start, entry.tokens).tobytes())
    with atomic_file(folder / f"{name}.documents.jsonl") as file:
        file.writelines(entry_line(entry) for entry in kept)
    sizes = [entry.tokens for entry in kept]
    with atomic_file(folder / f"{name}.starts") as file:
        file.write(np.cumsum([0, *sizes[:-1]]).astype("<i8").tobytes())
    counts = {"documents": len(kept), "tokens": sum(sizes), "bytes": sum(entry.bytes for entry in kept)}
    return {"name": name, **counts, "sha256": shard_digests(folder, name), "licences": table}


def _link(source: Path, target: Path) -> None:
    """The same file under another name; a copy where the file system has no such names."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
