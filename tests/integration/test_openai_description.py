"""Every kind of answer against OpenAI's own description of its API, where one has it: it is not ours to ship.

    git clone --depth 1 https://github.com/openai/openai-openapi
    LAPIS_OPENAI_DESCRIPTION=openai-openapi/openapi.json pytest tests/integration/test_openai_description.py

Without it every other test has the official client check each answer strictly against its types.
"""

from __future__ import annotations

import copy
import json
import os
import re
from pathlib import Path
from typing import Any

import jsonschema_rs
import openai
import pytest

from lapis.gateway.fine_tuning_loop import FineTuningLoop
from lapis.home import Home
from tests.integration.test_api_batches import begin, chat
from tests.integration.test_api_batches import finished as batch_finished
from tests.integration.test_api_evals import CONFIG, EQUAL, completions, finished
from tests.integration.test_foreign_keys import CHAT
from tests.served import fake_server

DESCRIPTION = os.environ.get("LAPIS_OPENAI_DESCRIPTION", "")
# A message of a role and a text is two of the kinds of which it must be exactly one.
KNOWN = {
    ("/evals/{eval_id}/runs", "data_source"),
    ("/evals/{eval_id}/runs", "data/*/data_source"),
    ("/evals/{eval_id}/runs/{run_id}", "data_source"),
}


class Recorder:
    """What was answered to which request."""

    def __init__(self) -> None:
        self.answers: list[tuple[str, str, int, Any]] = []

    def __call__(self, response: Any) -> None:
        response.read()
        if response.headers.get("content-type", "").startswith("application/json"):
            request = response.request
            self.answers.append((request.method, request.url.path, response.status_code, response.json()))


