"""Why each document is not trained on: what a split stage decided, kept a row a document.

A split stage's `verdicts.arrow` has a row for each row of the documents stage:
    step      the row of the report that it counts under: "quality", "dedup", "split", …; "" if it is trained on
    reason    why it is not trained on; "held out" for the held-out documents; "" if it is trained on
    survivor  of a duplicate, the row of the documents stage that stands for it; else null
and `stages.json` names the folders that it was decided from, the documents' first.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lapis.data.columns import Rows
from lapis.data.document import Document
from lapis.data.documents import DocumentTable
from lapis.errors import NotFoundError
from lapis.storage import atomic_file, write_text

FILE = "verdicts.arrow"


@dataclass
class Verdicts:
    """Why each document is not trained on, and which other one stands for a duplicate.

    `code` counts in `reasons`; 0 is a document that is trained on.
    """

    code: NDArray[np.int16]
    survivor: NDArray[np.int64]
    reasons: list[tuple[str, str]] = field(default_factory=lambda: [("", "")])

    @staticmethod
    def of(documents: int) -> Verdicts:
        """No verdict on any document yet."""
        return Verdicts(np.zeros(documents, dtype=np.int16), np.full(documents, -1, dtype=np.int64))

    def drop(self, step: str, reason: str, rows: Rows, survivors: Rows | None = None) -> None:
        """Note why some documents are not trained on."""
        if (step, reason) not in self.reasons:
            self.reasons.append((step, reason))
        self.code[rows] = self.reasons.index((step, reason))
        if survivors is not None:
            self.survivor[rows] = survivors

    def write(self, folder: Path, stages: list[str]) -> None:
        """Write verdicts.arrow and stages.json; `stages` are the folders' names, the documents' first."""
        step, reason = (pa.array([pair[n] for pair in self.reasons]) for n in (0, 1))
        code = pa.array(self.code)
        table = pa.table(
            {
                "step": pa.DictionaryArray.from_arrays(code, step),
                "reason": pa.DictionaryArray.from_arrays(code, reason),
                "survivor": pa.array(self.survivor, mask=self.survivor < 0),
            }
        )
        with atomic_file(folder / FILE) as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
        write_text(folder / "stages.json", json.dumps(stages))


def read_verdicts(folder: Path) -> pa.Table:
    """The verdicts of a finished split stage: step, reason, survivor for each row of the documents stage."""
    return pa.ipc.open_file(pa.memory_map(str(folder / FILE))).read_all()


class Decided:
    """A finished split stage with its documents: which were dropped for what, and what stands for what.

    Raises NotFoundError if the documents stage is not there any more.
    """

    def __init__(self, folder: Path) -> None:
        documents = folder.parent / json.loads((folder / "stages.json").read_text())[0]
        if not documents.is_dir():
            raise NotFoundError(
                f"{documents} is not there any more: the documents that {folder.name} was decided from.",
                hint="Make it again: lapis data prepare RECIPE.toml",
            )
        self.documents = DocumentTable(documents)
        table = read_verdicts(folder).combine_chunks()
        step, reason = (table[name].combine_chunks() for name in ("step", "reason"))
        self._reasons = list(zip(step.dictionary.to_pylist(), reason.dictionary.to_pylist(), strict=True))
        self._code = np.asarray(step.indices.to_numpy(), dtype=np.int16)  # as `Verdicts.code`
        self._survivor = table["survivor"].fill_null(-1).to_numpy()

    @cached_property
    def rows(self) -> dict[tuple[str, str], Rows]:
        """Rows of the documents under each (step, reason), in the order of their digests; ("", "") is kept."""
        ordered = self.documents.by_digest()
        ordered = ordered[np.argsort(self._code[ordered], kind="stable")]
        ends = np.cumsum(np.bincount(self._code, minlength=len(self._reasons)))
        parts = np.split(ordered, ends[:-1])
        return {reason: part for reason, part in zip(self._reasons, parts, strict=True) if len(part)}

    @cached_property
    def clusters(self) -> list[Rows]:
        """Rows of each survivor and its duplicates, survivor first; the largest clusters first."""
        gone = np.flatnonzero(self._survivor >= 0)
        if not len(gone):
            return []
        gone = gone[np.argsort(self._survivor[gone], kind="stable")]
        kept, first = np.unique(self._survivor[gone], return_index=True)
        groups = np.split(gone, first[1:])
        order = np.lexsort((kept, -np.array([len(rows) for rows in groups])))
        return [np.concatenate([kept[n : n + 1], groups[n]]) for n in order.tolist()]

    def document(self, row: int) -> Document:
        """One document."""
        return self.documents.document(row)
