"""What the benchmarks measure with: prompts, clients, figures and limits must not flatter anybody."""

from __future__ import annotations

import itertools
import json
import signal
import sys
import time
from pathlib import Path

import pytest
from harness import client
from harness.burst import Burst
from harness.installed import Engines
from harness.limits import Limits, Shape
from harness.process import EngineFailed, Group
from harness.prompts import Prompts, descriptions
from harness.rows import ROWS, Target

from lapis.home import Home
from lapis.inference.fake import FakeEngine
from tests.served import fake_server


def test_prompts_have_exactly_the_asked_tokens_and_share_no_beginning() -> None:
    tokenizer = FakeEngine().tokenizer
    prompts = Prompts(tokenizer, "The quick brown fox jumps over the lazy dog. " * 40)
    cut = [prompt for _ in range(30) for prompt in prompts.take(4, 16)]
    assert {len(prompt) for prompt in cut} == {16}
    apart = Prompts(tokenizer, "".join(f"{n} lines, {n * n} words. " for n in range(2000))).take(50, 32)
    assert len({tuple(prompt) for prompt in apart}) == 50


def test_there_is_real_text_for_many_long_prompts() -> None:
    assert len(descriptions()) > 200_000


def test_the_client_reads_what_our_server_streams(home: Home) -> None:
    with fake_server(home, reply=lambda prompt, seed: "word " * 40) as server:
        port = int(server.url.split(":")[2].split("/")[0])
        fields = {"model": "tiny", "prompt": "Go on", "max_tokens": 8, "temperature": 0}
        burst = client.burst(port, [fields] * 3)
        assert burst.tokens == 24 and len(burst.times) == 3
        assert all(sorted(times) == list(times) and times[0] > 0 for times in burst.times)
        with pytest.raises(client.RequestFailed, match="max_tokens"):
            client.burst(port, [{**fields, "max_tokens": -1}])


def test_an_event_arrives_with_the_bytes_that_complete_it() -> None:
    event = b"data: " + json.dumps({"choices": [{"text": "a"}]}).encode() + b"\n\n"
    usage = b"data: " + json.dumps({"choices": [], "usage": {"completion_tokens": 2}}).encode() + b"\n\n"
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n"
    arrivals = [(1.0, head[:20]), (2.0, head[20:] + event[:9]), (3.0, event[9:]), (4.0, event + usage)]
    assert client.read_events(arrivals) == ([3.0, 4.0], 2)


def test_a_server_that_answers_with_an_error_or_nothing_is_no_measurement() -> None:
    for answer in (b"HTTP/1.1 503 Unavailable\r\n\r\nbusy", b"HTTP/1.1 200 OK\r\n\r\n", b""):
        with pytest.raises(client.RequestFailed):
            client.read_events([(1.0, answer)])


def test_figures_of_a_burst() -> None:
    burst = Burst(4.0, 12, [[1.0, 2.0, 3.0, 4.0], [1.5, 2.0, 3.0, 3.5], [0.5, 1.0, 2.0, 4.0]])
    assert burst.throughput() == 3
    assert (burst.first(0.5), burst.first(0.99)) == (1.0, 1.5)
    assert burst.prefill(100) == 200
    assert burst.decode() == 6 / 2  # after the last first token at 1.5 and up to the first end at 3.5


def test_limits_follow_from_bytes_and_flops() -> None:
    limits = Limits(bandwidth=1e9, product=1e12)
    small = Shape(weight_bytes=10**8, parameters=5 * 10**7, head=10**7, kv_bytes=1000, bf16=True)
    assert limits.decode(small, 1, 0) == pytest.approx(10)
    assert limits.decode(small, 1, 100_000) == pytest.approx(5)
    assert limits.decode(small, 2000, 0) == pytest.approx(1e12 / 1e8)  # many sequences: the products decide
    assert limits.burst(small, 1, 1000, 1) < limits.decode(small, 1, 1000)
    assert limits.best(Limits(2e9, 1e11)) == Limits(2e9, 1e12)


def test_targets_say_reached_missed_or_unknown() -> None:
    assert Target("ratio", 1.3).met(1.3, 0, None) is True
    assert Target("ratio", 0.7, at_most=True).met(0.8, 0, None) is False
    assert Target("share", 0.85).met(None, 0, None) is None
    assert [str(Target("ratio", 2)), str(Target("figure", 2, at_most=True))] == ["≥ 2x", "≤ 2"]


def test_every_row_names_engines_that_exist(tmp_path: Path) -> None:
    engines = Engines(tmp_path, tmp_path, 1)
    names = {name for row in ROWS for name in (row.duel.ours, row.duel.theirs) if name}
    assert not any(engines.missing(name) for name in names if name.startswith("lapis"))
    assert all(engines.missing(name) in (True, False) for name in names)
    assert len({row.key for row in ROWS}) == len(ROWS)


def test_an_engine_that_waits_gets_no_time_and_ends_with_its_children(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "for n in range(10**6):\n    print(n, flush=True)\n    time.sleep(0.005)\n"
    )
    group = Group([sys.executable, "-c", code], {}, talk=True)
    try:
        assert [int(group.output.readline()) for _ in range(3)] == [0, 1, 2]
        group.pause()
        states = Path(f"/proc/{group.process.pid}/stat")
        for _ in itertools.takewhile(lambda _: states.read_text().split()[2] != "T", range(1000)):
            time.sleep(0.005)
        assert states.read_text().split()[2] == "T"
        assert group.resident() > 1 << 20
        group.proceed()
        assert int(group.output.readline()) > 2
    finally:
        group.end()
    assert group.process.returncode in (-signal.SIGTERM, -signal.SIGKILL)
    assert group.resident() == 0


def test_what_an_engine_said_before_it_ended_is_told() -> None:
    group = Group([sys.executable, "-c", "raise SystemExit('no model here')"], {}, talk=True)
    assert group.output.readline() == b""
    failure = group.failure("engine ended")
    group.end()
    assert isinstance(failure, EngineFailed) and "no model here" in str(failure)
