"""Evals through the official client, strict about every answer; the model is the FakeEngine with a reply of its own."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from openai import APIStatusError, BadRequestError, ConflictError, NotFoundError, OpenAI

from lapis.gateway import eval_runner
from lapis.home import Home
from lapis.server import RunningServer
from lapis.tenants.keys import ApiKeys
from lapis.tenants.quota import Quota
from lapis.tenants.tenant import Tenants
from tests.integration.test_api_limits import until
from tests.integration.test_serve import serving
from tests.served import fake_server, model_folder

CONFIG: dict[str, Any] = {
    "type": "custom",
    "include_sample_schema": True,
    "item_schema": {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}, "sum": {"type": "string"}},
        "required": ["a", "b", "sum"],
        "additionalProperties": False,
    },
}
EQUAL: dict[str, Any] = {
    "type": "string_check", "name": "equal", "operation": "eq",
    "input": "{{ sample.output_text }}", "reference": "{{ item.sum }}",
}  # fmt: skip
ALIKE: dict[str, Any] = {
    "type": "text_similarity", "name": "alike", "evaluation_metric": "fuzzy_match", "pass_threshold": 0.5,
    "input": "{{ sample.output_text }}", "reference": "{{ item.sum }}",
}  # fmt: skip
PROGRAM: dict[str, Any] = {
    "type": "python", "name": "near", "pass_threshold": 0.9,
    "source": "def grade(sample, item):\n    return 1 - abs(int(sample['output_text']) - int(item['sum'])) / 100",
}  # fmt: skip
SCORE: dict[str, Any] = {
    "type": "score_model", "name": "judge", "model": "tiny", "range": [0, 10], "pass_threshold": 5,
    "input": [{"role": "user", "content": "Judge {{ sample.output_text }}"}],
}  # fmt: skip
LABEL: dict[str, Any] = {
    "type": "label_model", "name": "tone", "model": "tiny", "labels": ["right", "wrong"], "passing_labels": ["right"],
    "input": [{"role": "user", "content": "Label {{ sample.output_text }}"}],
}  # fmt: skip
TEMPLATE = {"type": "template", "template": [{"role": "user", "content": "Add {{ item.a }} + {{ item.b }}"}]}
ITEMS = [{"a": n, "b": 2, "sum": str(n + 2)} for n in range(6)]


def reply(prompt: str, seed: int) -> str:
    """Adds, but is wrong for 3; judges 5 badly."""
    if "Judge" in prompt:
        return json.dumps({"reasoning": "", "result": 2 if "Judge 5" in prompt else 8})
    if "Label" in prompt:
        return json.dumps({"label": "right"})
    asked = re.search(r"Add (\d+) \+ (\d+)", prompt)
    if asked is None:
        return "what?"
    return "99" if asked[1] == "3" else str(int(asked[1]) + int(asked[2]))


@pytest.fixture
def server(home: Home) -> Iterator[RunningServer]:
    with fake_server(home, reply=reply) as running:
        yield running


@pytest.fixture
def client(server: RunningServer) -> OpenAI:
    return strict(server.url)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAI]:
    """A client of one server for what leaves nothing behind."""
    with fake_server(Home(tmp_path_factory.mktemp("home")), reply=reply) as running:
        yield strict(running.url)


def strict(url: str, key: str = "x") -> OpenAI:
    return OpenAI(base_url=url, api_key=key, max_retries=0, _strict_response_validation=True)


def make(client: OpenAI, *criteria: dict[str, Any]) -> str:
    return client.evals.create(data_source_config=CONFIG, testing_criteria=criteria, name="sums").id  # type: ignore[arg-type]


def content(items: list[dict[str, Any]] = ITEMS) -> dict[str, Any]:
    return {"type": "file_content", "content": [{"item": item} for item in items]}


def completions(**more: Any) -> dict[str, Any]:
    return {"type": "completions", "model": "tiny", "source": content(), "input_messages": TEMPLATE, **more}


def upload(client: OpenAI, lines: bytes) -> str:
    """A file for evals; the client's type of files lists no such purpose."""
    loose = OpenAI(base_url=str(client.base_url), api_key=client.api_key)
    return loose.files.create(file=("rows.jsonl", lines), purpose="evals").id


