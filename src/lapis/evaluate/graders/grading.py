"""What a sample is worth to a grader: the reward, how it came about, and what went wrong."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from lapis.errors import InputError, LapisError
from lapis.evaluate.graders import model_grader
from lapis.evaluate.graders.grader import (
    Grader,
    LabelModel,
    Multi,
    PythonGrader,
    ScoreModel,
    Single,
    StringCheck,
    TextSimilarity,
    singles,
)
from lapis.evaluate.graders.model_grader import Answer, Ask
from lapis.evaluate.graders.python_grader import PythonSandbox
from lapis.evaluate.graders.similarity import similarity
from lapis.evaluate.graders.template import MissingError, NotJsonError, render, variables

CHECKS: dict[str, Callable[[str, str], bool]] = {
    "eq": lambda text, reference: text == reference,
    "ne": lambda text, reference: text != reference,
    "like": lambda text, reference: reference in text,
    "ilike": lambda text, reference: reference.casefold() in text.casefold(),
}


@dataclass(frozen=True)
class Errors:
    """OpenAI's flags of a grading that failed; docs/evaluate.md says when each one is set."""

    formula_parse_error: bool = False
    sample_parse_error: bool = False
    truncated_observation_error: bool = False
    unresponsive_reward_error: bool = False
    invalid_variable_error: bool = False
    other_error: bool = False
    python_grader_server_error: bool = False
    python_grader_server_error_type: str | None = None
    python_grader_runtime_error: bool = False
    python_grader_runtime_error_details: str | None = None
    model_grader_server_error: bool = False
    model_grader_refusal_error: bool = False
    model_grader_parse_error: bool = False
    model_grader_server_error_details: str | None = None

    @property
    def any(self) -> bool:
        """Whether something went wrong."""
        return any(value is True for value in asdict(self).values())

    @property
    def names(self) -> list[str]:
        """The flags that are set, with their details."""
        facts = asdict(self)
        told = []
        for name, value in facts.items():
            if value is True:
                details = facts.get(f"{name}_details") or facts.get(f"{name}_type")
                told.append(f"{name}: {details}" if details else name)
        return told

    def __or__(self, other: Errors) -> Errors:
        """What went wrong in either."""
        mine, others = asdict(self), asdict(other)
        return Errors(**{name: mine[name] or others[name] for name in mine})


