"""What a recipe will make, before it is made: a sample goes the whole way, the rest is predicted from it.

Two samples are taken by digests of the documents' names. The small one (1 %, at least some MB) goes through every
step and says what rules keep, how long steps take and what they write. Duplicates are too rare in it: of n copies
a sample of 1 % sees two together once in n * 10,000 pairs. So they are counted in a larger sample, of which only
the cheap attributes are made, and what that one misses is extrapolated (`dropped_shares`).
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lapis.data.annotators import annotators, rules
from lapis.data.attributes import Annotated, Reading, annotate, chosen_parts
from lapis.data.columns import Columns, Rows
from lapis.data.decide import decide
from lapis.data.documents import DocumentTable, Sample
from lapis.data.pipeline import prepare_listed
from lapis.data.recipe import DataConfig, TokenizerConfig
from lapis.data.report import Step, read_report
from lapis.data.shards import Dataset
from lapis.data.sources import Listing, list_inputs
from lapis.data.split import duplicates
from lapis.data.text_files import COMPRESSIONS
from lapis.data.verdicts import Verdicts
from lapis.data.workers import Room, worker_count
from lapis.home import Home
from lapis.log import Progress, silent
from lapis.storage import storage_errors

WHOLE_PART, WHOLE_BYTES = 0.01, 4 << 20  # what goes the whole way: this part of the text, or so many bytes
SKETCHED_PART, SKETCHED_BYTES = 0.05, 64 << 20  # what is only sketched
READ_PART, READ_BYTES = 0.1, 512 << 20  # what is read to take both from
PACKED = 4  # text is so many times larger than its compressed file, roughly
FEW_BYTES = 64 << 20  # less text than this is not worth worker processes
STEADY = 0.5  # the least sampling rate at which the exact estimate of duplicates is steady
CHEAP = ("sketch", "quality", "licences")  # annotators and rules that the larger sample can pay for
START_SECONDS = 1.0  # starting worker processes


@dataclass(frozen=True)
class Preview:
    """What a full run of a recipe is predicted to take, keep and write."""

    sample_documents: int
    sample_bytes: int
    documents: int  # that are read
    bytes: int
    kept_documents: int  # training and held-out documents
    kept_bytes: int
    tokens: int  # training tokens
    duplicates: float  # part of the documents kept by the rules that dedup drops
    workers: int
    seconds: dict[str, float]  # of each step, on the clock
    disk: dict[str, int]  # bytes of each stage

    @property
    def total_seconds(self) -> float:
        """Of all steps, on the clock."""
        return sum(self.seconds.values())

    @property
    def total_disk(self) -> int:
        """Bytes of all stages."""
        return sum(self.disk.values())


@dataclass(frozen=True)
class Shares:
    """Which part of documents, and of their bytes, dedup drops."""

    documents: float
    bytes: float


def preview(
    data: DataConfig,
    tokenizer: TokenizerConfig,
    home: Home,
    *,
    workers: int = 0,
    progress: Progress = silent,
) -> Preview:
    """Measure a sample of a recipe's input and predict the full run; nothing of it is kept.

    Raises InputError as `prepare` does.
    """
    with storage_errors(home.data):
        home.data.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    listing = list_inputs(data, progress)
    listing.step.seconds = time.perf_counter() - began
    parts, sketched, whole = sampling(listing)
    chosen = Sample(parts, whole)
    # What a sample can hold out says nothing about whether the whole is enough.
    heldout = data.heldout.model_copy(update={"min_bytes": 1})
    small = data.model_copy(update={"heldout": heldout, "max_bytes": 0})
    root = Path(tempfile.mkdtemp(prefix=".preview-", dir=home.data))
    try:
        room = Room.within(data.memory_bytes, worker_count(workers))
        larger = _larger(
            Reading(small, listing, root / "sketched", Sample(parts, sketched)), room.workers, progress
        )
        few = whole * parts * _text_bytes(listing) < FEW_BYTES
        reading = Reading(small, listing, root / "whole", chosen)
        _, cheap = _cheaply_kept(small, annotate(reading, 1 if few else room.workers, progress))
        dataset = prepare_listed(reading, tokenizer, Room(1) if few else room, progress)
        _, share = chosen_parts(listing, chosen)
        return _predicted(data, tokenizer, dataset, share, cheap, larger, room.workers)
    finally:
        shutil.rmtree(root, ignore_errors=True)


def sampling(listing: Listing) -> tuple[float, float, float]:
    """Parts of the input that are read, and of their documents that are sketched and that go the whole way."""
    size = _text_bytes(listing)
    parts = min(1.0, max(READ_PART, READ_BYTES / size))
    sketched = min(1.0, max(SKETCHED_PART, SKETCHED_BYTES / size) / parts)
    whole = min(1.0, max(WHOLE_PART, WHOLE_BYTES / size) / parts)
    return parts, sketched, whole


def _text_bytes(listing: Listing) -> int:
    """Bytes of text in all files, guessed from their sizes."""
    return sum(
        item.size * (PACKED if item.reader == "parquet" or Path(item.name).suffix in COMPRESSIONS else 1)
        for item in listing.inputs
    )


@dataclass(frozen=True)
class _Larger:
    """What the larger sample says: which part of documents and bytes the cheap rules keep, dedup drops."""

    kept: Shares
    duplicates: Shares


def _larger(reading: Reading, workers: int, progress: Progress) -> _Larger:
    data, sample = reading.data, reading.sample
    assert sample is not None
    made = annotate(reading, workers, progress, [one for one in annotators(data) if one.name in CHEAP])
    read, repair = read_report(made.documents.folder)[1:3]
    rate = chosen_parts(reading.listing, sample)[1] * repair.documents_in / max(1, read.documents_out)
    rows, kept = _cheaply_kept(data, made)
    columns = made.columns
    sizes = _documents(columns).sizes()
    return _Larger(kept, dropped_shares(duplicates(columns, rows, data.dedup), sizes[rows], rate))


def _cheaply_kept(data: DataConfig, made: Annotated) -> tuple[Rows, Shares]:
    """The documents of a sample that the cheap rules keep, and their part of it."""
    columns = made.columns
    sizes = _documents(columns).sizes()
    cheap = [rule for rule in rules(data) if rule.step in CHEAP]
    left, _ = decide(cheap, columns, np.arange(len(sizes)), sizes, Verdicts.of(len(sizes)))
    return left, Shares(len(left) / max(1, len(sizes)), sizes[left].sum() / max(1, sizes.sum()))


def _documents(columns: Mapping[str, Columns]) -> DocumentTable:
    table = columns["documents"]
    assert isinstance(table, DocumentTable)
    return table


def dropped_shares(stands_for: Rows, sizes: NDArray[np.int64], rate: float) -> Shares:
    """The part of all documents that are duplicates, from clusters seen in a sample of them at some rate.

    Where F_i clusters show i members in the sample, Good and Toulmin have t F_1 - t^2 F_2 + t^3 F_3 … more clusters
    in the whole, with t = (1 - rate) / rate: exact in the mean, and steady up to t = 1. In a smaller sample t^i
    outgrows what F_i says; there the sizes of clusters are taken to fall off geometrically, as F_2 / F_1 says.
    """
    _, inverse, members = np.unique(stands_for, return_inverse=True, return_counts=True)
    if not len(members):
        return Shares(0.0, 0.0)
    size = np.bincount(inverse, weights=sizes) / members  # of a cluster's documents, in the mean
    return Shares(_dropped(members, np.ones(len(members)), rate), _dropped(members, size, rate))


def _dropped(members: Rows, weights: NDArray[np.float64], rate: float) -> float:
    seen = np.append(np.bincount(members, weights=weights)[1:], 0.0)  # F_1, F_2, …
    i = np.arange(1, len(seen) + 1)
    if rate < STEADY:
        ratio = float(seen[1] / max(seen[0], 1.0))
        return ratio / (rate + ratio * (1 - rate))
    every = float((i * seen).sum()) / rate
    clusters = float(seen.sum() - ((-(1 - rate) / rate) ** i * seen).sum())
    return max(0.0, 1 - clusters / every)


def _predicted(
    data: DataConfig,
    tokenizer: TokenizerConfig,
    dataset: Dataset,
    share: float,
    cheap: Shares,
    larger: _Larger,
    workers: int,
) -> Preview:
    """`share` of the files' bytes was read for the sample, of which the cheap rules alone keep `cheap`."""
    steps = {step.step: step for step in dataset.report}
    read, repair, dedup, encode = (steps[name] for name in ("read", "repair", "dedup", "encode"))
    documents, size = read.documents_out / share, read.bytes_out / share
    if data.max_bytes and data.max_bytes < size:
        documents, size = documents * data.max_bytes / size, float(data.max_bytes)
    scale = size / max(1, repair.bytes_in)
    # Cheap rules and duplicates by the larger sample, what the other rules keep of that by the small one.
    others = dedup.bytes_in / max(1, repair.bytes_in) / max(1e-9, cheap.bytes)
    kept = size * larger.kept.bytes * min(1.0, others) * (1 - larger.duplicates.bytes)
    others = dedup.documents_in / max(1, repair.documents_in) / max(1e-9, cheap.documents)
    rows = documents * larger.kept.documents * min(1.0, others)
    held = min(max(data.heldout.fraction * kept, data.heldout.min_bytes), data.heldout.max_bytes)
    grown = max(0.0, kept - held) / max(1, encode.bytes_in)
    return Preview(
        sample_documents=repair.documents_in,
        sample_bytes=repair.bytes_in,
        documents=round(documents),
        bytes=round(size),
        kept_documents=round(rows * (1 - larger.duplicates.documents)),
        kept_bytes=round(kept),
        tokens=round(encode.notes["tokens"] * grown),
        duplicates=larger.duplicates.documents,
        workers=workers,
        seconds=_seconds(dataset.report, 1 / share, scale, grown, tokenizer.sample_bytes, workers),
        disk=_disk(dataset.folder, scale, grown),
    )


def _seconds(
    report: list[Step], reading: float, scale: float, grown: float, vocabulary_bytes: int, workers: int
) -> dict[str, float]:
    """Each step's time on the clock. What workers do is divided by them; the rest one process does."""
    factors = {
        "list": 1.0,
        "read": reading / workers,
        "dedup": scale,
        "split": scale,
        "encode": grown / workers,
    }
    found = {"start": START_SECONDS if workers > 1 else 0.0}
    for step in report:
        if step.step == "tokenizer":
            factor = max(1.0, min(grown, vocabulary_bytes / max(1, step.bytes_in)))
        else:
            factor = factors.get(step.step, scale / workers)
        found[step.step] = step.seconds * factor
    return found


def _disk(dataset: Path, scale: float, grown: float) -> dict[str, int]:
    """Bytes of each stage's folder: those of documents grow with the text, shards with what is trained on."""
    found = {}
    for folder in sorted(path for path in dataset.parent.iterdir() if not path.name.startswith(".")):
        name = folder.name.rpartition("-")[0]
        fixed = name in ("tokenizer", "tokens")
        found[name] = sum(
            round(path.stat().st_size * (grown if path.name.startswith("shard-") else 1 if fixed else scale))
            for path in folder.iterdir()
        )
    return found
