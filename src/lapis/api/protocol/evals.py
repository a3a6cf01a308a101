"""Wire shapes of evals, their runs and output items; every key that the client's types require is there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, Field, model_validator

from lapis.api.protocol.generation import Body
from lapis.api.protocol.graders import grader_object
from lapis.api.protocol.lists import Listed
from lapis.api.protocol.metadata import Metadata
from lapis.errors import InputError
from lapis.evaluate.graders.grader import Message, Single, TextSimilarity
from lapis.evaluate.graders.template import read_path
from lapis.gateway.eval_runs import EvalRun, OutputItem
from lapis.gateway.eval_source import DEPTH
from lapis.gateway.evals import Eval
from lapis.gateway.strict_json import depth

CRITERIA = 50
KEPT = "This server keeps no chats to evaluate: send the rows yourself (file_content or file_id)."
Name = Annotated[str, Field(max_length=512)]
Number = Annotated[float, Field(allow_inf_nan=False)]


def _refuse_kept(value: Any) -> Any:
    kind = value.get("type") if isinstance(value, Mapping) else None
    if kind in ("logs", "stored_completions", "responses"):
        raise InputError(f"{kind!r} is not offered. {KEPT}", param="type")
    return value


def _refuse_deep(value: Any) -> Any:
    if depth(value) > DEPTH:
        raise InputError(f"data_source is nested deeper than {DEPTH} levels.", param="data_source")
    return value


class CustomConfig(Body):
    """Which rows an eval takes."""

    type: Literal["custom"]
    item_schema: dict[str, Any]
    include_sample_schema: bool = False


class EvalCreateRequest(Body):
    """A new eval."""

    data_source_config: Annotated[CustomConfig, BeforeValidator(_refuse_kept)]
    testing_criteria: Annotated[list[Single], Field(min_length=1, max_length=CRITERIA)]
    name: Name | None = None
    metadata: Metadata = Field(default_factory=dict)

    @model_validator(mode="after")
    def _similarities_have_thresholds(self) -> Self:
        for number, criterion in enumerate(self.testing_criteria):
            if isinstance(criterion, TextSimilarity) and criterion.pass_threshold is None:
                param = f"testing_criteria[{number}].pass_threshold"
                raise InputError(f"The field {param!r} is required and missing.", param=param)
        return self


class EvalUpdateRequest(Body):
    """What of an eval may change."""

    name: Name | None = None
    metadata: Annotated[Metadata | None, Field()] = None


class SourceRow(Body):
    """A row of a data source."""

    item: dict[str, Any]
    sample: dict[str, Any] | None = None


class FileContent(Body):
    """Rows in the request itself."""

    type: Literal["file_content"]
    content: Annotated[list[SourceRow], Field(min_length=1)]


class FileId(Body):
    """Rows in a file of JSON lines."""

    type: Literal["file_id"]
    id: Annotated[str, Field(min_length=1, max_length=256)]


Source = Annotated[
    Annotated[FileContent | FileId, Field(discriminator="type")], BeforeValidator(_refuse_kept)
]


class Template(Body):
    """Messages with the item's values in them."""

    type: Literal["template"]
    template: Annotated[list[Message], Field(min_length=1)]


class ItemReference(Body):
    """Messages that the item holds."""

    type: Literal["item_reference"]
    item_reference: Annotated[str, Field(max_length=1000)]

    @model_validator(mode="after")
    def _of_the_item(self) -> Self:
        if read_path(self.item_reference)[0] != "item":
            raise InputError(
                f"item_reference = {self.item_reference!r} must name a part of item.", param="item_reference"
            )
        return self


InputMessages = Annotated[Template | ItemReference, Field(discriminator="type")]


class _Sampling(Body):
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    seed: int | None = None
    reasoning_effort: None = None
    tools: list[dict[str, Any]] | None = None


class ChatSampling(_Sampling):
    """How chats are sampled."""

    response_format: dict[str, Any] | None = None


class ResponseSampling(_Sampling):
    """How responses are sampled."""

    text: dict[str, Any] | None = None


class JsonlSource(Body):
    """Rows that are graded as they are."""

    type: Literal["jsonl"]
    source: Source


class _Sampled(Body):
    source: Source
    model: Annotated[str, Field(min_length=1, max_length=256)]
    input_messages: InputMessages


class CompletionsSource(_Sampled):
    """Rows that a model answers through the chat API."""

    type: Literal["completions"]
    sampling_params: ChatSampling | None = None


class ResponsesSource(_Sampled):
    """Rows that a model answers through the responses API."""

    type: Literal["responses"]
    sampling_params: ResponseSampling | None = None