@dataclass(frozen=True)
class Tokens:
    """What a model that grades has read and written."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    calls: int = 0

    @property
    def total_tokens(self) -> int:
        """Read and written."""
        return self.prompt_tokens + self.completion_tokens

    def __add__(self, other: Tokens) -> Tokens:
        """Both together."""
        mine, others = asdict(self), asdict(other)
        return Tokens(**{name: mine[name] + others[name] for name in mine})


@dataclass(frozen=True)
class Grading:
    """A reward; 0 where `errors` says that there could be none. `usage` is by model, `parts` are those of multi."""

    name: str
    type: str
    reward: float = 0.0
    errors: Errors = Errors()
    seconds: float = 0.0
    message: str = ""  # of an error, in words
    usage: Mapping[str, Tokens] = field(default_factory=dict)
    answer: str | None = None  # of the model that graded
    label: str | None = None
    parts: Mapping[str, Grading] = field(default_factory=dict)

    @property
    def sub_rewards(self) -> dict[str, float]:
        """The rewards of the graders of a multi grader."""
        return {name: part.reward for name, part in self.parts.items()}


@dataclass(frozen=True)
class Means:
    """What graders work with: how a model is asked, and where programs run."""

    ask: Ask
    sandbox: PythonSandbox


def grade(
    grader: Grader, text: str | None, item: Any, means: Means, sample: Mapping[str, Any] | None = None
) -> Grading:
    """Grade an answer's text (None: there is none) to a data item; `sample` is what else is known of the answer.

    Blocks as long as a model answers or a program runs. What goes wrong is told in the result.
    """
    started = time.perf_counter()
    values = variables(item, text, sample)
    done = _multi(grader, values, means) if isinstance(grader, Multi) else _grade(grader, values, means)
    return replace(done, seconds=time.perf_counter() - started)


def check(grader: Grader, sandbox: PythonSandbox) -> None:
    """Raise InputError for a program that does not load or defines no `grade`. The rest was checked when read."""
    for single in singles(grader):
        if isinstance(single, PythonGrader) and (result := sandbox.check(single.source)).failure:
            raise InputError(
                f"The source of the grader {single.name!r} cannot be run: {result.details}", param="source"
            )


def _multi(grader: Multi, values: Mapping[str, Any], means: Means) -> Grading:
    started = time.perf_counter()
    parts: dict[str, Grading] = {}
    usage: dict[str, Tokens] = {}
    errors, messages = Errors(), []
    for name, member in grader.members().items():
        part = parts[name] = _grade(member, values, means)
        errors |= part.errors
        messages += [part.message] * bool(part.message)
        for model, tokens in part.usage.items():
            usage[model] = usage.get(model, Tokens()) + tokens
    done = Grading(
        grader.name,
        grader.type,
        0.0,
        errors,
        time.perf_counter() - started,
        " ".join(messages),
        usage,
        parts=parts,
    )
    if errors.any:
        return done
    try:
        return replace(done, reward=grader.formula()({name: part.reward for name, part in parts.items()}))
    except InputError as error:
        return replace(done, errors=Errors(formula_parse_error=True), message=error.message)


def _grade(grader: Single, values: Mapping[str, Any], means: Means) -> Grading:
    blank = Grading(grader.name, grader.type)
    try:
        if isinstance(grader, StringCheck):
            text, reference = render(grader.input, values), render(grader.reference, values)
            return replace(blank, reward=float(CHECKS[grader.operation](text, reference)))
        if isinstance(grader, TextSimilarity):
            text, reference = render(grader.input, values), render(grader.reference, values)
            return replace(blank, reward=similarity(grader.evaluation_metric, text, reference))
        if isinstance(grader, PythonGrader):
            return _by_program(blank, grader, values, means.sandbox)
        return _by_model(blank, grader, values, means.ask)
    except NotJsonError as error:
        return replace(blank, errors=Errors(sample_parse_error=True), message=error.message)
    except MissingError as error:
        return replace(blank, errors=Errors(invalid_variable_error=True), message=error.message)
    except LapisError as error:
        return replace(blank, errors=Errors(other_error=True), message=str(error))


def _by_program(
    blank: Grading, grader: PythonGrader, values: Mapping[str, Any], sandbox: PythonSandbox
) -> Grading:
    result = sandbox.grade(grader.source, values["sample"], values["item"])
    if result.failure is None:
        return replace(blank, reward=result.value)
    if result.failure == "server":
        errors = Errors(python_grader_server_error=True, python_grader_server_error_type=result.details)
    elif result.failure == "time":
        errors = Errors(unresponsive_reward_error=True)
    else:
        errors = Errors(python_grader_runtime_error=True, python_grader_runtime_error_details=result.details)
    return replace(blank, errors=errors, message=result.details)


def _by_model(
    blank: Grading, grader: ScoreModel | LabelModel, values: Mapping[str, Any], ask: Ask
) -> Grading:
    asked = model_grader.question(grader, values)
    try:
        answer = ask(asked)
    except LapisError as error:
        failed = Errors(model_grader_server_error=True, model_grader_server_error_details=error.message)
        return replace(blank, errors=failed, message=error.message)
    tokens = Tokens(answer.prompt_tokens, answer.completion_tokens, answer.cached_tokens, 1)
    done = replace(blank, usage={grader.model: tokens}, answer=answer.text)
    if answer.refused:
        return replace(
            done, errors=Errors(model_grader_refusal_error=True), message="The model refused to grade."
        )
    if isinstance(grader, LabelModel):
        label = model_grader.label(grader, answer.text)
        if label is not None:
            return replace(done, reward=float(label in grader.passing_labels), label=label)
    elif (score := model_grader.score(grader, answer.text)) is not None:
        return replace(done, reward=score)
    return _unread(done, answer)


def _unread(done: Grading, answer: Answer) -> Grading:
    errors = Errors(model_grader_parse_error=True, truncated_observation_error=answer.cut)
    why = "ended before it told a result" if answer.cut else "tells no result"
    return replace(
        done, errors=errors, message=f"The answer of the model that grades {why}: {answer.text[:200]!r}"
    )
