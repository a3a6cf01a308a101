"""Every route with the key of somebody else: what is another's is not there, in the very words of what never was."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import pytest
from fastapi.routing import APIRoute

from lapis.api.app import ROUTES
from lapis.db import open_database, write
from lapis.gateway.fine_tuning_loop import FineTuningLoop
from lapis.home import Home
from lapis.server import RunningServer
from lapis.tables.fine_tuning import fine_tuned_models
from lapis.tenants.admin_keys import AdminKeys
from lapis.tenants.keys import ApiKeys
from lapis.tenants.tenant import Role, Tenants
from tests.integration.test_api_evals import CONFIG, EQUAL, completions, finished
from tests.served import fake_server

ACTOR = "test"
CHAT = b'{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}\n' * 12
LINE = b'{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"model": "tiny", "prompt": "x"}}'
MODEL = "ft:tiny:default:mine:1"
ADMIN = "/v1/organization"
NO_OBJECT = {"kind", "rest"}  # parameters that name no object of somebody's
# Bodies with which a route would do something; what is not here takes none or may be empty.
BODIES: Mapping[tuple[str, str], dict[str, Any]] = {
    ("POST", "/v1/uploads/{upload_id}/complete"): {"part_ids": []},
    ("POST", "/v1/evals/{eval_id}"): {"name": "mine"},
    ("POST", "/v1/evals/{eval_id}/runs"): {"data_source": completions()},
    ("POST", "/v1/fine_tuning/checkpoints/{model}/permissions"): {"project_ids": ["PROJECT"]},
    ("POST", f"{ADMIN}/projects/{{project_id}}"): {"name": "mine"},
    ("POST", f"{ADMIN}/users/{{user_id}}"): {"role": "reader"},
    ("POST", f"{ADMIN}/projects/{{project_id}}/users"): {"user_id": "USER", "role": "member"},
    ("POST", f"{ADMIN}/projects/{{project_id}}/users/{{user_id}}"): {"role": "member"},
    ("POST", f"{ADMIN}/projects/{{project_id}}/service_accounts"): {"name": "mine"},
    ("POST", f"{ADMIN}/projects/{{project_id}}/service_accounts/{{account_id}}"): {"name": "mine"},
    ("POST", f"{ADMIN}/projects/{{project_id}}/service_accounts/{{account_id}}/api_keys"): {"name": "mine"},
    ("POST", f"{ADMIN}/projects/{{project_id}}/api_keys/{{key_id}}"): {"expires_in_seconds": 86_400},
    ("POST", f"{ADMIN}/projects/{{project_id}}/rate_limits/{{rate_limit_id}}"): {
        "max_requests_per_1_minute": 1
    },
    ("POST", f"{ADMIN}/projects/{{project_id}}/model_permissions"): {"mode": "deny_list", "model_ids": ["x"]},
    ("POST", f"{ADMIN}/projects/{{project_id}}/spend_limit"): {
        "currency": "USD",
        "interval": "month",
        "threshold_amount": 1,
    },
}


@dataclass
class Place:
    """A server with things of one project, and the keys of those whose they are not."""

    server: RunningServer
    objects: dict[str, str]  # by the routes' parameter
    foreign: httpx.Client  # a project of the same organization
    stranger: httpx.Client  # an administrator of another one
    own: openai.OpenAI


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    home = Home(tmp_path_factory.mktemp("foreign"))
    db = open_database(home.database_url)
    tenants, keys, admins = Tenants(db), ApiKeys(db), AdminKeys(db)
    ids = [tenants.create_project(name, ACTOR).id for name in ("ours", "theirs")]
    texts = [keys.create("k", ACTOR, project=id, scopes=Role.OWNER.scopes)[1] for id in ids]
    acme = tenants.create_organization("acme", ACTOR).id
    owner, stranger = admins.create("o", ACTOR)[1], admins.create("s", ACTOR, organization_id=acme)[1]
    db.dispose()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(FineTuningLoop, "run", _nothing)  # a job that waits is enough
        with (
            fake_server(home) as server,
            openai.OpenAI(base_url=server.url, api_key=texts[0], admin_api_key=owner, max_retries=0) as own,
            _http(server, texts[1]) as foreign,
            _http(server, stranger) as far,
        ):
            objects = {"project_id": ids[0], **_work(own), **_organization(own, ids[0])}
            _register(server, ids[0], objects["job_id"])
            (lent,) = own.fine_tuning.checkpoints.permissions.create(MODEL, project_ids=[ids[0]])
            objects |= {"permission_id": lent.id, "model": MODEL, "name": MODEL}
            yield Place(server, objects, foreign, far, own)


async def _nothing(loop: object) -> None:
    return


def _http(server: RunningServer, key: str) -> httpx.Client:
    return httpx.Client(
        base_url=server.url.removesuffix("/v1"), headers={"Authorization": f"Bearer {key}"}, timeout=60
    )


def _work(own: openai.OpenAI) -> dict[str, str]:
    batch_file = own.files.create(file=("a.jsonl", LINE), purpose="batch").id
    chats = own.files.create(file=("c.jsonl", CHAT), purpose="fine-tune").id
    upload = own.uploads.create(bytes=3, filename="a", mime_type="text/plain", purpose="user_data")
    batch = own.batches.create(input_file_id=batch_file, endpoint="/v1/completions", completion_window="24h")
    made = own.evals.create(data_source_config=CONFIG, testing_criteria=[EQUAL], name="sums")  # type: ignore[arg-type, list-item]
    run = own.evals.runs.create(made.id, data_source=completions())  # type: ignore[arg-type]
    finished(own, made.id, run.id)
    (item, *_) = own.evals.runs.output_items.list(run.id, eval_id=made.id)
    return {
        "file_id": batch_file,
        "training_file": chats,
        "upload_id": upload.id,
        "batch_id": batch.id,
        "response_id": own.responses.create(model="tiny", input="x", max_output_tokens=2).id,
        "job_id": own.fine_tuning.jobs.create(model="tiny", training_file=chats).id,
        "eval_id": made.id,
        "run_id": run.id,
        "item_id": item.id,
    }


def _organization(own: openai.OpenAI, project_id: str) -> dict[str, str]:
    organization = own.admin.organization
    account = organization.projects.service_accounts.create(project_id, name="ci")
    (user, *_) = organization.users.list().data or [None]
    return {
        "invite_id": organization.invites.create(email="a@example.com", role="reader").id,
        "account_id": account.id,
        "key_id": account.api_key.id if account.api_key is not None else "",
        "admin_key_id": organization.admin_api_keys.list().data[0].id,
        "user_id": "user-0" if user is None else user.id,
        "rate_limit_id": "rl-tiny",
    }


def _register(server: RunningServer, project_id: str, job_id: str) -> None:
    base = server.services.router.lookup("tiny")[0]
    row = {"name": MODEL, "project_id": project_id, "job_id": job_id, "base": "tiny", "created_at": 1.0}
    row |= {"base_digest": base.digest, "digest": "0" * 64, "folder": "none", "licence": "MIT"}
    with write(server.services.db) as connection:
        connection.execute(fine_tuned_models.insert().values(**row))


def _routes() -> list[tuple[str, str]]:
    """Method and path of every route, the paths without converters."""
    routes = [route for router in ROUTES for route in router.routes]
    assert all(isinstance(route, APIRoute) for route in routes)  # anything else would not be seen here
    found = [
        (method, re.sub(r":\w+}", "}", route.path))
        for route in routes
        if isinstance(route, APIRoute)
        for method in sorted(route.methods)
    ]
    assert len(found) > 100
    return found


def _url(place: Place, path: str, unknown: bool) -> str:
    """A route's path with the ids of our things, or with ids that nobody has."""

    def value(match: re.Match[str]) -> str:
        name = match[1]
        if name == "key_id" and "admin_api_keys" in path:
            name = "admin_key_id"
        id = place.objects[name]  # a KeyError: a new kind of object, which this test has to make first
        return re.sub(r"\w{3}$", "zzz", id) if unknown else id

    return re.sub(r"{(\w+)}", value, path)


