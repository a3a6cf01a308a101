"""What eval runs stand on: schemas that cannot hold the server up, leases, rows, patience."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy.engine import Engine

from lapis.db import open_database, write
from lapis.errors import AuthError, ConflictError, InputError, NotFoundError
from lapis.gateway.eval_runs import LEASE_SECONDS, EvalRun, EvalRuns, ItemResult, Used
from lapis.gateway.eval_sampling import SEED, asking
from lapis.gateway.eval_source import count_rows, data_rows
from lapis.gateway.evals import Eval, EvalStore
from lapis.gateway.files import FileStore
from lapis.gateway.inside import Answer, post_patiently
from lapis.gateway.item_schema import ItemSchema
from lapis.gateway.on_behalf import kept, restored
from lapis.home import Home
from lapis.tables.tenants import projects
from lapis.tenants.keys import LOCAL, ApiKeys, Identity

CRITERION = {"type": "string_check", "name": "same", "operation": "eq", "input": "a", "reference": "a"}
SOURCE = {"type": "jsonl", "source": {"type": "file_content", "content": [{"item": {}}]}}
OTHER = replace(LOCAL, project_id="proj_2")


@pytest.fixture
def db(home: Home) -> Iterator[Engine]:
    made = open_database(home.database_url)
    with write(made) as connection:
        row = {"id": "proj_2", "organization_id": "default", "name": "second", "created_at": 0.0}
        connection.execute(projects.insert().values(**row))
    yield made
    made.dispose()


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        self.now += 0.001
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def an_eval(db: Engine, clock: Clock, project: str = "default") -> Eval:
    return EvalStore(db, clock).create(project, None, {"type": "object"}, False, [CRITERION], {})


def a_run(runs: EvalRuns, made_of: Eval, identity: Identity = LOCAL) -> EvalRun:
    return runs.create(identity, made_of, None, {}, SOURCE, 3)


def item(number: int, passed: bool = True) -> ItemResult:
    used = {"m": Used(3, 2, 1, 1)}
    return ItemResult(
        number, "pass" if passed else "fail", {}, {}, [{"name": "same", "passed": passed}], used
    )


def test_an_item_is_recorded_once_and_by_the_holder_of_the_lease_alone(db: Engine, clock: Clock) -> None:
    runs = EvalRuns(db, clock)
    made_of = an_eval(db, clock)
    a_run(runs, made_of)
    first = runs.claim()
    assert first is not None and first.status == "in_progress" and runs.claim() is None
    runs.record(first, item(0))
    clock.now += LEASE_SECONDS / 2
    assert runs.renew(first)
    clock.now += LEASE_SECONDS * 0.9
    assert runs.claim() is None
    clock.now += LEASE_SECONDS * 0.2
    second = runs.claim()  # the first one was killed
    assert second is not None and second.id == first.id and runs.recorded(second) == {0}
    with pytest.raises(ConflictError):
        runs.record(first, item(1))
    assert not runs.renew(first) and not runs.is_mine(first)
    runs.finish(first, "completed")
    runs.release(first)
    runs.record(second, item(1, passed=False))
    runs.finish(second, "completed")
    done = runs.get("default", made_of.id, first.id)
    assert (done.status, done.counts.passed, done.counts.failed) == ("completed", 1, 1)
    assert done.counts.criteria == [[1, 1]] and done.counts.usage == {"m": Used(6, 4, 2, 2)}
    found, more = runs.items(done, status=None, after=None, limit=1, order="desc")
    assert [one.number for one in found] == [1] and more


def test_projects_take_turns_and_a_released_run_is_free_at_once(db: Engine, clock: Clock) -> None:
    runs = EvalRuns(db, clock)
    mine, theirs = an_eval(db, clock), an_eval(db, clock, "proj_2")
    many = [a_run(runs, mine).id for _ in range(3)]
    late = a_run(runs, theirs, OTHER).id
    claimed = [runs.claim() for _ in range(3)]
    assert [run.id for run in claimed if run] == [many[0], late, many[1]]
    assert claimed[0] is not None
    runs.release(claimed[0])
    again = runs.claim()
    assert again is not None and again.id == many[0] and again.lease != claimed[0].lease


def test_the_last_runs_of_all_evals_are_those_of_one_project(db: Engine, clock: Clock) -> None:
    runs = EvalRuns(db, clock)
    first, second, theirs = an_eval(db, clock), an_eval(db, clock), an_eval(db, clock, "proj_2")
    made = [a_run(runs, of).id for of in (first, second, first)]
    foreign = a_run(runs, theirs, OTHER).id
    assert [(run.id, name) for run, name in runs.recent("default", 2)] == [
        (made[2], first.name),
        (made[1], second.name),
    ]
    assert [run.id for run, _ in runs.recent("proj_2", 10)] == [foreign]


def test_a_canceled_or_deleted_run_takes_no_more_items(db: Engine, clock: Clock) -> None:
    runs, store = EvalRuns(db, clock), EvalStore(db, clock)
    made_of = an_eval(db, clock)
    a_run(runs, made_of), a_run(runs, made_of)
    first, second = runs.claim(), runs.claim()
    assert first is not None and second is not None
    runs.record(first, item(0))
    assert runs.cancel("default", made_of.id, first.id).counts.total == 1
    assert runs.cancel("default", made_of.id, first.id).status == "canceled"
    store.delete("default", made_of.id)
    for run in (first, second):
        with pytest.raises(ConflictError):
            runs.record(run, item(1))
    with pytest.raises(NotFoundError):
        a_run(runs, made_of)
    assert runs.claim() is None


def test_work_goes_on_in_the_name_of_its_key_as_long_as_there_is_one(db: Engine) -> None:
    keys = ApiKeys(db)
    key, text = keys.create("k", "test")
    identity = keys.verify(text)
    assert restored(kept(identity), keys) == replace(identity, background=True)
    assert restored(kept(LOCAL), keys) == replace(LOCAL, background=True)
    keys.revoke(key.id, "test")
    with pytest.raises(AuthError, match="revoked"):
        restored(kept(identity), keys)


def doubling(depth: int) -> dict[str, Any]:
    """A small schema of 2^depth parts once its references are followed."""
    named = {f"d{n}": {"anyOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(depth)}
    return {"$ref": "#/$defs/d0", "$defs": {**named, f"d{depth}": False}}


@pytest.mark.parametrize(
    ("schema", "told"),
    [
        (doubling(40), "more than"),
        ({"$ref": "#"}, "leads nowhere"),
        ({"$defs": {"a": {"not": {"$ref": "#/$defs/a"}}}, "$ref": "#/$defs/a"}, "circle"),
        ({"properties": {"default": {"$ref": "#/properties/default"}}}, "circle"),
        ({"$ref": "file:///etc/passwd"}, "leads nowhere"),
        ({"$dynamicRef": "#x"}, "not offered"),
        ({"type": "objekt"}, "no JSON Schema"),
        ({"pattern": "(a)\\1"}, "no JSON Schema"),
    ],
)
def test_a_schema_that_could_hold_the_server_up_is_refused(schema: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        ItemSchema(schema)


def test_a_schema_nested_without_end_is_refused() -> None:
    schema: dict[str, Any] = {}
    for _ in range(690):
        schema = {"not": schema}
    with pytest.raises(InputError, match="deep|no JSON Schema"):
        ItemSchema(schema)


def test_a_schema_says_what_is_wrong_where() -> None:
    point = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
    schema = ItemSchema({"properties": {"points": {"items": {"$ref": "#/$defs/p"}}}, "$defs": {"p": point}})
    assert schema.problem({"points": [{"x": 1}, {"x": 2}]}) is None
    assert (
        schema.problem({"points": [{"x": 1}, {"x": "2"}]}) == 'item.points.1.x: "2" is not of type "integer"'
    )


def test_rows_come_from_files_of_json_lines(home: Home, db: Engine) -> None:
    files = FileStore(home.files, db)

    def source(lines: bytes) -> dict[str, str]:
        return {"type": "file_id", "id": files.put("default", "rows.jsonl", "evals", lines).id}

    good = source(b'{"item": {"a": 1}}\n\n{"item": {"a": 2}, "sample": {"output_text": "x"}}')
    assert [tuple(row) for row in data_rows(good, files, "default")] == [
        ({"a": 1}, None), ({"a": 2}, {"output_text": "x"}),
    ]  # fmt: skip
    assert count_rows(good, files, "default", ItemSchema({"required": ["a"]})) == 2
    for lines, told in (
        (b'{"item": {}}\n{', "line 2: The row is not JSON"),
        (b'{"a": 1}', "line 1: a row is"),
        (b'{"item": {}, "smaple": {}}', "unknown field 'smaple'"),
        (b'{"item": {}, "sample": "x"}', "no object"),
        (b"\n \n", "no rows"),
    ):
        with pytest.raises(InputError, match=told):
            count_rows(source(lines), files, "default", ItemSchema({}))
    with pytest.raises(NotFoundError):
        count_rows(good, files, "proj_2", ItemSchema({}))


def test_what_a_model_is_asked_keeps_to_the_runs_parameters() -> None:
    template = {"type": "template", "template": [{"role": "developer", "content": ["{{ item.q }}", "!"]}]}
    source = {
        "type": "completions", "model": "m", "input_messages": template,
        "sampling_params": {"max_completion_tokens": 5, "temperature": 0.0, "top_p": None},
    }  # fmt: skip
    asked = asking(source, {"q": "why"})
    assert asked.path == "/v1/chat/completions"
    assert asked.body == {
        "model": "m", "seed": SEED, "temperature": 0.0, "max_completion_tokens": 5,
        "messages": [{"role": "developer", "content": "why\n!"}],
    }  # fmt: skip
    other = asking({**source, "type": "responses"}, {"q": "why"})
    assert (
        other.path == "/v1/responses"
        and other.body["max_output_tokens"] == 5
        and other.body["store"] is False
    )
    with pytest.raises(InputError, match="no 'q' in item"):
        asking(source, {})


def test_patience_waits_while_it_makes_sense() -> None:
    def answers(*statuses: tuple[int, dict[str, str]]) -> tuple[int, int]:
        """The status of the last answer, and how often it was asked."""
        left, asked = list(statuses), []

        async def post(identity: Identity, path: str, body: bytes) -> Answer:
            asked.append(path)
            status, headers = left.pop(0)
            return Answer(status, headers, json.dumps({"error": {"message": "no"}}).encode())

        answer = asyncio.run(post_patiently(post, LOCAL, "/v1/x", b"", seconds=5))
        return answer.status, len(asked)

    busy = (429, {"retry-after-ms": "1"})
    assert answers(busy, (503, {}), (200, {})) == (200, 3)
    assert answers(busy, (400, {})) == (400, 2)
    assert answers((429, {"x-should-retry": "false"})) == (429, 1)
