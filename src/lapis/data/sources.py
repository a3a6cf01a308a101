"""Sources to inputs: which files a recipe means, what is in them, and in which order they are taken.

The order is that of the digests of the files' names, so it does not depend on how a folder or a recipe lists
them, and a limit on bytes takes a fair sample.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from lapis.data.environment import environment_files
from lapis.data.recipe import DataConfig, SourceConfig
from lapis.data.report import Step
from lapis.errors import InputError, nearest
from lapis.log import Progress, silent

Reader = Literal["text", "jsonl", "parquet", "html", "warc"]

READERS: dict[str, Reader] = {
    ".parquet": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".html": "html",
    ".htm": "html",
    ".xhtml": "html",
    ".warc": "warc",
}
COMPRESSIONS = frozenset({".gz", ".zst"})
SKIPPED_FOLDERS = frozenset({"__pycache__", "node_modules"})
SNIFFED = 8192
BOMS = (b"\xff\xfe", b"\xfe\xff")  # UTF-16; UTF-32 little-endian begins like the first


@dataclass(frozen=True, slots=True)
class Input:
    """One file to read. `name` is its path inside the source; `digest` the SHA-256 of its bytes."""

    source: SourceConfig
    name: str
    path: str
    size: int
    digest: str
    reader: Reader
    licence: str

    @property
    def identity(self) -> list[Any]:
        """What the documents read from this file depend on."""
        settings = self.source
        columns = [settings.text_column, settings.licence_column, settings.kind_column]
        kind = [settings.text_kind, settings.priority]
        return [settings.name, self.name, self.digest, self.reader, self.licence, columns, kind]


@dataclass
class Listing:
    """The files to read, in their order, and a row of the report with those that cannot be used."""

    inputs: list[Input] = field(default_factory=list)
    step: Step = field(default_factory=lambda: Step("list"))


@dataclass(frozen=True, slots=True)
class _Candidate:
    source: SourceConfig
    name: str
    path: Path
    licence: str

    @property
    def order(self) -> tuple[bytes, str, str]:
        key = f"{self.source.name}\0{self.name}"
        return hashlib.sha256(key.encode()).digest(), key, str(self.path)


def list_inputs(config: DataConfig, progress: Progress = silent) -> Listing:
    """All inputs of a recipe. Raises InputError if a source is not there or has no text at all."""
    sources = [named(source) for source in config.sources]
    _check_names(sources)
    candidates = [found for source in sources for found in _candidates(source)]
    candidates.sort(key=lambda candidate: candidate.order)
    listing = Listing()
    taken = 0
    for n, candidate in enumerate(candidates):
        if config.max_bytes and taken >= config.max_bytes:
            listing.step.note("files beyond max_bytes", len(candidates) - n)
            break
        progress(n, len(candidates), f"{n:,} of {len(candidates):,} files listed")
        found = _inspect(candidate, listing.step)
        if found is not None:
            taken += found.size
            listing.inputs.append(found)
    if not listing.inputs:
        where = ", ".join(source.path or source.kind for source in config.sources)
        raise InputError(
            f"There is no text in {where}: {listing.step.top_reasons()}.",
            hint="Point a source at text, source code, JSON lines, parquet, HTML or WARC files.",
        )
    return listing


def named(source: SourceConfig) -> SourceConfig:
    """The same source with its name filled in."""
    if source.name:
        return source
    name = source.kind if source.kind == "environment" else Path(source.path).expanduser().absolute().name
    return source.model_copy(update={"name": name or "root"})


def inner_ending(name: str) -> str:
    """A file's ending without that of a compression: `.jsonl` for `a.jsonl.zst`."""
    path = PurePosixPath(name)
    return (
        PurePosixPath(path.stem).suffix.lower()
        if path.suffix.lower() in COMPRESSIONS
        else path.suffix.lower()
    )


def looks_binary(block: bytes) -> bool:
    """Whether a file that begins so is no text."""
    if block.startswith(BOMS):
        return False
    if b"\0" in block:
        return True
    text = block.decode("utf-8", errors="replace")
    return text.count("\ufffd") > 0.3 * len(text)


def _check_names(sources: list[SourceConfig]) -> None:
    priorities: dict[str, int] = {}
    for source in sources:
        if priorities.setdefault(source.name, source.priority) != source.priority:
            raise InputError(
                f"Two sources are called {source.name!r} and have different priorities.",
                hint='Give each [[data.sources]] a name of its own: name = "…"',
            )


def _candidates(source: SourceConfig) -> Iterator[_Candidate]:
    if source.kind == "environment":
        for name, path, licence in environment_files():
            yield _Candidate(source, name, path, source.licence or licence)
        return
    root = Path(source.path).expanduser()
    if not root.exists():
        siblings = [entry.name for entry in root.parent.iterdir()] if root.parent.is_dir() else []
        raise InputError(f"There is no file or folder {source.path}.", hint=nearest(root.name, siblings))
    if not root.is_dir():
        yield _Candidate(source, root.name, root, source.licence)
        return
    found = False
    for path in _walk(root, top=True):
        found = True
        name = os.fsencode(path.relative_to(root)).decode("utf-8", errors="replace")
        yield _Candidate(source, name, path, source.licence)
    if not found:
        raise InputError(
            f"The folder {source.path} holds no files.",
            hint="Hidden files and folders, __pycache__ and node_modules are not entered.",
        )


def _walk(folder: Path, top: bool = False) -> Iterator[Path]:
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        if top:
            raise InputError(f"The folder {folder} cannot be read: {error.strerror}.") from error
        yield folder  # shows up as unreadable
        return
    for entry in entries:
        if entry.name.startswith(".") or entry.name in SKIPPED_FOLDERS:
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(Path(entry.path))
        else:
            yield Path(entry.path)


def _inspect(candidate: _Candidate, step: Step) -> Input | None:
    step.documents_in += 1
    label = f"{candidate.source.name}: {candidate.name}"
    reader = _reader(candidate)
    path = candidate.path
    try:
        if not path.is_file():
            step.drop("unreadable", label)
            return None
        with path.open("rb") as file:
            begin = file.read(SNIFFED)
            size = os.fstat(file.fileno()).st_size
            step.bytes_in += size
            if not begin:
                step.drop("empty", label)
                return None
            packed = path.suffix.lower() in COMPRESSIONS
            if reader == "text" and not packed and looks_binary(begin):
                step.drop("binary", label)
                return None
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        step.drop("unreadable", label)
        return None
    if reader == "parquet" and begin[:4] != b"PAR1":
        if path == Path(candidate.source.path).expanduser():
            raise InputError(f"{path} is no parquet file: it does not begin with PAR1.")
        step.drop("no parquet", label)
        return None
    step.keep(size)
    return Input(candidate.source, candidate.name, str(path), size, digest, reader, candidate.licence)


def _reader(candidate: _Candidate) -> Reader:
    if candidate.source.format != "auto":
        return candidate.source.format
    return READERS.get(inner_ending(candidate.name), "text")
