"""Rate limits, model permissions and spend limits through the official client hold from the next request on."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from lapis.home import Home
from lapis.tenants.admin_keys import AdminKeys
from lapis.tenants.keys import ApiKeys
from lapis.tenants.tenant import Role, Tenants
from tests.served import fake_server

ACTOR = "test"
UNLIMITED = 2**53 - 1


@pytest.fixture
def clients(home: Home) -> Iterator[tuple[openai.OpenAI, openai.OpenAI, str]]:
    """An administrator and, in one client, a project's key; a reader; the project."""
    from lapis.db import open_database

    db = open_database(home.database_url)
    home.prices.write_text("[models.default]\nprompt = 1000.0\ncompletion = 1000.0\n")
    project = Tenants(db).create_project("search", ACTOR).id
    _, text = ApiKeys(db).create("worker", ACTOR, project="search")
    _, admin = AdminKeys(db).create("ops", ACTOR)
    _, reader = AdminKeys(db).create("eyes", ACTOR, role=Role.READER)
    db.dispose()
    with fake_server(home, "tiny", "poems", load=False) as server:
        owner = openai.OpenAI(
            base_url=server.url,
            api_key=text,
            admin_api_key=admin,
            max_retries=0,
            _strict_response_validation=True,
        )
        with owner, owner.with_options(admin_api_key=reader) as other:
            yield owner, other, project


Clients = tuple[openai.OpenAI, openai.OpenAI, str]


def ask(client: openai.OpenAI, model: str = "tiny") -> None:
    client.completions.create(model=model, prompt="x", max_tokens=2)


def test_a_models_rate_is_set_and_taken_away(clients: Clients) -> None:
    owner, reader, project = clients
    rates = owner.admin.organization.projects.rate_limits
    assert [rate.model for rate in rates.list_rate_limits(project, limit=1)] == ["poems", "tiny"]
    before = rates.list_rate_limits(project, before="rl-tiny").data
    assert [(rate.id, rate.max_requests_per_1_minute) for rate in before] == [("rl-poems", UNLIMITED)]
    changed = rates.update_rate_limit(
        "rl-tiny", project_id=project, max_requests_per_1_day=1, max_tokens_per_1_minute=500
    )
    assert (changed.max_requests_per_1_day, changed.max_tokens_per_1_minute) == (1, 500)
    ask(owner)
    with pytest.raises(openai.RateLimitError, match="1 requests per day for the model 'tiny'") as caught:
        ask(owner)
    assert caught.value.param == "requests_per_day"
    ask(owner, "poems")
    with pytest.raises(openai.PermissionDeniedError, match="reader"):
        reader.admin.organization.projects.rate_limits.update_rate_limit("rl-tiny", project_id=project)
    again = rates.update_rate_limit("rl-tiny", project_id=project, max_requests_per_1_day=UNLIMITED)
    assert (again.max_requests_per_1_day, again.max_tokens_per_1_minute) == (None, 500)
    ask(owner)
    for wrong in ("rl-none", "tiny"):
        with pytest.raises(openai.NotFoundError):
            rates.update_rate_limit(wrong, project_id=project, max_requests_per_1_day=1)
    with pytest.raises(openai.BadRequestError, match="images"):
        rates.update_rate_limit("rl-tiny", project_id=project, max_images_per_1_minute=1)


def test_a_project_uses_only_the_models_that_it_may(clients: Clients) -> None:
    owner, reader, project = clients
    permissions = owner.admin.organization.projects.model_permissions
    none = permissions.retrieve(project)
    assert (none.mode, none.api_model_ids) == ("deny_list", [])
    permissions.update(project, mode="allow_list", model_ids=["poems"])
    assert [model.id for model in owner.models.list()] == ["poems"]
    ask(owner, "poems")
    asks = (
        lambda: ask(owner),
        lambda: owner.models.retrieve("tiny"),
        lambda: owner.embeddings.create(model="tiny", input="x"),
        lambda: owner.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x"}]),
        lambda: owner.responses.create(model="tiny", input="x"),
        lambda: owner.responses.input_tokens.count(model="tiny", input="x"),
    )
    for act in asks:
        with pytest.raises(openai.NotFoundError, match="no model 'tiny'"):
            act()
    assert reader.admin.organization.projects.model_permissions.retrieve(project).mode == "allow_list"
    permissions.update(project, mode="deny_list", model_ids=["poems"])
    with pytest.raises(openai.NotFoundError):
        ask(owner, "poems")
    ask(owner)
    assert permissions.delete(project).deleted
    ask(owner, "poems")


def test_spending_ends_at_the_limit_and_says_so(clients: Clients) -> None:
    owner, _, project = clients
    organization = owner.admin.organization
    with pytest.raises(openai.NotFoundError, match="no limit"):
        organization.spend_limit.retrieve()
    for limits, id in ((organization.projects.spend_limit, [project]), (organization.spend_limit, [])):
        set_ = limits.update(*id, currency="USD", interval="month", threshold_amount=100_000)
        assert (set_.threshold_amount, set_.enforcement.status) == (100_000, "inactive")
        ask(owner)
        tight = limits.update(*id, currency="USD", interval="month", threshold_amount=0)
        assert tight.enforcement.status == "enforcing"
        with pytest.raises(openai.RateLimitError, match="cents spent per month"):
            ask(owner)
        assert limits.delete(*id).deleted
        ask(owner)