def finished(client: OpenAI, eval_id: str, run_id: str) -> Any:
    until(
        lambda: client.evals.runs.retrieve(run_id, eval_id=eval_id).status not in ("queued", "in_progress"),
        30,
    )
    return client.evals.runs.retrieve(run_id, eval_id=eval_id)


def ran(client: OpenAI, eval_id: str, source: dict[str, Any]) -> Any:
    run = client.evals.runs.create(eval_id, data_source=source)  # type: ignore[arg-type]
    return finished(client, eval_id, run.id)


def test_evals_are_kept_listed_changed_and_deleted(client: OpenAI) -> None:
    ids = [make(client, EQUAL, ALIKE, PROGRAM, SCORE, LABEL) for _ in range(3)]
    made = client.evals.retrieve(ids[0])
    assert [criterion.type for criterion in made.testing_criteria] == [
        "string_check", "text_similarity", "python", "score_model", "label_model",
    ]  # fmt: skip
    assert made.data_source_config.schema_["properties"]["item"] == CONFIG["item_schema"]  # type: ignore[union-attr,index]
    changed = client.evals.update(ids[0], name="renamed", metadata={"k": "v"})
    assert (changed.name, changed.metadata) == ("renamed", {"k": "v"})
    assert client.evals.update(ids[0], name="again").metadata == {"k": "v"}
    assert [found.id for found in client.evals.list(limit=2)] == ids  # the client walks the pages
    newest = client.evals.list(order="desc", order_by="updated_at", limit=1)
    assert newest.data[0].id == ids[0] and newest.has_more
    gone = client.evals.delete(ids[1])
    assert gone.deleted and gone.eval_id == ids[1]
    with pytest.raises(NotFoundError):
        client.evals.retrieve(ids[1])


def test_a_model_is_asked_for_each_item_and_its_answers_are_graded(
    client: OpenAI, server: RunningServer
) -> None:
    eval_id = make(client, EQUAL, ALIKE, PROGRAM)
    run = ran(client, eval_id, completions(sampling_params={"temperature": 0.2, "max_completion_tokens": 20}))
    assert run.status == "completed" and run.model == "tiny"
    assert run.report_url == f"{server.url}/evals/{eval_id}/runs/{run.id}"
    counts = run.result_counts
    assert (counts.total, counts.passed, counts.failed, counts.errored) == (6, 5, 1, 0)
    told = {one.testing_criteria: (one.passed, one.failed) for one in run.per_testing_criteria_results}
    assert told == {"equal": (5, 1), "alike": (5, 1), "near": (5, 1)}
    items = list(client.evals.runs.output_items.list(run.id, eval_id=eval_id, limit=4))
    assert [item.datasource_item for item in items] == ITEMS
    wrong = items[3]
    assert wrong.status == "fail" and wrong.sample.output[0].content == "99"
    assert wrong.sample.input[0].content == "Add 3 + 2" and wrong.sample.finish_reason == "stop"
    assert (wrong.sample.temperature, wrong.sample.max_completion_tokens) == (0.2, 20)
    assert [(one.name, one.passed, round(one.score, 2)) for one in wrong.results] == [
        ("equal", False, 0), ("alike", False, 0), ("near", False, 0.06),
    ]  # fmt: skip
    only = client.evals.runs.output_items.list(run.id, eval_id=eval_id, status="fail").data
    assert [item.id for item in only] == [wrong.id]
    alone = client.evals.runs.output_items.retrieve(wrong.id, eval_id=eval_id, run_id=run.id)
    assert alone.model_dump() == wrong.model_dump()
    (used,) = run.per_model_usage
    assert used.invocation_count == 6 and used.run_model_name == "tiny"
    assert used.total_tokens == sum(item.sample.usage.total_tokens for item in items)
    server.services.meter.flush()
    assert server.services.meter._ledger.balance("default").used == used.total_tokens


