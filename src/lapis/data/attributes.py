"""The documents of a recipe and what is known about them: which stages they are, and how they are made.

One pass over the parts of the input reads what is not read and annotates what is not annotated.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from lapis.data.annotate import AnnotateTask, Annotator, annotate_part
from lapis.data.annotators import annotators
from lapis.data.boilerplate import VERSION as BOILERPLATE_VERSION
from lapis.data.boilerplate import boilerplate_sources, remove_boilerplate
from lapis.data.columns import Columns, Rows
from lapis.data.documents import DocumentTable, Lost, PartFacts, ReadTask, Sample
from lapis.data.formats.part import Part
from lapis.data.readers import plan_parts
from lapis.data.recipe import DataConfig
from lapis.data.report import merged, read_report, write_report
from lapis.data.sources import Listing
from lapis.data.stage import Stage
from lapis.data.training_texts import TrainingTexts
from lapis.data.workers import run_tasks
from lapis.log import Progress
from lapis.storage import storage_errors

DOCUMENTS_VERSION = 3  # raise it when reading or repair gives other bytes for the same input


@dataclass(frozen=True)
class Reading:
    """What is read into stages below a folder: the listed files of a recipe, or a sample of their documents."""

    data: DataConfig
    listing: Listing
    root: Path
    sample: Sample | None = None

    def stage(self, lost: Sequence[Lost] = ()) -> Stage:
        """The stage of the documents as they are read; `lost` are files that could not be read as listed."""
        gone = {(item.source, item.name) for item in lost}
        inputs = [item.identity for item in self.listing.inputs if (item.source.name, item.name) not in gone]
        facts = {
            "inputs": inputs,
            "lost": list(lost),
            "skipped": self.listing.step.reasons,
            "document_chars": self.data.document_chars,
        }
        if self.sample is not None:
            facts["sample"] = [self.sample.parts, self.sample.rows]
        return Stage.of(self.root, "documents", DOCUMENTS_VERSION, facts)

    @property
    def shared(self) -> list[str]:
        """The sources from whose documents the lines that they share are taken out."""
        return boilerplate_sources(self.data.boilerplate, self.listing.inputs)


@dataclass(frozen=True)
class Annotated:
    """The documents of a recipe, and the stage of each of its annotators."""

    documents: Stage
    attributes: tuple[tuple[Annotator, Stage], ...]

    @staticmethod
    def of(reading: Reading) -> Annotated:
        """The stages of a recipe."""
        documents = reading.stage()
        if reading.shared:
            documents = _bare_stage(documents, reading)
        return Annotated.on(documents, annotators(reading.data))

    @staticmethod
    def on(documents: Stage, wanted: Sequence[Annotator]) -> Annotated:
        """The stages of some annotators on the documents of one stage."""
        return Annotated(documents, tuple((one, _stage(one, documents)) for one in wanted))

    @property
    def stages(self) -> list[Stage]:
        """All of them, in the one order in which everybody takes them."""
        return [self.documents, *sorted((stage for _, stage in self.attributes), key=lambda one: one.name)]

    def training_texts(self, data: DataConfig) -> TrainingTexts:
        """The documents with placeholders for what the recipe masks, and without the lines that it cuts."""
        made = {one.name: stage.folder for one, stage in self.attributes}
        prose = data.filters.prose
        cut = made["quality"] if data.filters.enabled and prose.cut_lines else None
        return TrainingTexts(
            self.documents.folder, made.get("pii"), data.pii.kinds("mask"), cut, prose.c4_line_end
        )

    @cached_property
    def columns(self) -> dict[str, Columns]:
        """What is known about every document: a table for "documents" and for each annotator's name.

        The stages have to be finished.
        """
        found: dict[str, Columns] = {"documents": DocumentTable(self.documents.folder)}
        for annotator, stage in self.attributes:
            found[annotator.name] = Columns(stage.folder, annotator.schema)
        return found


def annotate(
    reading: Reading, workers: int, progress: Progress, wanted: Sequence[Annotator] | None = None
) -> Annotated:
    """Read what is not read, annotate what is not annotated by the recipe's annotators, or some wanted ones.

    One pass over the parts does both. Repeated lines are known only when all is read: where they are taken out,
    annotating is a pass of its own. What comes out has other names than planned if files were lost.
    """
    wanted = annotators(reading.data) if wanted is None else wanted
    documents = reading.stage()
    if not reading.shared:
        return _pass_over(reading, Annotated.on(documents, wanted), workers, progress)
    planned = Annotated.on(_bare_stage(documents, reading), wanted)
    if not all(stage.done for stage in planned.stages):
        read = _pass_over(reading, Annotated.on(documents, ()), workers, progress)
        planned = Annotated.on(_bare(read.documents, reading, workers, progress), wanted)
    return _pass_over(reading, planned, workers, progress)


def _bare(documents: Stage, reading: Reading, workers: int, progress: Progress) -> Stage:
    """The documents without the lines that they share."""
    stage = _bare_stage(documents, reading)
    if stage.done:
        return stage
    with stage.making(progress):
        if stage.done:
            return stage
        with storage_errors(stage.work):
            stage.work.mkdir(exist_ok=True)
        progress(0, None, "taking out lines that many documents share")
        config = reading.data.boilerplate
        steps = remove_boilerplate(documents.folder, stage.work, reading.shared, config, workers)
        write_report(stage.work, [*read_report(documents.folder), *merged(steps)])
        stage.commit(stage.work)
    return stage


def _bare_stage(documents: Stage, reading: Reading) -> Stage:
    config = reading.data.boilerplate.model_dump(mode="json")
    facts = {"documents": documents.digest, "config": config, "sources": reading.shared}
    return Stage.of(documents.root, "documents", BOILERPLATE_VERSION, facts)


def _pass_over(reading: Reading, planned: Annotated, workers: int, progress: Progress) -> Annotated:
    if all(stage.done for stage in planned.stages):
        return planned
    with ExitStack() as held:
        for stage in planned.stages:
            held.enter_context(stage.making(progress))
        missing = [stage for stage in planned.stages if not stage.done]
        for stage in missing:
            with storage_errors(stage.work):
                stage.work.mkdir(exist_ok=True)
        facts = _passed(reading, planned, workers, progress)
        # What could not be read as it was listed is not in there, so the folders' names must say so.
        lost = sorted(item for part in facts for item in part.lost)
        final = planned
        if lost and planned.documents in missing:
            final = Annotated.on(reading.stage(lost), [annotator for annotator, _ in planned.attributes])
        for stage, made in zip(planned.stages, final.stages, strict=True):
            if stage not in missing:
                continue
            if stage == planned.documents:
                steps = [reading.listing.step, *merged(step for part in facts for step in part.steps)]
                write_report(stage.work, steps)
            made.commit(stage.work)
        return final


def _passed(reading: Reading, planned: Annotated, workers: int, progress: Progress) -> list[PartFacts]:
    documents, inputs = planned.documents, reading.listing.inputs
    wanted = tuple((one, stage.work) for one, stage in planned.attributes if not stage.done)
    if documents.done:
        count = len(list(documents.folder.glob("part-*.arrow")))
        tasks = [AnnotateTask(n, documents.folder, None, wanted) for n in range(count)]
    else:
        sample, limit = reading.sample, reading.data.document_chars
        parts = plan_parts(inputs) if sample is None else chosen_parts(reading.listing, sample)[0]
        reads = [ReadTask(n, part, documents.work, limit, sample) for n, part in enumerate(parts)]
        tasks = [AnnotateTask(read.number, documents.work, read, wanted) for read in reads]
    done, facts = 0, []
    for found in run_tasks(annotate_part, tasks, workers):
        facts.append(found)
        done += found.raw_bytes
        parts_done = f"part {len(facts):,} of {len(tasks):,}"
        progress(len(facts), len(tasks), f"read and annotated {done / 1e6:,.1f} MB of text, {parts_done}")
    return facts


def _stage(annotator: Annotator, documents: Stage) -> Stage:
    facts = {"documents": documents.digest, "facts": annotator.facts()}
    return Stage.of(documents.root, annotator.name, annotator.version, facts)


def chosen_parts(listing: Listing, sample: Sample) -> tuple[list[Part], float]:
    """The parts of the input that a sample reads, at least one, and their share of the files' bytes."""
    parts = plan_parts(listing.inputs)
    cuts = Counter(item.path for part in parts for item in part.inputs)

    def size(some: list[Part]) -> float:
        return sum(item.size / cuts[item.path] for part in some for item in part.inputs)

    taken = [part for part in parts if sample.takes_part(part)] or parts[:1]
    return taken, size(taken) / max(1.0, size(parts))


def within(max_bytes: int, folder: Path, table: Columns) -> Rows:
    """The rows whose raw text ends within the first `max_bytes` bytes; all of them if that is 0."""
    rows = np.arange(len(table), dtype=np.int64)
    if not max_bytes:
        return rows
    raw = [PartFacts.read(path).raw_bytes for path in sorted(folder.glob("part-*.json"))]
    before = np.repeat(np.cumsum([0, *raw[:-1]]), np.diff(table.first_of_part))
    kept: Rows = rows[before + table.numbers("raw_end") <= max_bytes]
    return kept
