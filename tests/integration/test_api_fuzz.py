"""Requests made up from the server's own description: no answer is a 5xx, none leaves a page or a token held."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from lapis.api.app import create_app
from lapis.home import Home
from lapis.server import RunningServer
from lapis.tenants.usage import UsageLedger
from tests.served import fake_server

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
MODEL = "tiny"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with fake_server(Home(tmp_path_factory.mktemp("fuzz")), context=256) as running:
        yield running


def knowing(described: dict[str, Any]) -> dict[str, Any]:
    """The description of a server that has one model: random names would all be 404."""
    for path in described["paths"].values():
        for operation in path.values():
            content = operation.get("requestBody", {}).get("content", {})
            for kind in content.values():
                kind["schema"].get("properties", {})["model"] = {"enum": [MODEL]}
    return described


def operations(server: RunningServer) -> list[Any]:
    described = knowing(create_app(server.services).openapi())
    found = [result.ok() for result in schemathesis.openapi.from_dict(described).get_all_operations()]
    assert len(found) >= 12
    return found


def fuzz(server: RunningServer, examples: int) -> int:
    session = requests.Session()
    base = server.url.removesuffix("/v1")
    statuses: list[int] = []
    for operation in operations(server):

        @settings(
            max_examples=examples,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
            database=None,
        )
        @given(case=operation.as_strategy())
        def one(case: Any) -> None:
            answer = case.call(base_url=base, session=session, timeout=60)
            case.validate_response(answer, checks=CHECKS)
            statuses.append(answer.status_code)

        one()
    still = session.post(f"{server.url}/completions", json={"model": MODEL, "prompt": "x", "max_tokens": 2})
    assert still.status_code == 200
    server.services.meter.flush()
    stats = server.services.router.find(MODEL).load().stats()
    assert stats["running"] == stats["waiting"] == stats["pages_used"] == stats["cache_faults"] == 0
    balance = UsageLedger(server.services.db).balance()
    assert balance.balanced
    assert balance.open == 0
    session.close()
    assert statuses.count(200) > len(statuses) / 20  # it is not only refused
    return len(statuses)


def test_random_requests_do_no_harm(server: RunningServer) -> None:
    assert fuzz(server, 4) >= 50


@pytest.mark.long
def test_a_thousand_random_requests_do_no_harm(server: RunningServer) -> None:
    assert fuzz(server, 120) >= 1000