def test_models_grade_and_are_paid_for_too(client: OpenAI, server: RunningServer) -> None:
    run = ran(client, make(client, SCORE, LABEL), completions())
    told = {one.testing_criteria: (one.passed, one.failed) for one in run.per_testing_criteria_results}
    assert told == {"judge": (6, 0), "tone": (6, 0)}
    (used,) = run.per_model_usage
    assert used.invocation_count == 18
    server.services.meter.flush()
    assert server.services.meter._ledger.balance("default").used == used.total_tokens
    item = client.evals.runs.output_items.list(run.id, eval_id=run.eval_id).data[0]
    assert item.results[0].score == 8 and "result" in str(item.results[0].sample)
    assert item.results[1].sample == {"output": '{"label": "right"}', "label": "right"}


def test_samples_of_a_file_are_graded_as_they_are(shared: OpenAI) -> None:
    rows = [{"item": item, "sample": {"output_text": "4"}} for item in ITEMS[:3]] + [{"item": ITEMS[3]}]
    lines = "\n\n".join(json.dumps(row) for row in rows).encode()
    file = upload(shared, lines)
    run = ran(shared, make(shared, EQUAL), {"type": "jsonl", "source": {"type": "file_id", "id": file}})
    counts = run.result_counts
    assert (counts.passed, counts.failed, counts.errored) == (1, 2, 1)
    assert run.model == "" and run.per_model_usage == []
    items = shared.evals.runs.output_items.list(run.id, eval_id=run.eval_id).data
    assert [item.status for item in items] == ["fail", "fail", "pass", "error"]
    assert items[3].results[0].errors == ["invalid_variable_error"]  # type: ignore[attr-defined]


def test_responses_and_messages_of_items_are_sources_too(shared: OpenAI) -> None:
    source = {
        **completions(),
        "type": "responses",
        "sampling_params": {"max_completion_tokens": 9, "seed": 7},
    }
    run = ran(shared, make(shared, EQUAL), source)
    assert (run.result_counts.passed, run.result_counts.failed) == (5, 1)
    sample = shared.evals.runs.output_items.list(run.id, eval_id=run.eval_id).data[0].sample
    assert (sample.seed, sample.max_completion_tokens, sample.usage.completion_tokens > 0) == (7, 9, True)

    talk = [
        {"type": "message", "role": "system", "content": "You add."},
        {"role": "user", "content": "Add 4 + 5"},
    ]
    wide = {"type": "custom", "item_schema": {"type": "object", "required": ["talk"]}}
    ended = {**EQUAL, "reference": "{{ item.talk[1].expected }}", "operation": "like"}
    made = shared.evals.create(data_source_config=wide, testing_criteria=[{**EQUAL, "reference": "9"}])  # type: ignore[arg-type,list-item]
    for item in ({"talk": talk}, {"talk": "Add 4 + 5"}):
        reference = {"type": "item_reference", "item_reference": "item.talk"}
        run = ran(shared, made.id, completions(source=content([item]), input_messages=reference))
        assert run.result_counts.passed == 1, ended


def test_items_that_fail_are_counted_apart(shared: OpenAI) -> None:
    """The context is too short for one of them; a program does not understand another one's answer."""
    template = {"type": "template", "template": [{"role": "user", "content": "{{ item.text }}"}]}
    config = {"type": "custom", "item_schema": {"type": "object"}}
    made = shared.evals.create(data_source_config=config, testing_criteria=[PROGRAM])  # type: ignore[arg-type,list-item]
    items = [
        {"text": "x " * 30_000, "sum": "1"},
        {"text": "hello", "sum": "1"},
        {"text": "Add 1 + 1", "sum": "2"},
    ]
    run = ran(shared, made.id, completions(source=content(items), input_messages=template))
    counts = run.result_counts
    assert (counts.total, counts.passed, counts.failed, counts.errored) == (3, 1, 0, 2)
    shown = shared.evals.runs.output_items.list(run.id, eval_id=made.id).data
    assert shown[0].sample.error.code == "400" and "tokens" in shown[0].sample.error.message
    assert shown[0].results == [] and shown[0].sample.finish_reason == "error"
    assert "ValueError" in shown[1].results[0].message  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"data_source_config": {"type": "logs"}}, "keeps no chats"),
        ({"data_source_config": {"type": "stored_completions", "metadata": {}}}, "keeps no chats"),
        ({"data_source_config": {"type": "custom", "item_schema": {"type": "objekt"}}}, "no JSON Schema"),
        ({"data_source_config": {"type": "custom", "item_schema": {"$ref": "http://x/y"}}}, "leads nowhere"),
        ({"data_source_config": {"type": "custom", "item_schema": {"not": {"$ref": "#/not"}}}}, "circle"),
        ({"testing_criteria": []}, "testing_criteria"),
        (
            {"testing_criteria": [{**EQUAL, "reference": "{{ item.sun }}"}]},
            "'equal' reads item.sun, .* 'sum'",
        ),
        ({"testing_criteria": [{**EQUAL, "input": "{{ output }}"}]}, "neither item nor sample"),
        ({"testing_criteria": [{**ALIKE, "pass_threshold": None}]}, r"testing_criteria\[0\].pass_threshold"),
        ({"testing_criteria": [{**PROGRAM, "source": "grade = 1"}]}, "no function grade"),
        ({"metadata": {"k": 1}}, "metadata"),
    ],
)
def test_an_eval_that_makes_no_sense_is_refused(shared: OpenAI, change: dict[str, Any], told: str) -> None:
    asked = {"data_source_config": CONFIG, "testing_criteria": [EQUAL], **change}
    with pytest.raises(BadRequestError, match=told):
        shared.evals.create(**asked)