def nullable(schema: Any) -> Any:
    """OpenAPI's older ways to allow null and to exclude a bound, as JSON Schema's."""
    if isinstance(schema, list):
        return [nullable(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    made = {name: nullable(part) for name, part in schema.items()}
    if made.get("exclusiveMinimum") is True:
        made["exclusiveMinimum"] = made.pop("minimum")
    if made.pop("nullable", False) is True:
        return {"anyOf": [made, {"type": "null"}]}
    return made


def without_nulls(value: Any) -> Any:
    """An answer without the fields that are null."""
    if isinstance(value, list):
        return [without_nulls(part) for part in value]
    if not isinstance(value, dict):
        return value
    return {name: without_nulls(part) for name, part in value.items() if part is not None}


def faults(judge: Any, body: Any) -> list[tuple[str, str]]:
    """Places in an answer and what is wrong there.

    A null where the description only has an optional field is none: OpenAI's own examples have it.
    """
    if judge.is_valid(without_nulls(body)):
        return []
    body = copy.deepcopy(body)
    for error in list(judge.iter_errors(body)):
        if error.instance is None:
            *path, last = error.instance_path
            parent = body
            for part in path:
                parent = parent[part]
            parent.pop(last, None)
    return [
        (re.sub(r"\d+", "*", "/".join(map(str, error.instance_path))), error.message[:300])
        for error in judge.iter_errors(body)
    ]


def schema_of(description: dict[str, Any], method: str, path: str) -> tuple[str, Any] | None:
    """Template and schema of a successful answer."""
    for template, operations in description["paths"].items():
        pattern = re.sub(r"\\{[^}]*\\}", "[^/]+", re.escape(template))
        if not re.fullmatch(pattern, path) or method.lower() not in operations:
            continue
        answers = operations[method.lower()]["responses"]
        good = next((answer for status, answer in answers.items() if status.startswith("2")), {})
        return template, good.get("content", {}).get("application/json", {}).get("schema", {})
    return None


def ask_for_everything(client: openai.OpenAI) -> None:
    """One answer of each kind at least."""
    _models(client)
    _work(client)
    _organization(client)


def _models(client: openai.OpenAI) -> None:
    message: Any = [{"role": "user", "content": "x"}]
    client.models.retrieve(client.models.list().data[0].id)
    client.chat.completions.create(
        model="tiny", messages=message, max_tokens=3, n=2, logprobs=True, top_logprobs=2
    )
    client.completions.create(model="tiny", prompt="x", max_tokens=3, logprobs=1)
    client.embeddings.create(model="tiny", input="x", encoding_format="float")
    client.moderations.create(input=["x", "I want to die"])
    response = client.responses.create(model="tiny", input="x", max_output_tokens=4)
    client.responses.retrieve(response.id)
    client.responses.input_items.list(response.id)
    client.responses.input_tokens.count(model="tiny", input="x")
    client.responses.delete(response.id)


def _work(client: openai.OpenAI) -> None:
    upload = client.uploads.create(bytes=1, filename="a", mime_type="text/plain", purpose="user_data")
    part = client.uploads.parts.create(upload.id, data=b"x")
    done = client.uploads.complete(upload.id, part_ids=[part.id])
    client.uploads.cancel(
        client.uploads.create(bytes=1, filename="a", mime_type="text/plain", purpose="user_data").id
    )
    assert done.file is not None
    client.files.retrieve(done.file.id)
    batch_finished(client, begin(client, [chat("a"), chat("b", temperature=9)], metadata={"a": "b"}))
    batch_finished(client, begin(client, [{}]))
    client.batches.list()
    client.files.list()
    client.files.delete(done.file.id)
    made = client.evals.create(data_source_config=CONFIG, testing_criteria=[EQUAL], name="sums")  # type: ignore[arg-type, list-item]
    run = client.evals.runs.create(made.id, data_source=completions())  # type: ignore[arg-type]
    finished(client, made.id, run.id)
    (item, *_) = client.evals.runs.output_items.list(run.id, eval_id=made.id)
    client.evals.runs.output_items.retrieve(item.id, eval_id=made.id, run_id=run.id)
    client.evals.runs.list(made.id)
    client.evals.list()
    client.evals.update(made.id, name="other")
    client.evals.runs.delete(run.id, eval_id=made.id)
    client.evals.delete(made.id)
    grader: Any = EQUAL
    client.fine_tuning.alpha.graders.run(grader=grader, model_sample="3", item={"sum": "3"})
    client.fine_tuning.alpha.graders.validate(grader=grader)
    file = client.files.create(file=("c.jsonl", CHAT), purpose="fine-tune").id
    job = client.fine_tuning.jobs.create(model="tiny", training_file=file, suffix="x")
    client.fine_tuning.jobs.retrieve(job.id)
    client.fine_tuning.jobs.list()
    client.fine_tuning.jobs.list_events(job.id)
    client.fine_tuning.jobs.checkpoints.list(job.id)
    client.fine_tuning.jobs.cancel(job.id)


def _organization(client: openai.OpenAI) -> None:
    organization = client.admin.organization
    project = organization.projects.create(name="new")
    organization.projects.retrieve(project.id)
    organization.projects.list()
    account = organization.projects.service_accounts.create(project.id, name="ci")
    organization.projects.service_accounts.list(project.id)
    organization.projects.service_accounts.retrieve(account.id, project_id=project.id)
    keys = organization.projects.api_keys.list(project.id)
    organization.projects.api_keys.retrieve(keys.data[0].id, project_id=project.id)
    organization.projects.rate_limits.list_rate_limits(project.id)
    organization.projects.users.list(project.id)
    organization.projects.service_accounts.delete(account.id, project_id=project.id)
    organization.projects.archive(project.id)
    key = organization.admin_api_keys.create(name="more")
    organization.admin_api_keys.retrieve(key.id)
    organization.admin_api_keys.list()
    organization.admin_api_keys.delete(key.id)
    invite = organization.invites.create(email="a@example.com", role="reader")
    organization.invites.retrieve(invite.id)
    organization.invites.list()
    organization.invites.delete(invite.id)
    organization.users.list()
    organization.usage.completions(start_time=1, bucket_width="1d", group_by=["model", "project_id"])
    organization.usage.embeddings(start_time=1)
    organization.usage.moderations(start_time=1)
    organization.usage.costs(start_time=1)
    organization.audit_logs.list()


@pytest.mark.skipif(not DESCRIPTION, reason="LAPIS_OPENAI_DESCRIPTION names no file of OpenAI's description")
def test_every_answer_is_one_that_openai_describes(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    async def nothing(loop: object) -> None: ...

    monkeypatch.setattr(FineTuningLoop, "run", nothing)  # a job that waits is enough
    recorder = Recorder()
    http = openai.DefaultHttpxClient(event_hooks={"response": [recorder]})
    with (
        fake_server(home) as server,
        openai.OpenAI(
            base_url=server.url, api_key="x", admin_api_key="x", max_retries=0, http_client=http
        ) as client,
    ):
        ask_for_everything(client)
    description = nullable(json.loads(Path(DESCRIPTION).read_text()))
    judges: dict[tuple[str, str], Any] = {}
    wrong: dict[tuple[str, str, str], Any] = {}
    for method, path, status, body in recorder.answers:
        found = schema_of(description, method, path.removeprefix("/v1"))
        assert status == 200, (method, path, body)
        if found is None:
            wrong[method, path, "not described"] = body
            continue
        template, schema = found
        if (method, template) not in judges:
            whole = {**schema, "components": description["components"]}
            judges[method, template] = jsonschema_rs.Draft202012Validator(whole)
        for where, why in faults(judges[method, template], body):
            if (template, where) not in KNOWN:
                wrong[method, template, where] = why
    assert len(judges) >= 50
    assert not wrong, "\n" + "\n".join(f"{key}: {value}" for key, value in wrong.items())
