"""The graders that OpenAI's client describes, as checked values: what a request, a stored eval or a recipe says."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from lapis.errors import InputError
from lapis.evaluate.graders.formula import Formula
from lapis.evaluate.graders.python_grader import SOURCE_LIMIT
from lapis.evaluate.graders.similarity import Metric
from lapis.evaluate.graders.template import check_template

Name = Annotated[str, Field(min_length=1, max_length=256)]


def _checked(text: str) -> str:
    check_template(text)
    return text


def _text_only(content: Any) -> Any:
    for part in content if isinstance(content, list) else [content]:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind in ("input_image", "input_audio"):
            raise InputError(
                f"A grader's input of type {kind!r} is not offered: our models read text.", param="input"
            )
    return content


Text = Annotated[str, Field(max_length=1 << 20), AfterValidator(_checked)]  # may hold templates
Threshold = Annotated[float, Field(allow_inf_nan=False)] | None


class Part(BaseModel):
    """A value of a grader; unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class TextPart(Part):
    """A piece of a message."""

    type: Literal["input_text", "output_text"]
    text: Text


class Message(Part):
    """A message to the model that grades; its text may hold templates."""

    role: Literal["user", "assistant", "system", "developer"]
    content: Annotated[Text | TextPart | list[Text | TextPart], BeforeValidator(_text_only)]
    type: Literal["message"] | None = None

    @property
    def texts(self) -> list[str]:
        """Its pieces of text."""
        parts = self.content if isinstance(self.content, list) else [self.content]
        return [part if isinstance(part, str) else part.text for part in parts]


class _Named(Part):
    name: Name


class StringCheck(_Named):
    """1 where a text is (eq), is not (ne) or holds (like; ilike: whatever its capitals) a reference, else 0."""

    type: Literal["string_check"]
    input: Text
    reference: Text
    operation: Literal["eq", "ne", "like", "ilike"]


class TextSimilarity(_Named):
    """How much a text is like a reference, from 0 to 1; the measures are in similarity.py."""

    type: Literal["text_similarity"]
    input: Text
    reference: Text
    evaluation_metric: Metric
    pass_threshold: Threshold = None


class PythonGrader(_Named):
    """A program whose `grade(sample, item)` returns a number."""

    type: Literal["python"]
    source: Annotated[str, Field(min_length=1, max_length=SOURCE_LIMIT)]
    image_tag: str | None = None
    pass_threshold: Threshold = None

    @model_validator(mode="after")
    def _one_image(self) -> Self:
        if self.image_tag is not None:
            raise InputError("image_tag is not offered: there is one environment.", param="image_tag")
        return self


class Sampling(Part):
    """How the model that grades is sampled."""

    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    seed: int | None = None
    max_completions_tokens: Annotated[int, Field(ge=1)] | None = None
    reasoning_effort: None = None


class _ByModel(_Named):
    model: Name
    input: Annotated[list[Message], Field(min_length=1)]


class ScoreModel(_ByModel):
    """A number that a model gives, within a range."""

    type: Literal["score_model"]
    range: Annotated[list[float], Field(min_length=2, max_length=2)] | None = None
    sampling_params: Sampling | None = None
    pass_threshold: Threshold = None

    @model_validator(mode="after")
    def _checked(self) -> Self:
        least, most = self.bounds
        if not -math.inf < least < most < math.inf:
            raise InputError(
                f"range = [{least:g}, {most:g}] must be two numbers, the smaller one first.", param="range"
            )
        return self

    @property
    def bounds(self) -> tuple[float, float]:
        """The least and the greatest score."""
        least, most = self.range or (0.0, 1.0)
        return float(least), float(most)


class LabelModel(_ByModel):
    """1 where the label that a model chooses is a passing one, else 0."""

    type: Literal["label_model"]
    labels: Annotated[list[Name], Field(min_length=1, max_length=100)]
    passing_labels: Annotated[list[Name], Field(min_length=1)]

    @model_validator(mode="after")
    def _checked(self) -> Self:
        unknown = sorted({*self.passing_labels} - {*self.labels})
        if unknown:
            raise InputError(f"passing_labels has {unknown[0]!r}, which is no label.", param="passing_labels")
        return self


Single = Annotated[
    StringCheck | TextSimilarity | PythonGrader | ScoreModel | LabelModel, Field(discriminator="type")
]


class Multi(_Named):
    """A formula over the rewards of other graders, which it calls by their names."""

    type: Literal["multi"]
    graders: (
        Any  # one grader, a list of them, or an object of them by name: the client's type and guide differ
    )
    calculate_output: str

    @model_validator(mode="after")
    def _checked(self) -> Self:
        self.formula()
        return self

    def members(self) -> dict[str, Single]:
        """The graders, by the names that the formula uses. Raises InputError."""
        given = self.graders
        if isinstance(given, Mapping) and "type" not in given:
            return {str(name): _single(value, f"graders.{name}") for name, value in given.items()}
        listed = [given] if isinstance(given, Mapping) else given
        if not isinstance(listed, Sequence) or isinstance(listed, str) or not listed:
            raise InputError("graders must hold graders: one, a list, or an object by name.", param="graders")
        members = [_single(value, "graders") for value in listed]
        names = [member.name for member in members]
        if len({*names}) < len(names):
            raise InputError("Two graders of a multi grader have the same name.", param="graders")
        return dict(zip(names, members, strict=True))

    def formula(self) -> Formula:
        """How the rewards become one. Raises InputError for what cannot be read, or names no grader."""
        return Formula(self.calculate_output, self.members().keys())


Grader = Annotated[
    StringCheck | TextSimilarity | PythonGrader | ScoreModel | LabelModel | Multi, Field(discriminator="type")
]
_GRADER: TypeAdapter[Any] = TypeAdapter(Grader)
_SINGLE: TypeAdapter[Any] = TypeAdapter(Single)


def read_grader(value: Any, param: str = "grader") -> Grader:
    """A grader from JSON. Raises InputError naming the field."""
    found: Grader = _read(_GRADER, value, param)
    return found


def singles(grader: Grader) -> Iterator[Single]:
    """A grader, or those that a multi grader is made of."""
    if isinstance(grader, Multi):
        yield from grader.members().values()
    else:
        yield grader


def models_of(grader: Grader) -> set[str]:
    """The models that a grader asks."""
    return {single.model for single in singles(grader) if isinstance(single, _ByModel)}


def texts_of(single: Single) -> list[str]:
    """The templates of a grader."""
    if isinstance(single, StringCheck | TextSimilarity):
        return [single.input, single.reference]
    if isinstance(single, _ByModel):
        return [text for message in single.input for text in message.texts]
    return []


def passing(single: Single, score: float) -> bool:
    """Whether a score passes: at least `pass_threshold`, or without one at least half of the way to the best."""
    threshold = getattr(single, "pass_threshold", None)
    if threshold is None:
        least, most = single.bounds if isinstance(single, ScoreModel) else (0.0, 1.0)
        threshold = (least + most) / 2
    return score >= threshold and not math.isnan(score)


def _single(value: Any, param: str) -> Single:
    found: Single = _read(_SINGLE, value, param)
    return found


def _read(adapter: TypeAdapter[Any], value: Any, param: str) -> Any:
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join([param, *(str(part) for part in problem["loc"])])
        raise InputError(
            f"{where}: {problem['msg'][:1].lower()}{problem['msg'][1:]}.", param=where
        ) from error
