"""What a dataset's manifest says of licences, personal data and evaluation sets; the gate that must be passed first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lapis.data.annotate import Annotator
from lapis.data.contamination_gate import HOSTS, check_gate, refuse_failed
from lapis.data.decide import Attributes
from lapis.data.decontaminate import OverlapAnnotator, items_of
from lapis.data.documents import DocumentTable
from lapis.data.recipe import DataConfig
from lapis.data.report import Step

MANY, SHOWN = 10, 5  # an item in so many documents is named, the first few of them


def policy_of(data: DataConfig, table: DocumentTable, annotators: Sequence[Annotator]) -> dict[str, Any]:
    """What was decided, and how well evaluation items are found. Raises InputError if that is not well enough."""
    policy: dict[str, Any] = {
        "licences": data.licences.model_dump(mode="json"),
        "pii": data.pii.model_dump(mode="json"),
    }
    for annotator in annotators:
        if isinstance(annotator, OverlapAnnotator):
            result = check_gate(data.decontamination, table.texts(table.by_digest()[:HOSTS]))
            refuse_failed(result)
            limits = data.decontamination.model_dump(mode="json", exclude={"sets"})
            policy["decontamination"] = {**limits, **annotator.facts(), "gate": result.plain()}
    return policy


def note_overlap(
    data: DataConfig, steps: Sequence[Step], attributes: Attributes, policy: dict[str, Any]
) -> None:
    """Write into the report how many injected items the gate found, and items that are in many documents.

    Those may be common text (a licence, a menu) that cost more than they are worth in a set.
    """
    for step in steps:
        if step.step == "overlap" and "decontamination" in policy:
            gate = policy["decontamination"]["gate"]
            step.note("gate: items injected", gate["items"])
            for kind, recall in gate["recall"].items():
                step.note(f"gate: found {kind}", round(recall * gate["items"]))
            held = attributes["overlap"].numbers("item_share") >= np.float32(data.decontamination.item_share)
            items, counts = np.unique(attributes["overlap"].numbers("item")[held], return_counts=True)
            names = items_of(data.decontamination)
            for place in np.argsort(-counts, kind="stable")[:SHOWN].tolist():
                if counts[place] >= MANY:
                    step.note(f"documents with {names[items[place]].name}", int(counts[place]))
