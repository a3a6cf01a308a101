"""Token shards: the prepared dataset on disk, and the table from a token to its document and licence.

A dataset folder (format 1) holds
    manifest.json                what there is, with the SHA-256 of every file, and its own digest
    shard-NNNNN.tokens           token ids, little-endian, uint16 or uint32; a document is `end_id d1 … dn`
    shard-NNNNN.starts           int64: where each document starts in the shard
    shard-NNNNN.documents.jsonl  one line a document: id, source, path, licence, kind, bytes, tokens
    heldout.jsonl                the held-out documents with their text
    removed.jsonl                one line a document that was removed from the dataset that this one was made of, if any
    tokenizer.json               the tokenizer
    report.json                  the steps, with times: not part of the digest, as are
    report.html, croissant.json  the same and more for people (page.py), and for machines (croissant.py)
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lapis.data.document import Document
from lapis.data.licences import families
from lapis.data.report import Step, read_report
from lapis.errors import InputError, IntegrityError
from lapis.hashing import digest_file, digest_json
from lapis.storage import atomic_file, write_text
from lapis.tokenizer.bpe import Tokenizer

FORMAT = 1
ENCODE_CHARS = 1 << 20
SHARD_FILES = ("tokens", "starts", "documents.jsonl")


@dataclass(frozen=True)
class DocumentEntry:
    """Where a stretch of tokens comes from. `start` counts in the dataset's training stream."""

    id: str
    source: str
    path: str
    licence: str
    kind: str
    bytes: int
    tokens: int
    start: int = 0


def token_type(vocab_size: int) -> str:
    """The smallest integer that holds every id: "uint16" or "uint32"."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def write_shard(
    folder: Path, number: int, documents: Iterable[Document], tokenizer: Tokenizer
) -> dict[str, Any]:
    """Encode documents into one shard; returns its entry for the manifest."""
    name = f"shard-{number:05d}"
    width = np.dtype(token_type(tokenizer.vocab_size)).newbyteorder("<")
    starts: list[int] = []
    tokens = size = 0
    table: dict[str, list[int]] = {}
    with (
        atomic_file(folder / f"{name}.tokens", name_later=True) as ids_file,
        atomic_file(folder / f"{name}.documents.jsonl", name_later=True) as entries_file,
    ):
        for batch in _batches(documents):
            ids, ends = tokenizer.encode_stream([document.text for document in batch])
            ids_file.write(ids.astype(width).tobytes())
            for document, count in zip(batch, np.diff(ends, prepend=0).tolist(), strict=True):
                entry = _entry(document, count)
                starts.append(tokens)
                tokens += entry.tokens
                size += entry.bytes
                entries_file.write(entry_line(entry))
                count_entry(table, entry)
    with atomic_file(folder / f"{name}.starts", name_later=True) as file:
        file.write(np.array(starts, dtype="<i8").tobytes())
    counts = {"documents": len(starts), "tokens": tokens, "bytes": size}
    return {"name": name, **counts, "sha256": shard_digests(folder, name), "licences": table}


def shard_digests(folder: Path, name: str) -> dict[str, str]:
    """The SHA-256 of each file of a shard."""
    return {ending: digest_file(folder / f"{name}.{ending}") for ending in SHARD_FILES}


def entry_line(entry: DocumentEntry) -> bytes:
    """A document's line in the table of its shard."""
    line = {key: value for key, value in vars(entry).items() if key != "start"}
    return json.dumps(line, ensure_ascii=False).encode() + b"\n"


def count_entry(table: dict[str, list[int]], entry: DocumentEntry) -> None:
    """Count a document in a shard's table of sources and licences."""
    counts = table.setdefault(json.dumps([entry.source, entry.licence]), [0, 0, 0])
    counts[0] += 1
    counts[1] += entry.bytes
    counts[2] += entry.tokens


def write_heldout(folder: Path, documents: Iterable[Document]) -> dict[str, Any]:
    """Write the held-out documents; returns their entry for the manifest."""
    count = size = 0
    path = folder / "heldout.jsonl"
    with atomic_file(path) as file:
        for document in documents:
            count += 1
            size += len(document.text.encode())
            file.write(json.dumps(asdict(document), ensure_ascii=False).encode() + b"\n")
    return {"documents": count, "bytes": size, "sha256": digest_file(path)}


