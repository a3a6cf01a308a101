"""Graders that ask a model: what it is asked, in which form it must answer, and what its answer says."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lapis.evaluate.graders.grader import LabelModel, Sampling, ScoreModel
from lapis.evaluate.graders.template import render

TOKENS = 512  # of an answer, unless the grader says otherwise
REASONING = 600  # characters that a model may write before its score

Turn = dict[str, str]


@dataclass(frozen=True)
class Question:
    """A conversation for a model, and the JSON Schema that its answer must follow."""

    model: str
    messages: list[Turn]
    schema: Mapping[str, Any]
    max_tokens: int = TOKENS
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None


@dataclass(frozen=True)
class Answer:
    """What a model said, and the tokens of it."""

    text: str
    cut: bool = False  # it did not come to its end
    refused: bool = False
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


Ask = Callable[[Question], Answer]  # blocks; raises LapisError where the model cannot answer


def question(grader: ScoreModel | LabelModel, values: Mapping[str, Any]) -> Question:
    """What a grader asks of its model for one sample. Raises InputError as `render`."""
    messages = [
        {"role": message.role, "content": "\n".join(render(text, values) for text in message.texts)}
        for message in grader.input
    ]
    if isinstance(grader, LabelModel):
        return Question(grader.model, messages, _object(label={"type": "string", "enum": grader.labels}))
    least, most = grader.bounds
    reasoning = {"type": "string", "maxLength": REASONING}
    schema = _object(reasoning=reasoning, result={"type": "number", "minimum": least, "maximum": most})
    sampling = grader.sampling_params or Sampling()
    return Question(
        grader.model,
        messages,
        schema,
        max_tokens=sampling.max_completions_tokens or TOKENS,
        temperature=sampling.temperature or 0.0,  # a grade should be the same the next time
        top_p=1.0 if sampling.top_p is None else sampling.top_p,
        seed=sampling.seed,
    )


def score(grader: ScoreModel, text: str) -> float | None:
    """The number in a model's answer; None where there is none within the range."""
    value = _read(text).get("result")
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    least, most = grader.bounds
    return float(value) if math.isfinite(value) and least <= value <= most else None


def label(grader: LabelModel, text: str) -> str | None:
    """The label in a model's answer; None where there is none of those asked for."""
    value = _read(text).get("label")
    return value if isinstance(value, str) and value in grader.labels else None


def _object(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": [*properties],
        "additionalProperties": False,
    }


def _read(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