def _ask(place: Place, method: str, path: str, unknown: bool) -> tuple[int, str]:
    who = place.stranger if path.startswith(ADMIN) else place.foreign
    body = BODIES.get((method, path))
    if path.endswith("/parts"):
        answer = who.post(_url(place, path, unknown), files={"data": b"x"})
    elif method == "POST":
        answer = who.post(_url(place, path, unknown), json=body or {})
    else:
        answer = who.request(method, _url(place, path, unknown))
    return answer.status_code, answer.text


def test_what_is_anothers_is_as_if_it_were_not_there(place: Place) -> None:
    routes = [(method, path) for method, path in _routes() if set(re.findall(r"{(\w+)}", path)) - NO_OBJECT]
    assert len(routes) >= 50
    wrong = []
    for method, path in routes:
        status, said = _ask(place, method, path, unknown=False)
        nobody = _ask(place, method, path, unknown=True)
        for id in sorted(place.objects.values(), key=len, reverse=True):
            said = said.replace(id, "ID")
            nobody = (nobody[0], nobody[1].replace(re.sub(r"\w{3}$", "zzz", id), "ID"))
        if (status, said) != nobody or status != 404:
            wrong.append((method, path, status, said[:300], nobody))
    assert not wrong, "\n".join(map(str, wrong))