def test_a_run_that_makes_no_sense_is_refused_before_it_is_queued(shared: OpenAI) -> None:
    eval_id = make(shared, EQUAL)

    def refused(error: type[APIStatusError], told: str, source: dict[str, Any]) -> None:
        with pytest.raises(error, match=told):
            shared.evals.runs.create(eval_id, data_source=source)  # type: ignore[arg-type]

    def rows(*items: dict[str, Any]) -> dict[str, Any]:
        return completions(source=content([*items]))

    refused(BadRequestError, "Row 2 does not fit .* item.sum", rows(ITEMS[0], {**ITEMS[1], "sum": 1}))
    refused(BadRequestError, "Additional properties", rows({**ITEMS[0], "x": 1}))
    refused(BadRequestError, "keeps no chats", completions(source={"type": "stored_completions"}))
    refused(NotFoundError, "file-1", completions(source={"type": "file_id", "id": "file-1"}))
    refused(NotFoundError, "'tin'", completions(model="tin"))
    foreign = {"type": "item_reference", "item_reference": "sample.x"}
    refused(BadRequestError, "must name a part of item", completions(input_messages=foreign))
    file = upload(shared, b'{"item": {"a": 1, "b": 2, "sum": "3"}}\n{"item": 3}\n')
    refused(BadRequestError, "line 2", completions(source={"type": "file_id", "id": file}))
    assert shared.evals.runs.list(eval_id).data == []


def test_runs_that_wait_for_a_limit_stop_no_other_project(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eval_runner, "PATIENCE_SECONDS", 0.2)
    with fake_server(home, reply=reply) as server:
        tenants = Tenants(server.services.db)
        keys = [ApiKeys(server.services.db).create("k", "test", project=tenants.create_project(name, "test").id)[1]
                for name in ("spent", "other")]  # fmt: skip
        tenants.set_quota("spent", Quota(requests_per_day=2), "test")
        spent, other = (strict(server.url, key) for key in keys)
        theirs = make(spent, EQUAL)
        runs = [spent.evals.runs.create(theirs, data_source=completions()).id for _ in range(3)]  # type: ignore[arg-type]
        assert ran(other, make(other, EQUAL), completions()).result_counts.passed == 5
        waiting = [spent.evals.runs.retrieve(run, eval_id=theirs) for run in runs]
        assert {run.status for run in waiting} <= {"queued", "in_progress"}
        assert sum(run.result_counts.errored for run in waiting) == 0
        assert spent.evals.runs.cancel(runs[0], eval_id=theirs).status == "canceled"