class EvalRunRequest(Body):
    """A new run."""

    data_source: Annotated[
        Annotated[JsonlSource | CompletionsSource | ResponsesSource, Field(discriminator="type")],
        BeforeValidator(_refuse_deep),
    ]
    name: Name | None = None
    metadata: Metadata = Field(default_factory=dict)


class ConfigObject(BaseModel):
    """The schema of what graders see."""

    type: Literal["custom"] = "custom"
    schema_: dict[str, Any] = Field(serialization_alias="schema")


class EvalObject(Listed):
    """An eval."""

    object: Literal["eval"] = "eval"
    name: str
    created_at: int
    data_source_config: ConfigObject
    testing_criteria: list[dict[str, Any]]
    metadata: dict[str, str]


class EvalDeleted(BaseModel):
    """The answer to an eval's deletion."""

    object: Literal["eval.deleted"] = "eval.deleted"
    deleted: Literal[True] = True
    eval_id: str


class EvalError(BaseModel):
    """What ended a run, or an item; both are empty where nothing did."""

    code: str = ""
    message: str = ""


class ModelUsage(BaseModel):
    """What a model has read and written in a run, answering or grading."""

    model_name: str
    invocation_count: int
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    total_tokens: int


class CriterionCounts(BaseModel):
    """How the items came out by one criterion."""

    testing_criteria: str
    passed: int
    failed: int


class ResultCounts(BaseModel):
    """How the items came out that were executed."""

    total: int
    passed: int
    failed: int
    errored: int


class EvalRunObject(Listed):
    """A run."""

    object: Literal["eval.run"] = "eval.run"
    eval_id: str
    name: str
    status: str
    created_at: int
    model: str
    data_source: dict[str, Any]
    metadata: dict[str, str]
    error: EvalError
    result_counts: ResultCounts
    per_model_usage: list[ModelUsage]
    per_testing_criteria_results: list[CriterionCounts]
    report_url: str


class EvalRunDeleted(BaseModel):
    """The answer to a run's deletion."""

    object: Literal["eval.run.deleted"] = "eval.run.deleted"
    deleted: Literal[True] = True
    run_id: str


class OutputItemObject(Listed):
    """An item of a run: the data, the model's answer, what each criterion says."""

    object: Literal["eval.run.output_item"] = "eval.run.output_item"
    eval_id: str
    run_id: str
    created_at: int
    status: str
    datasource_item_id: int
    datasource_item: dict[str, Any]
    results: list[dict[str, Any]]
    sample: dict[str, Any]


def criteria_of(body: EvalCreateRequest) -> list[dict[str, Any]]:
    """The testing criteria as they were sent."""
    return [grader_object(criterion) for criterion in body.testing_criteria]


def eval_object(made: Eval) -> EvalObject:
    """An eval on the wire."""
    properties: dict[str, Any] = {"item": made.item_schema}
    if made.with_sample:
        text = {"output_text": {"type": "string"}, "output_json": {}}
        properties["sample"] = {"type": "object", "properties": text}
    return EvalObject(
        id=made.id,
        name=made.name,
        created_at=int(made.created_at),
        data_source_config=ConfigObject(
            schema_={"type": "object", "properties": properties, "required": [*properties]}
        ),
        testing_criteria=[dict(criterion) for criterion in made.testing_criteria],
        metadata=dict(made.metadata),
    )


def run_object(run: EvalRun, made_of: Eval, report_url: str) -> EvalRunObject:
    """A run on the wire."""
    counts = run.counts
    return EvalRunObject(
        id=run.id,
        eval_id=run.eval_id,
        name=run.name,
        status=run.status,
        created_at=int(run.created_at),
        model=str(run.data_source.get("model", "")),
        data_source=dict(run.data_source),
        metadata=dict(run.metadata),
        error=EvalError(**(run.error or {})),
        result_counts=ResultCounts(
            total=counts.total, passed=counts.passed, failed=counts.failed, errored=counts.errored
        ),
        per_model_usage=[
            ModelUsage(
                model_name=model, **vars(used), total_tokens=used.prompt_tokens + used.completion_tokens
            )
            for model, used in sorted(counts.usage.items())
        ],
        per_testing_criteria_results=[
            CriterionCounts(testing_criteria=criterion["name"], passed=passed, failed=failed)
            for criterion, (passed, failed) in zip(made_of.testing_criteria, counts.criteria, strict=True)
        ],
        report_url=report_url,
    )


def item_object(item: OutputItem, run: EvalRun) -> OutputItemObject:
    """An item on the wire."""
    return OutputItemObject(
        id=item.id,
        eval_id=run.eval_id,
        run_id=run.id,
        created_at=int(item.created_at),
        status=item.status,
        datasource_item_id=item.number,
        datasource_item=item.body["item"],
        results=item.body["results"],
        sample=item.body["sample"],
    )
