"""Tokens there and back, and what the server tells about itself to Prometheus."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from lapis.home import Home
from lapis.server import RunningServer
from tests.served import fake_server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with fake_server(Home(tmp_path_factory.mktemp("tokens")), seconds_per_token=0.005) as running:
        yield running


@pytest.fixture(scope="module")
def http(server: RunningServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url.removesuffix("/v1"), timeout=30) as made:
        yield made


def test_tokens_of_a_text_are_those_that_are_counted(http: httpx.Client, server: RunningServer) -> None:
    told = http.post("/tokenize", json={"model": "tiny", "prompt": "the river"}).json()
    assert told["count"] == len(told["tokens"])
    assert told["max_model_len"] == 2048
    with openai.OpenAI(base_url=server.url, api_key="x") as client:
        answer = client.completions.create(model="tiny", prompt="the river", max_tokens=1)
        chat = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "Hi"}], max_tokens=1
        )
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == told["count"]
    messages = [{"role": "user", "content": "Hi"}]
    told = http.post("/tokenize", json={"model": "tiny", "messages": messages}).json()
    assert chat.usage is not None
    assert chat.usage.prompt_tokens == told["count"]


@pytest.mark.parametrize("text", ["", "the river", "größer 🦀 <|im_end|>", "\u2028\n\r\n"])
def test_tokens_become_the_text_again(http: httpx.Client, text: str) -> None:
    ask = {"model": "tiny", "prompt": text, "add_special_tokens": False, "return_token_strs": True}
    told = http.post("/tokenize", json=ask).json()
    assert len(told["token_strs"]) == told["count"]
    back = http.post("/detokenize", json={"model": "tiny", "tokens": told["tokens"]}).json()
    assert back == {"prompt": text}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {"model": "tiny"}, "prompt"),
        ("/tokenize", {"model": "tiny", "prompt": "x", "messages": []}, "messages"),
        ("/tokenize", {"model": "nope", "prompt": "x"}, "model"),
        ("/tokenize", {"model": "tiny", "prompt": "x", "add_bos": True}, "add_bos"),
        ("/detokenize", {"model": "tiny", "tokens": [-1]}, "tokens"),
        ("/detokenize", {"model": "tiny", "tokens": [10**9]}, "tokens"),
        ("/detokenize", {"model": "tiny", "tokens": "x"}, "tokens"),
        ("/detokenize", {"model": "tiny", "tokens": [1.5]}, "tokens[0]"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(
    http: httpx.Client, path: str, body: dict[str, object], param: str
) -> None:
    answer = http.post(path, json=body)
    assert answer.status_code in (400, 404)
    assert answer.json()["error"]["param"] == param


def test_metrics_are_what_prometheus_reads(http: httpx.Client, server: RunningServer) -> None:
    with openai.OpenAI(base_url=server.url, api_key="x") as client:
        list(client.completions.create(model="tiny", prompt="count", max_tokens=8, stream=True))
    text = http.get("/metrics").text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    named = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(named) == len(set(named))
    assert all(family.documentation for family in families.values())
    for name in ("running", "waiting", "queued_tokens", "pages", "pages_used", "pages_cached"):
        assert families[f"lapis_engine_{name}"].type == "gauge"
    for name in ("engine_preemptions", "prompt_tokens", "completion_tokens", "http_requests"):
        assert families[f"lapis_{name}"].type == "counter"
    for name in ("time_to_first_token_seconds", "inter_token_seconds", "http_request_seconds"):
        assert families[f"lapis_{name}"].type == "histogram"
    first = {sample.labels["le"]: sample.value for sample in families["lapis_time_to_first_token_seconds"].samples
             if sample.name.endswith("_bucket")}  # fmt: skip
    assert list(first.values()) == sorted(first.values())
    tokens = sum(sample.value for sample in families["lapis_inter_token_seconds"].samples
                 if sample.name.endswith("_count"))  # fmt: skip
    assert first["+Inf"] >= 1
    assert 1 <= tokens <= 8  # those that came after the first output; slow machines join some
    seconds = families["lapis_http_request_seconds"].samples
    assert {(sample.labels["route"], sample.labels["status"]) for sample in seconds} >= {
        ("/v1/completions", "200")
    }
