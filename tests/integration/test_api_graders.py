"""fine_tuning.alpha.graders through the official client, strict about every answer."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from openai import APITimeoutError, BadRequestError, NotFoundError, OpenAI, PermissionDeniedError

from lapis.gateway import graders
from lapis.home import Home
from lapis.server import RunningServer
from lapis.tenants.keys import ApiKeys
from lapis.tenants.quota import Quota
from lapis.tenants.tenant import Scope, Tenants
from tests.integration.test_api_limits import until
from tests.served import fake_server

CHECK: dict[str, Any] = {
    "type": "string_check", "name": "same", "operation": "eq",
    "input": "{{ sample.output_text }}", "reference": "{{ item.answer }}",
}  # fmt: skip
PROGRAM: dict[str, Any] = {
    "type": "python", "name": "length",
    "source": "def grade(sample, item):\n    return len(sample['output_text']) / item['longest']",
}  # fmt: skip
SCORE: dict[str, Any] = {
    "type": "score_model", "name": "judge", "model": "tiny", "range": [0, 10],
    "input": [
        {"role": "system", "content": "You grade."},
        {"role": "user", "content": {"type": "input_text", "text": "Is {{ sample.output_text }} {{ item.answer }}?"}},
    ],
    "sampling_params": {"temperature": 0.5, "seed": 3, "max_completions_tokens": 200},
}  # fmt: skip
VERDICT = '{"reasoning": "because", "result": 7.5}'


@pytest.fixture
def server(home: Home) -> Iterator[RunningServer]:
    """A model that judges as it is told, and says whether it was asked as it should be."""

    def reply(prompt: str, seed: int) -> str:
        return VERDICT if "Is Paris Paris?" in prompt else "no verdict"

    with fake_server(home, reply=reply) as running:
        yield running


@pytest.fixture
def client(server: RunningServer) -> OpenAI:
    return OpenAI(base_url=server.url, api_key="x", max_retries=0, _strict_response_validation=True)


def test_a_check_is_run(client: OpenAI) -> None:
    run = client.fine_tuning.alpha.graders.run
    right = run(grader=CHECK, model_sample="Paris", item={"answer": "Paris"})  # type: ignore[arg-type]
    assert right.reward == 1 and right.sub_rewards == {} and right.metadata.scores == {"same": 1.0}
    assert (right.metadata.name, right.metadata.type) == ("same", "string_check")
    assert right.metadata.token_usage is None and right.metadata.execution_time >= 0
    assert not any(right.metadata.errors.model_dump().values())
    absent = run(grader=CHECK, model_sample="Paris")  # type: ignore[arg-type]
    assert absent.reward == 0 and absent.metadata.errors.invalid_variable_error


def test_a_program_is_run_in_a_sandbox(client: OpenAI) -> None:
    run = client.fine_tuning.alpha.graders.run
    assert run(grader=PROGRAM, model_sample="abc", item={"longest": 6}).reward == 0.5  # type: ignore[arg-type]
    wrong = run(grader=PROGRAM, model_sample="abc", item={"longest": 0})  # type: ignore[arg-type]
    assert wrong.metadata.errors.python_grader_runtime_error
    assert "ZeroDivisionError" in (wrong.metadata.errors.python_grader_runtime_error_details or "")
    nosy = {**PROGRAM, "source": "def grade(sample, item):\n    return len(open('/etc/passwd').read())"}
    refused = run(grader=nosy, model_sample="", item={})  # type: ignore[arg-type]
    assert "PermissionError" in (refused.metadata.errors.python_grader_runtime_error_details or "")


def test_a_model_judges_on_the_callers_account(client: OpenAI, server: RunningServer) -> None:
    run = client.fine_tuning.alpha.graders.run
    multi = {
        "type": "multi", "name": "both", "calculate_output": "(same + judge / 10) / 2",
        "graders": {"same": CHECK, "judge": SCORE},
    }  # fmt: skip
    done = run(grader=multi, model_sample="Paris", item={"answer": "Paris"})  # type: ignore[arg-type]
    assert done.reward == 0.875 and done.sub_rewards == {"same": 1.0, "judge": 7.5}
    used = done.api_model_grader_token_usage_per_model["tiny"]
    assert done.metadata.sampled_model_name == "tiny" and done.metadata.token_usage == used["total_tokens"]  # type: ignore[index]
    server.services.meter.flush()
    assert server.services.meter._ledger.balance("default").used == used["total_tokens"]  # type: ignore[index]
    short = {**SCORE, "sampling_params": {"max_completions_tokens": 4}}
    cut = run(grader=short, model_sample="Rome", item={"answer": "Paris"})  # type: ignore[arg-type]
    assert (
        cut.metadata.errors.api_model_grader_parse_error and cut.metadata.errors.truncated_observation_error
    )
    long = {**SCORE, "sampling_params": {"max_completions_tokens": 10**6}}  # as much as there is room for
    assert run(grader=long, model_sample="Paris", item={"answer": "Paris"}).reward == 7.5  # type: ignore[arg-type]
    unknown = run(grader={**SCORE, "model": "tin"}, model_sample="", item={"answer": ""})  # type: ignore[arg-type]
    assert "no model 'tin'" in (unknown.metadata.errors.api_model_grader_server_error_details or "")


def test_graders_are_validated(client: OpenAI) -> None:
    validate = client.fine_tuning.alpha.graders.validate
    for grader in (CHECK, PROGRAM, SCORE):
        told = validate(grader=grader).grader  # type: ignore[arg-type]
        assert told is not None and told.model_dump(exclude_unset=True) == grader
    single = {"type": "multi", "name": "m", "graders": CHECK, "calculate_output": "2 * same"}
    assert validate(grader=single).grader  # type: ignore[arg-type]
    for wrong, told_ in (
        ({**CHECK, "operation": "equals"}, "operation"),
        ({**CHECK, "input": "{{ answer }}"}, "names neither item nor sample"),
        ({**single, "calculate_output": "2 *"}, "ends too early"),
        ({**PROGRAM, "source": "def grad(): pass"}, "no function grade"),
        ({**PROGRAM, "source": "import os; os.abort()"}, "ended by signal"),
        ({"type": "text_similarity", "name": "x", "input": "a", "reference": "b", "evaluation_metric": "f1"}, "rouge"),
    ):  # fmt: skip
        with pytest.raises(BadRequestError, match=told_):
            validate(grader=wrong)  # type: ignore[arg-type]
    with pytest.raises(NotFoundError, match="Did you mean 'tiny'"):
        validate(grader={**SCORE, "model": "tin"})  # type: ignore[arg-type]


def test_a_key_needs_the_scope_of_work(client: OpenAI, server: RunningServer) -> None:
    keys = ApiKeys(server.services.db)
    _, secret = keys.create("chat", "test", scopes=[Scope.MODELS_USE])
    with pytest.raises(PermissionDeniedError, match=r"work\.write"):
        client.with_options(api_key=secret).fine_tuning.alpha.graders.run(grader=CHECK, model_sample="")  # type: ignore[arg-type]


def test_clients_that_hang_up_leave_no_thread_waiting_and_stop_no_other_project(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graders, "A_PROJECT", 2)
    monkeypatch.setattr(graders, "THREADS", 3)
    with fake_server(home, reply=lambda prompt, seed: VERDICT) as server:
        tenants = Tenants(server.services.db)
        keys = [ApiKeys(server.services.db).create("k", "test", project=tenants.create_project(name, "test").id)[1]
                for name in ("spent", "other")]  # fmt: skip
        tenants.set_quota("spent", Quota(requests_per_day=1), "test")
        spent, other = (OpenAI(base_url=server.url, api_key=key, max_retries=0) for key in keys)
        asked: Any = {"grader": SCORE, "model_sample": "Paris", "item": {"answer": "Paris"}}
        assert spent.fine_tuning.alpha.graders.run(**asked).reward == 7.5

        def leave(_: int) -> None:
            with pytest.raises(APITimeoutError):
                spent.with_options(timeout=1).fine_tuning.alpha.graders.run(**asked)

        with ThreadPoolExecutor(6) as pool:
            gone = [pool.submit(leave, number) for number in range(6)]
            until(lambda: server.services.counters.active == 6)
            assert other.fine_tuning.alpha.graders.run(**{**asked, "grader": CHECK}).reward == 1
            for one in gone:
                one.result()
        until(lambda: server.services.counters.active == 0)
