"""What an evaluation found, as facts, as JSON and as a table that needs no explanation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from lapis.errors import InputError

FIVE_GRAM = "5-gram"
XZ = "xz -9e"
COLUMNS = ("measured on the same text", "bits per byte", "what it means")


@dataclass(frozen=True)
class EvalReport:
    """Bits per byte of a model on held-out documents, beside yardsticks on the same bytes; low is good."""

    bits_per_byte: float
    low: float  # 95 % interval over documents
    high: float
    perplexity: float  # per token, end tokens included; comparable only under one tokenizer
    documents: int
    empty_documents: int  # had no text and were left out
    bytes: int
    tokens: int
    yardsticks: Mapping[str, float]  # name -> bits per byte
    yardstick_tokens: int  # training tokens that the 5-gram counted
    dataset: str  # digest
    tokenizer: str  # digest
    parameters: int
    context: int
    kernels: str
    bit_exact: bool  # whether these are the numbers that serving gives, bit for bit
    subject: str = ""  # which weights: a run at a step, a model's name
    weights: str = ""  # digest of the checkpoint or model folder

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as in eval.json."""
        return asdict(self)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> EvalReport:
        """Read what `to_dict` gave. Raises InputError naming a field that is missing or unknown."""
        known = {field.name for field in fields(EvalReport)}
        required = known - {"subject", "weights"}
        wrong = sorted((required - values.keys()) | (values.keys() - known))
        if wrong:
            raise InputError(f"This is not an evaluation report: see its field {wrong[0]!r}.")
        return EvalReport(**values)

    def to_json(self) -> str:
        """The text of eval.json."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"


def rows(report: EvalReport) -> list[tuple[str, float, str]]:
    """The table under COLUMNS: model, yardsticks, and the cost of knowing nothing; best first."""
    own = (
        "this model",
        report.bits_per_byte,
        f"95 % of document samples: {report.low:.3f} to {report.high:.3f}",
    )
    others = [(name, bits, _meaning(name, bits, report)) for name, bits in report.yardsticks.items()]
    nothing = ("no model at all", 8.0, "every byte costs its 8 bits")
    return sorted([own, *others, nothing], key=lambda row: row[1])


def summary(report: EvalReport) -> str:
    """Two sentences for a reader who sees such a number for the first time."""
    size = f"{report.documents:,} held-out documents of {report.bytes:,} bytes"
    verdict = []
    for name, bits in sorted(report.yardsticks.items(), key=lambda item: item[1]):
        share = 1 - report.bits_per_byte / bits
        verdict.append(f"{abs(share):.0%} {'less' if share >= 0 else 'more'} than {name}")
    return (
        f"Bits per byte: how many bits the model needs to write down one byte of text; lower is better. "
        f"On {size} this model needs {report.bits_per_byte:.3f}: {', '.join(verdict)}."
    )


def _meaning(name: str, bits: float, report: EvalReport) -> str:
    notes = {
        FIVE_GRAM: f"smoothed counts of {report.yardstick_tokens:,} training tokens, no neural network",
        XZ: "the held-out text alone, compressed by xz",
    }
    return notes.get(name, "")
