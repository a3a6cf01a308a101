"""Gates: what must be true before a release is approved. Pure: facts in, verdicts out."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lapis.errors import ConflictError
from lapis.release.lineage import UNKNOWN, Lineage

YARDSTICK = "5-gram"  # its name in an EvalReport
Verdict = Literal["pass", "warn", "refuse"]


@dataclass(frozen=True)
class Gate:
    """One check: what it is called, its verdict, and the facts in a sentence."""

    name: str
    verdict: Verdict
    text: str


def judge(
    report: Mapping[str, Any] | None, lineage: Lineage, weights: str = "", damage: str = ""
) -> list[Gate]:
    """All gates of a release. `weights` is its digest; `damage` says what is wrong with its bytes, if anything."""
    return [_digest(damage), *_evaluation(report, {weights, lineage.checkpoint, ""}), _licences(lineage)]


def require(release_id: str, gates: Sequence[Gate], force: bool = False) -> None:
    """Raises ConflictError naming every gate that refuses. `force` overrides all but the digest."""
    refused = [gate for gate in gates if gate.verdict == "refuse" and not (force and gate.name != "digest")]
    if not refused:
        return
    hint = f'To approve it all the same: lapis release approve {release_id} --force --reason "…"'
    if any(gate.name == "digest" for gate in refused):
        hint = "Make a new version from a sound copy: lapis release create"
    causes = " ".join(f"[{gate.name}] {gate.text}" for gate in refused)
    raise ConflictError(f"The release {release_id} cannot be approved: {causes}", hint=hint)


def _digest(damage: str) -> Gate:
    if damage:
        return Gate("digest", "refuse", damage)
    return Gate("digest", "pass", "Every file matches its recorded digest.")


def _evaluation(report: Mapping[str, Any] | None, own: Container[str | None]) -> list[Gate]:
    if report is None:
        return [Gate("evaluation", "refuse", "There is no evaluation.")]
    if report.get("weights", "") not in own:  # a run that was trained on after it was measured
        subject = report.get("subject") or "other weights"
        return [Gate("evaluation", "refuse", f"The evaluation is not of these weights: it is of {subject}.")]
    model, yardstick = report.get("bits_per_byte"), _five_gram(report)
    if not isinstance(model, int | float):
        return [Gate("evaluation", "refuse", "The evaluation has no bits per byte.")]
    present = Gate("evaluation", "pass", f"{model:.3f} bits per byte on held-out text.")
    if yardstick is None:
        return [present, Gate("yardstick", "warn", "The evaluation has no 5-gram yardstick to compare with.")]
    words = f"{model:.3f} bits per byte; the 5-gram model of the same text has {yardstick:.3f}."
    return [present, Gate("yardstick", "pass" if model < yardstick else "refuse", words)]


def _five_gram(report: Mapping[str, Any]) -> float | None:
    yardsticks = report.get("yardsticks")
    value = yardsticks.get(YARDSTICK) if isinstance(yardsticks, Mapping) else None
    return float(value) if isinstance(value, int | float) else None


def _licences(lineage: Lineage) -> Gate:
    if not lineage.licences:
        if lineage.licence in ("", UNKNOWN):
            return Gate(
                "licences", "refuse", "Neither the weights' licence nor those of their data are known."
            )
        return Gate("licences", "pass", f"The weights are under {lineage.licence}.")
    if lineage.unlicensed:
        text = f"{lineage.unlicensed:,} of {lineage.documents:,} training documents state no licence."
        return Gate("licences", "warn", text)
    return Gate("licences", "pass", f"All {lineage.documents:,} training documents state a licence.")
