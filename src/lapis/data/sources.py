"""Sources to inputs: which files a recipe means, what is in them, and in which order they are taken.

The order is that of the digests of the files' names, so it does not depend on how a folder or a recipe lists
them, and a limit on bytes takes a fair sample.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from lapis.data.environment import environment_files
from lapis.data.input import Input, Reader
from lapis.data.places import Place, local_places, remote_places
from lapis.data.readers import READERS, packages_of
from lapis.data.recipe import DataConfig, SourceConfig
from lapis.data.report import Step
from lapis.data.saved_datasets import SavedDatasets, saved_datasets
from lapis.data.source_tree import LICENCE_BYTES, is_licence_file, left_out, licence_of_file, licence_of_text
from lapis.data.text_files import COMPRESSIONS, SNIFFED, ending, inner_ending, looks_binary, unreadable_pack
from lapis.errors import InputError, UnavailableError
from lapis.log import Progress, silent
from lapis.storage import failures, is_url, open_url, state_of


@dataclass
class Listing:
    """The files to read, in their order, and a row of the report with those that cannot be used."""

    inputs: list[Input] = field(default_factory=list)
    step: Step = field(default_factory=lambda: Step("list"))


@dataclass(frozen=True)
class _Candidate:
    """A file of a source, before anybody has looked into it."""

    source: SourceConfig
    place: Place
    reader: Reader
    licence: str = ""
    licences: dict[str, set[str]] | None = None  # of the folders, if the source is a tree of code
    reason: str = ""  # why it is left out

    @property
    def order(self) -> tuple[bytes, str, str]:
        key = f"{self.source.name}\0{self.place.name}"
        return hashlib.sha256(key.encode()).digest(), key, self.place.path

    @property
    def label(self) -> str:
        return f"{self.source.name}: {self.place.name}"

    @property
    def alone(self) -> bool:
        """Whether the recipe names this very file."""
        return self.place.alone


def list_inputs(config: DataConfig, progress: Progress = silent) -> Listing:
    """All inputs of a recipe. Raises InputError if a source is not there or has no text at all."""
    sources = [named(source) for source in config.sources]
    _check_names(sources)
    listing = Listing()
    candidates = [found for source in sources for found in _candidates(source, listing.step)]
    candidates.sort(key=lambda candidate: candidate.order)
    taken = 0
    for n, candidate in enumerate(candidates):
        if config.max_bytes and taken >= config.max_bytes:
            listing.step.note("files beyond max_bytes", len(candidates) - n)
            break
        found = _inspect(candidate, listing.step)
        progress(n + 1, len(candidates), f"{n + 1:,} of {len(candidates):,} files listed")
        if found is not None:
            taken += found.size
            listing.inputs.append(found)
    if not listing.inputs:
        where = ", ".join(source.path or source.kind for source in config.sources)
        raise InputError(
            f"There is no text in {where}: {listing.step.top_reasons()}.",
            hint="Point a source at text, source code, JSON lines, parquet, Arrow, HTML, WARC or PDF files.",
        )
    return listing


def named(source: SourceConfig) -> SourceConfig:
    """The same source with its name filled in."""
    if source.name:
        return source
    if is_url(source.path):
        name = source.path.partition("?")[0].rstrip("/").rpartition("/")[2]
    else:
        name = Path(source.path).expanduser().absolute().name if source.path else str(source.kind)
    return source.model_copy(update={"name": name or "root"})


def _check_names(sources: list[SourceConfig]) -> None:
    priorities: dict[str, int] = {}
    for source in sources:
        if priorities.setdefault(source.name, source.priority) != source.priority:
            raise InputError(
                f"Two sources are called {source.name!r} and have different priorities.",
                hint='Give each [[data.sources]] a name of its own: name = "…"',
            )


def _candidates(source: SourceConfig, step: Step) -> Iterator[_Candidate]:
    if source.kind == "environment":
        for name, path, licence in environment_files():
            yield _Candidate(source, Place(name, str(path)), "text", source.licence or licence)
        return
    places = list(
        remote_places(source.path, step) if is_url(source.path) else local_places(source.path, step)
    )
    paths = {place.name: place.path for place in places}
    saved = SavedDatasets()
    if source.format == "auto":
        saved = saved_datasets(paths, lambda name: _beginning(paths[name], -1))
    licences = _licences(places) if source.kind == "code" else None
    for place in places:
        if place.name in saved.metadata:
            step.note("files about a dataset, not read")
            continue
        reason = saved.left_out.get(place.name, "")
        yield _Candidate(source, place, _reader(source, place.name), source.licence, licences, reason)


def _reader(source: SourceConfig, name: str) -> Reader:
    return source.format if source.format != "auto" else READERS.get(inner_ending(name), "text")


def _licences(places: list[Place]) -> dict[str, set[str]]:
    """The licences that each folder of a tree has files of; an unknown one is empty."""
    found: dict[str, set[str]] = {}
    for place in places:
        if is_licence_file(place.name):
            folder = place.name.rpartition("/")[0] or "."
            text = _beginning(place.path, LICENCE_BYTES).decode("utf-8", errors="replace")
            found.setdefault(folder, set()).add(licence_of_text(text))
    return found


def _beginning(path: str, size: int) -> bytes:
    with open_url(path) as file:
        return file.read(size)


def _inspect(candidate: _Candidate, step: Step) -> Input | None:
    """The input of a candidate, or None if it cannot be read, which is counted."""
    step.documents_in += 1
    place = candidate.place
    pack = unreadable_pack(place.name) if candidate.source.format == "auto" else ""
    if pack and candidate.alone:
        raise InputError(
            f"{place.path} is not opened: {pack}.",
            hint="Unpack it, or pack it again as .gz or .zst, and point the source at what comes out.",
        )
    try:
        found = candidate.reason or pack or place.reason or _seen(candidate, step)
    except failures() as error:
        if is_url(place.path):
            raise UnavailableError(
                f"{place.path} could not be read: {error}.", hint="Try again later."
            ) from error
        found = "unreadable"
    if isinstance(found, str):
        step.drop(found, candidate.label)
        return None
    step.keep(found.size)
    return found


def _seen(candidate: _Candidate, step: Step) -> Input | str:
    """The input of a file, or why there is none."""
    place, source, reader = candidate.place, candidate.source, candidate.reader
    state = state_of(place.path)
    with open_url(place.path) as file:
        begin = file.read(SNIFFED)
        size = place.size if place.size >= 0 else file.seek(0, 2)
        step.bytes_in += size
        if not begin:
            return "empty"
        plain = ending(place.name) not in COMPRESSIONS
        if reader == "text" and plain and looks_binary(begin):
            return "binary"
        if reader == "parquet" and begin[:4] != b"PAR1":
            if candidate.alone:
                raise InputError(f"{place.path} is no parquet file: it does not begin with PAR1.")
            return "no parquet"
        licence = candidate.licence
        if candidate.licences is not None:
            if reason := left_out(place.name, begin if plain else b""):
                return reason
            licence = licence or licence_of_file(place.name, begin if plain else b"", candidate.licences)
        file.seek(0)
        digest = place.digest or hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
    found = Input(source, place.name, place.path, size, digest, reader, licence, state)
    return replace(found, packages=packages_of(reader, source))