def write_manifest(
    folder: Path,
    tokenizer: Tokenizer,
    shards: Sequence[dict[str, Any]],
    heldout: dict[str, Any],
    policy: Mapping[str, Any] | None = None,
    lineage: Mapping[str, Any] | None = None,
) -> None:
    """Write tokenizer.json and manifest.json of a dataset whose other files are there.

    `policy` is what was decided about licences, personal data and evaluation sets; `lineage` names the dataset that
    this one was made from by leaving something out, and what that was.
    """
    tokenizer.save(folder / "tokenizer.json")
    manifest: dict[str, Any] = {
        **(lineage or {}),
        "format": FORMAT,
        "token_type": token_type(tokenizer.vocab_size),
        "tokens": sum(shard["tokens"] for shard in shards),
        "documents": sum(shard["documents"] for shard in shards),
        "bytes": sum(shard["bytes"] for shard in shards),
        "tokenizer": {
            "digest": tokenizer.digest,
            "vocab_size": tokenizer.vocab_size,
            "end_id": tokenizer.end_id,
            "sha256": digest_file(folder / "tokenizer.json"),
        },
        "heldout": heldout,
        "licences": _licences(shards),
        "policy": policy or {},
        "shards": [{key: value for key, value in shard.items() if key != "licences"} for shard in shards],
    }
    manifest["digest"] = _digest(manifest)
    text = json.dumps(manifest, indent=1, sort_keys=True, ensure_ascii=False)
    write_text(folder / "manifest.json", text + "\n")