DEEP = "[" * 250 + "]" * 250


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ('"\\ud800"', "line 1: .* half of a surrogate pair"),
        ("NaN", "line 1: .* NaN"),
        (DEEP, "line 1: .* nested deeper than 200"),
        ('1, "x": 2', "line 1: The field 'x' is given twice"),
    ],
)
def test_a_row_that_no_answer_could_show_is_refused(shared: OpenAI, value: str, told: str) -> None:
    config = {"type": "custom", "item_schema": {"type": "object"}}
    made = shared.evals.create(data_source_config=config, testing_criteria=[PROGRAM])  # type: ignore[arg-type,list-item]
    file = upload(shared, f'{{"item": {{"x": {value}}}}}'.encode())
    source: dict[str, Any] = {"type": "jsonl", "source": {"type": "file_id", "id": file}}
    with pytest.raises(BadRequestError, match=told):
        shared.evals.runs.create(made.id, data_source=source)  # type: ignore[arg-type]


def test_the_deepest_sources_are_shown(shared: OpenAI) -> None:
    config = {"type": "custom", "item_schema": {"type": "object"}}
    made = shared.evals.create(data_source_config=config, testing_criteria=[EQUAL])  # type: ignore[arg-type,list-item]
    fits: list[Any] = json.loads("[" * 195 + "]" * 195)
    source = {"type": "jsonl", "source": content([{"x": fits}])}
    run = ran(shared, made.id, source)
    assert shared.evals.runs.list(made.id).data[0].id == run.id
    shown = shared.evals.runs.output_items.list(run.id, eval_id=made.id).data
    assert shown[0].datasource_item == {"x": fits}
    with pytest.raises(BadRequestError, match="nested deeper"):
        shared.evals.runs.create(
            made.id,
            data_source={"type": "jsonl", "source": content([{"x": [[fits]]}])},  # type: ignore[arg-type]
        )


def test_a_run_is_canceled_by_both_paths_and_deleted(home: Home) -> None:
    with fake_server(home, reply=lambda prompt, seed: "word " * 2000, seconds_per_token=0.02) as server:
        client = strict(server.url)
        eval_id = make(client, EQUAL)
        runs = [client.evals.runs.create(eval_id, data_source=completions()).id for _ in range(4)]  # type: ignore[arg-type]
        until(lambda: client.evals.runs.retrieve(runs[1], eval_id=eval_id).status == "in_progress")
        assert [run.id for run in client.evals.runs.list(eval_id, status="queued")] == runs[2:]
        assert client.evals.runs.cancel(runs[0], eval_id=eval_id).status == "canceled"
        old = httpx.post(f"{server.url}/evals/{eval_id}/runs/{runs[1]}", json={})
        assert (old.status_code, old.json()["status"]) == (200, "canceled")
        assert client.evals.runs.delete(runs[2], eval_id=eval_id).run_id == runs[2]
        assert client.evals.delete(eval_id).deleted  # with a run under way
        engine = server.services.router.find("tiny").load()
        until(lambda: engine.stats()["running"] == engine.stats()["waiting"] == 0)
        with pytest.raises(NotFoundError):
            client.evals.runs.retrieve(runs[3], eval_id=eval_id)


def test_an_ended_run_is_not_canceled(shared: OpenAI) -> None:
    run = ran(shared, make(shared, EQUAL), completions())
    with pytest.raises(ConflictError, match="completed") as caught:
        shared.evals.runs.cancel(run.id, eval_id=run.eval_id)
    assert caught.value.response.headers["x-should-retry"] == "false"


def test_a_run_whose_key_or_file_is_gone_fails_and_says_so(home: Home) -> None:
    with fake_server(home, reply=lambda prompt, seed: "word " * 2000, seconds_per_token=0.02) as server:
        keys = ApiKeys(server.services.db)
        key, secret = keys.create("k", "test")
        ending, client = strict(server.url, secret), strict(server.url, keys.create("other", "test")[1])
        eval_id = make(client, EQUAL)
        other, under_way = (
            side.evals.runs.create(eval_id, data_source=completions()).id  # type: ignore[arg-type]
            for side in (client, ending)
        )
        runs = client.evals.runs
        until(lambda: len(runs.list(eval_id, status="in_progress").data) == 2)  # the next ones wait for them
        by_key = ending.evals.runs.create(eval_id, data_source=completions()).id  # type: ignore[arg-type]
        file = upload(client, json.dumps({"item": ITEMS[0]}).encode())
        of_file = client.evals.runs.create(
            eval_id,
            data_source=completions(source={"type": "file_id", "id": file}),  # type: ignore[arg-type]
        ).id
        keys.revoke(key.id, "test")
        client.files.delete(file)
        told = {id: finished(client, eval_id, id) for id in (under_way, by_key, of_file)}
        client.evals.runs.cancel(other, eval_id=eval_id)
        assert {run.status for run in told.values()} == {"failed"}
        for id in (under_way, by_key):
            assert told[id].error.code == "unauthorized" and "revoked" in told[id].error.message
        assert told[of_file].error.code == "not_found" and file in told[of_file].error.message


