"""What a dataset's manifest says of licences, personal data and evaluation sets; the gate that must be passed first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lapis.data.annotate import Annotator
from lapis.data.contamination_gate import HOSTS, check_gate, refuse_failed
from lapis.data.decontaminate import OverlapAnnotator
from lapis.data.documents import DocumentTable
from lapis.data.recipe import DataConfig
from lapis.data.report import Step


def policy_of(data: DataConfig, table: DocumentTable, annotators: Sequence[Annotator]) -> dict[str, Any]:
    """What was decided, and how well evaluation items are found. Raises InputError if that is not well enough."""
    policy: dict[str, Any] = {
        "licences": data.licences.model_dump(mode="json"),
        "pii": data.pii.model_dump(mode="json"),
    }
    for annotator in annotators:
        if isinstance(annotator, OverlapAnnotator):
            first = sorted(range(len(table)), key=table.strings("digest").__getitem__)[:HOSTS]
            result = check_gate(data.decontamination, [table.document(row).text for row in first])
            refuse_failed(result)
            limits = data.decontamination.model_dump(mode="json", exclude={"sets"})
            policy["decontamination"] = {**limits, **annotator.facts(), "gate": result.plain()}
    return policy


def note_gate(steps: Sequence[Step], policy: dict[str, Any]) -> None:
    """Write into the report how many injected items the gate found."""
    gate = policy.get("decontamination", {}).get("gate")
    for step in steps:
        if gate and step.step == "overlap":
            step.note("gate: items injected", gate["items"])
            for kind, recall in gate["recall"].items():
                step.note(f"gate: found {kind}", round(recall * gate["items"]))