class Dataset:
    """A prepared dataset. Its training tokens are one stream over all shards."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.manifest = manifest
        self.tokens: int = manifest["tokens"]
        self._firsts = list(accumulate((shard["tokens"] for shard in manifest["shards"]), initial=0))
        width = np.dtype(manifest["token_type"]).newbyteorder("<")
        self._maps = [
            np.asarray(np.memmap(folder / f"{shard['name']}.tokens", dtype=width, mode="r"))
            for shard in manifest["shards"]
        ]

    @staticmethod
    def open(folder: Path) -> Dataset:
        """Open a dataset and check every file against its digest. Raises IntegrityError, InputError."""
        path = folder / "manifest.json"
        if not path.is_file():
            raise InputError(
                f"{folder} is no prepared dataset: it has no manifest.json.",
                hint="`lapis data prepare RECIPE.toml` makes one and prints where it lies.",
            )
        try:
            manifest = json.loads(path.read_bytes())
            if manifest["format"] != FORMAT:
                raise InputError(
                    f"{folder} has format {manifest['format']}; this version reads {FORMAT}.",
                    hint="Use the version of Lapis that made it, or prepare the data again: lapis data prepare RECIPE",
                )
            if manifest["digest"] != _digest(manifest):
                raise IntegrityError(f"{path} does not match its own digest.", hint=_again(folder))
            files = _files(manifest)
        except (ValueError, KeyError, TypeError) as error:
            raise IntegrityError(f"{path} is damaged: {error!r}.", hint=_again(folder)) from error
        for name, digest in files.items():
            if not (folder / name).is_file():
                raise IntegrityError(f"{folder / name} is missing.", hint=_again(folder))
            if digest_file(folder / name) != digest:
                raise IntegrityError(f"{folder / name} does not match its digest.", hint=_again(folder))
        return Dataset(folder, manifest)

    @property
    def digest(self) -> str:
        """The digest of the manifest: it covers every byte of the dataset but the report's."""
        return str(self.manifest["digest"])

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the tokens."""
        return Tokenizer.load(self.folder / "tokenizer.json")

    def read(self, start: int, count: int) -> NDArray[np.unsignedinteger[Any]]:
        """`count` tokens of the training stream from `start` on. Raises InputError outside of it."""
        found = np.empty(max(count, 0), dtype=self.manifest["token_type"])
        self.fill(start, found)
        return found

    def fill(self, start: int, out: NDArray[Any]) -> None:
        """Write the tokens of the training stream from `start` on into an array. Raises InputError outside of it."""
        count = len(out)
        if not 0 <= start <= start + count <= self.tokens:
            raise InputError(
                f"Tokens {start} to {start + count} are not within the {self.tokens} of the dataset."
            )
        shard, done = bisect_right(self._firsts, start) - 1, 0
        while done < count:
            offset = start + done - self._firsts[shard]
            part = self._maps[shard][offset : offset + count - done]
            out[done : done + len(part)] = part
            done, shard = done + len(part), shard + 1

    @cached_property
    def document_starts(self) -> NDArray[np.int64]:
        """Where each training document starts in the stream; each begins with the end token."""
        starts = [
            np.fromfile(self.folder / f"{shard['name']}.starts", dtype="<i8") + first
            for shard, first in zip(self.manifest["shards"], self._firsts[:-1], strict=True)
        ]
        return np.concatenate([np.empty(0, dtype=np.int64), *starts])

    def document_of(self, token: int) -> DocumentEntry:
        """The document that a token of the stream belongs to: source, path, licence."""
        if not 0 <= token < self.tokens:
            raise InputError(f"Token {token} is not within the {self.tokens:,} there are.")
        shard = bisect_right(self._firsts, token) - 1
        first = self._firsts[shard]
        name = self.manifest["shards"][shard]["name"]
        starts = np.fromfile(self.folder / f"{name}.starts", dtype="<i8")
        place = int(np.searchsorted(starts, token - first, side="right")) - 1
        with (self.folder / f"{name}.documents.jsonl").open(encoding="utf-8") as lines:
            line = next(line for n, line in enumerate(lines) if n == place)
        return DocumentEntry(**json.loads(line), start=first + int(starts[place]))

    def documents_of(self, shard: int) -> Iterator[DocumentEntry]:
        """The documents of one shard, in their order."""
        first, name = int(self._firsts[shard]), self.manifest["shards"][shard]["name"]
        starts = np.fromfile(self.folder / f"{name}.starts", dtype="<i8").tolist()
        with (self.folder / f"{name}.documents.jsonl").open(encoding="utf-8") as lines:
            for start, line in zip(starts, lines, strict=True):
                yield DocumentEntry(**json.loads(line), start=first + start)

    def heldout(self) -> list[Document]:
        """The held-out documents, with their text."""
        with (self.folder / "heldout.jsonl").open(encoding="utf-8") as lines:
            return [Document(**json.loads(line)) for line in lines]

    @cached_property
    def report(self) -> list[Step]:
        """What each step took in, let through and dropped."""
        return read_report(self.folder)


def _again(folder: Path) -> str:
    return f"Remove the folder and prepare the data again: rm -r {folder}"


def _batches(documents: Iterable[Document]) -> Iterable[list[Document]]:
    batch: list[Document] = []
    chars = 0
    for document in documents:
        batch.append(document)
        chars += len(document.text)
        if chars >= ENCODE_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _entry(document: Document, tokens: int) -> DocumentEntry:
    size = len(document.text.encode())
    return DocumentEntry(
        document.id, document.source, document.path, document.licence, document.kind, size, tokens
    )


def _digest(manifest: dict[str, Any]) -> str:
    return digest_json({key: value for key, value in manifest.items() if key != "digest"})


def _licences(shards: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """How many documents, bytes and tokens each source gives under each licence."""
    table: dict[str, list[int]] = {}
    for shard in shards:
        for key, counts in shard["licences"].items():
            table[key] = [a + b for a, b in zip(table.get(key, [0, 0, 0]), counts, strict=True)]
    names = ("source", "licence", "documents", "bytes", "tokens")
    rows = [dict(zip(names, (*json.loads(key), *table[key]), strict=True)) for key in sorted(table)]
    return [{**row, "family": families(row["licence"])} for row in rows]


def _files(manifest: dict[str, Any]) -> dict[str, str]:
    """Every file that the manifest vouches for, with its digest."""
    files = {
        "tokenizer.json": manifest["tokenizer"]["sha256"],
        "heldout.jsonl": manifest["heldout"]["sha256"],
    }
    if "removed" in manifest:
        files["removed.jsonl"] = manifest["removed"]["sha256"]
    for shard in manifest["shards"]:
        files |= {f"{shard['name']}.{ending}": digest for ending, digest in shard["sha256"].items()}
    return files