def test_another_project_sees_nothing(server: RunningServer) -> None:
    keys = ApiKeys(server.services.db)
    Tenants(server.services.db).create_project("other", "test")
    mine = strict(server.url, keys.create("mine", "test")[1])
    theirs = strict(server.url, keys.create("theirs", "test", project="other")[1])
    run = ran(mine, make(mine, EQUAL), completions())
    item = mine.evals.runs.output_items.list(run.id, eval_id=run.eval_id).data[0].id
    own = make(theirs, EQUAL)
    assert [found.id for found in theirs.evals.list()] == [own]
    runs, items = theirs.evals.runs, theirs.evals.runs.output_items
    of_evals: list[Callable[[str], Any]] = [
        theirs.evals.retrieve,
        lambda eval_id: theirs.evals.update(eval_id, name="x"),
        theirs.evals.delete,
        lambda eval_id: runs.create(eval_id, data_source=completions()),  # type: ignore[arg-type]
        runs.list,
    ]
    of_runs: list[Callable[[str, str], Any]] = [
        lambda eval_id, run_id: runs.retrieve(run_id, eval_id=eval_id),
        lambda eval_id, run_id: runs.cancel(run_id, eval_id=eval_id),
        lambda eval_id, run_id: runs.delete(run_id, eval_id=eval_id),
        lambda eval_id, run_id: items.list(run_id, eval_id=eval_id),
        lambda eval_id, run_id: items.retrieve(item, eval_id=eval_id, run_id=run_id),
    ]
    for call in of_evals:
        assert refusal(call, run.eval_id) == refusal(call, "eval_none")
    for of_run in of_runs:
        unknown = refusal(of_run, "eval_none", "evalrun_none")
        assert refusal(of_run, run.eval_id, run.id) == unknown
        assert refusal(of_run, own, run.id) == refusal(of_run, own, "evalrun_none")
    assert mine.evals.runs.retrieve(run.id, eval_id=run.eval_id).status == "completed"


def refusal(call: Callable[..., Any], *ids: str) -> str:
    """The words of a 404, without the ids that it was asked for."""
    with pytest.raises(NotFoundError) as caught:
        call(*ids)
    return re.sub("|".join(ids), "…", str(caught.value))


@pytest.mark.long
def test_a_server_that_is_killed_goes_on_where_it_stopped(home: Home) -> None:
    """SIGKILL in the middle of a run: the next server executes the other items, and none is there twice."""
    model_folder(home.models / "tiny")
    items = [{"a": n, "b": 2, "sum": str(n + 2)} for n in range(16)]
    with serving(home, "tiny", "--port", "0", "--no-console") as (process, line):
        client = strict(_url(line))
        run = client.evals.runs.create(
            make(client, {**EQUAL, "operation": "ne"}), data_source=completions(source=content(items))
        )  # type: ignore[arg-type]
        until(lambda: client.evals.runs.retrieve(run.id, eval_id=run.eval_id).result_counts.total >= 4, 60)
        process.kill()
        process.wait()
    with serving(home, "tiny", "--port", "0", "--no-console") as (process, line):
        client = strict(_url(line))
        before = list(client.evals.runs.output_items.list(run.id, eval_id=run.eval_id, limit=100))
        assert 4 <= len(before) < 16
        done = finished(client, run.eval_id, run.id)
        assert done.status == "completed" and done.result_counts.total == done.result_counts.passed == 16
        after = list(client.evals.runs.output_items.list(run.id, eval_id=run.eval_id, limit=100))
        assert [item.datasource_item_id for item in after] == list(range(16))
        assert {item.id for item in before} <= {item.id for item in after}


def _url(line: str) -> str:
    found = re.search(r"http://\S+/v1", line)
    assert found, line
    return found[0]