def test_our_own_things_are_still_there(place: Place) -> None:
    ids, own = place.objects, place.own
    assert own.files.retrieve(ids["file_id"]).id == ids["file_id"]
    assert own.batches.retrieve(ids["batch_id"]).status != "cancelled"
    assert own.uploads.cancel(ids["upload_id"]).status == "cancelled"
    assert own.responses.retrieve(ids["response_id"]).id == ids["response_id"]
    assert own.fine_tuning.jobs.retrieve(ids["job_id"]).status != "cancelled"
    assert own.evals.runs.retrieve(ids["run_id"], eval_id=ids["eval_id"]).status == "completed"
    assert own.models.retrieve(MODEL).id == MODEL
    assert own.admin.organization.projects.retrieve(ids["project_id"]).status == "active"
    assert own.admin.organization.admin_api_keys.retrieve(ids["admin_key_id"]).id == ids["admin_key_id"]


def test_lists_show_nothing_of_another_project(place: Place) -> None:
    for path in ("files", "batches", "fine_tuning/jobs", "evals"):
        assert place.foreign.get(f"/v1/{path}").json()["data"] == []
    assert MODEL not in [model["id"] for model in place.foreign.get("/v1/models").json()["data"]]
    for id in ("file_id", "batch_id", "job_id", "eval_id"):
        path = {"file_id": "files", "batch_id": "batches", "job_id": "fine_tuning/jobs", "eval_id": "evals"}[
            id
        ]
        foreign = place.foreign.get(f"/v1/{path}", params={"after": place.objects[id]})
        unknown = place.foreign.get(f"/v1/{path}", params={"after": "nobody"})
        assert foreign.status_code == unknown.status_code >= 400
        assert foreign.text.replace(place.objects[id], "nobody") == unknown.text


def test_what_is_anothers_cannot_be_used(place: Place) -> None:
    ids = place.objects
    run = {"type": "jsonl", "source": {"type": "file_id", "id": "ID"}}
    mine = place.foreign.post(
        "/v1/evals", json={"data_source_config": CONFIG, "testing_criteria": [EQUAL], "name": "x"}
    ).json()["id"]
    asks: list[tuple[str, str, dict[str, Any]]] = [
        ("/v1/batches", "file_id", {"input_file_id": "ID", "endpoint": "/v1/responses", "completion_window": "24h"}),
        ("/v1/fine_tuning/jobs", "training_file", {"model": "tiny", "training_file": "ID"}),
        ("/v1/responses", "response_id", {"model": "tiny", "input": "x", "previous_response_id": "ID"}),
        (f"/v1/evals/{mine}/runs", "training_file", {"data_source": run}),
        ("/v1/completions", "model", {"model": "ID", "prompt": "x"}),
        ("/v1/fine_tuning/jobs", "training_file", {"model": MODEL, "training_file": "ID"}),
    ]  # fmt: skip
    for path, name, body in asks:
        said = []
        for id in (ids[name], "nobody-has-this"):
            text = httpx.Request("POST", "http://x", json=body).content.decode().replace('"ID"', f'"{id}"')
            answer = place.foreign.post(path, content=text, headers={"content-type": "application/json"})
            assert answer.status_code in (400, 404), (path, answer.text)
            said.append((answer.status_code, answer.text.replace(id, "ID")))
        assert said[0] == said[1], path


def test_administration_needs_an_admin_key_everywhere(place: Place) -> None:
    routes = [(method, path) for method, path in _routes() if path.startswith(ADMIN)]
    assert len(routes) >= 40
    for method, path in routes:
        url = _url(place, path.replace("{kind}", "completions").replace("{rest}", "groups"), unknown=False)
        answer = place.foreign.request(method, url, json={} if method == "POST" else None)
        assert answer.status_code in (401, 403), (method, path, answer.text)


def test_nobody_gets_in_without_a_key(place: Place) -> None:
    with httpx.Client(base_url=place.server.url.removesuffix("/v1")) as nobody:
        for method, path in _routes():
            if path != "/health":
                answer = nobody.request(method, re.sub(r"{\w+}", "x", path))
                assert answer.status_code == 401, (method, path, answer.text)
