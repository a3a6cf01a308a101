"""The gateway under load: short answers beside the bare engine and LiteLLM's proxy; many streams for a long time.

    python benchmarks/gateway_load.py [--rounds 3] [--requests 1600] [--streams 1000] [--minutes 1]

The model is the FakeEngine, so what is measured is everything around a model; keys and metering are on.
* one at a time: the time of a short answer over HTTP less that of the engine in one process.
* 16 at a time: answers a second. The peer is LiteLLM's proxy with its master key and no database, so it meters
  nothing; behind it is the same fake on a server of ours without keys.
* at a model's pace: 16 answers of 128 tokens at a time, 10 ms a step; what HTTP leaves of the bare engine's rate.
* streams: so many at once for so long; answers that did not end well, and the server's memory.
Each server is one process, the client another. `make bench-peers PEERS=litellm` installs the peer.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harness.http_load import Door, answer_seconds, read_streams, resident
from harness.installed import PEERS, stamp
from harness.process import Group

from lapis.cli.output import print_table, say
from lapis.inference.fake import FakeEngine
from lapis.inference.request import Request, SamplingParams

AT_ONCE = 16
PACE = 0.010  # seconds a step of the fake at a model's pace
TEXT = "a bridge carries the river under the morning light "
ASK: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "Hello"}],
    "max_tokens": 8,
}
PACED = {**ASK, "max_tokens": 128}
MASTER = "sk-of-this-benchmark"
CONFIG = """
model_list:
  - model_name: tiny
    litellm_params: {{model: openai/tiny, api_base: "http://127.0.0.1:{port}/v1", api_key: unused}}
general_settings: {{master_key: {key}}}
litellm_settings: {{telemetry: false, num_retries: 0}}
"""


def engine(pace: float) -> dict[str, Any]:
    """What the fake is made with: it takes on as many requests as come. It encodes its whole text for each."""
    text = TEXT * (60 if pace else 1)
    return {
        "reply": lambda prompt, seed: text,
        "seconds_per_token": pace,
        "running": 2000,
        "pages": 40_000,
        "queued_tokens": 4_000_000,
    }


def serve(pace: float, keys: bool) -> None:
    """A server's process: prints its port and a key, and ends when its input does."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from lapis.db import open_database
    from lapis.home import Home
    from lapis.tenants.keys import ApiKeys
    from tests.served import fake_server

    with tempfile.TemporaryDirectory() as folder:
        home = Home(Path(folder) / "home")
        db = open_database(home.database_url)
        key = ApiKeys(db).create("load", "benchmark")[1] if keys else "unused"
        db.dispose()
        with fake_server(home, **engine(pace)) as server:
            print(json.dumps([int(server.url.split(":")[2].split("/")[0]), key]), flush=True)
            sys.stdin.read()


@contextmanager
def lapis(pace: float = 0.0, *, keys: bool = True) -> Iterator[tuple[Door, int]]:
    """A server of ours: its door, and its process."""
    command = [sys.executable, __file__, "--serve", str(pace), *(["--keys"] if keys else [])]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield Door(*json.loads(process.stdout.readline())), process.pid
    finally:
        process.stdin.close()
        process.wait()


@contextmanager
def litellm(behind: Door) -> Iterator[Door]:
    """LiteLLM's proxy in front of a server of ours."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.yaml"
        config.write_text(CONFIG.format(port=behind.port, key=MASTER))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            door = Door(int(probe.getsockname()[1]), MASTER)
        command = [str(PEERS / "litellm" / "bin" / "litellm"), "--config", str(config), "--host", "127.0.0.1"]
        quiet = {"LITELLM_LOG": "ERROR", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
        group = Group([*command, "--port", str(door.port), "--num_workers", "1"], quiet, talk=False)
        try:
            _wait(door, group)
            yield door
        finally:
            group.end()


def _wait(door: Door, group: Group, seconds: float = 120.0) -> None:
    give_up = time.monotonic() + seconds
    while time.monotonic() < give_up and group.process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", door.port)) == 0:
                return
        time.sleep(0.2)
    raise group.failure("LiteLLM's proxy did not start")


async def bare_seconds(pace: float, tokens: int, count: int, at_once: int) -> list[float]:
    """As answer_seconds, of an engine in this process."""
    model = FakeEngine("tiny", **engine(pace))
    ids = tuple(model.tokenizer.encode("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"))
    seconds: list[float] = []

    async def client(asked: int) -> None:
        for number in range(asked):
            began = time.perf_counter()
            request = Request(f"{id(seconds)}-{number}", ids, SamplingParams(max_tokens=tokens))
            await model.submit(request).whole()
            seconds.append(time.perf_counter() - began)

    try:
        await asyncio.gather(*(client(count // at_once) for _ in range(at_once)))
    finally:
        model.close()
    return seconds


def rate(seconds: list[float], at_once: int) -> float:
    """Answers a second of a closed loop of so many clients."""
    return at_once / statistics.fmean(seconds)


def overhead(rounds: int) -> list[list[str]]:
    """One at a time: milliseconds in process and over HTTP."""
    found: dict[str, list[float]] = {"in process": [], "over HTTP": []}
    with lapis() as (door, _):
        asyncio.run(answer_seconds(door, ASK, 100, 1))
        for _ in range(rounds):
            found["in process"] += asyncio.run(bare_seconds(0.0, 8, 300, 1))
            found["over HTTP"] += asyncio.run(answer_seconds(door, ASK, 300, 1))
    half = {side: statistics.median(seconds) * 1000 for side, seconds in found.items()}
    more = half["over HTTP"] - half["in process"]
    return [
        [
            "p50 of an answer of 8 tokens, ms",
            f"{half['over HTTP']:.2f}",
            f"in process {half['in process']:.2f}",
        ],
        ["the gateway's part, ms", f"{more:.2f}", "at most 2 wanted"],
    ]


def paced(rounds: int) -> list[list[str]]:
    """At a model's pace: what HTTP leaves of the bare engine's rate."""
    ratios = []
    with lapis(PACE) as (door, _):
        asyncio.run(answer_seconds(door, PACED, AT_ONCE, AT_ONCE))
        for _ in range(rounds):
            bare = rate(asyncio.run(bare_seconds(PACE, 128, 4 * AT_ONCE, AT_ONCE)), AT_ONCE)
            ratios.append(
                rate(asyncio.run(answer_seconds(door, PACED, 4 * AT_ONCE, AT_ONCE)), AT_ONCE) / bare
            )
    return [
        [
            "answers at a model's pace, of the bare engine's rate",
            f"{statistics.median(ratios):.3f}",
            ">= 0.95 wanted",
        ]
    ]


def beside_litellm(rounds: int, requests: int) -> list[list[str]]:
    """Answers a second, 16 at a time, beside the peer."""
    if not stamp("litellm").exists():
        say("LiteLLM is not installed: make bench-peers PEERS=litellm")
        return []
    found: dict[str, list[float]] = {"Lapis": [], "LiteLLM": []}
    with lapis() as (door, _), lapis(keys=False) as (behind, _), litellm(behind) as peer:
        sides = {"Lapis": door, "LiteLLM": peer}
        for _ in range(rounds + 1):
            for side, at in sides.items():
                asked = requests if side == "Lapis" else requests // 8
                found[side].append(rate(asyncio.run(answer_seconds(at, ASK, asked, AT_ONCE)), AT_ONCE))
    mine, theirs = (statistics.median(rates[1:]) for rates in found.values())  # the first round warms up
    return [
        [
            f"answers a second, {AT_ONCE} at a time",
            f"{mine:.0f}",
            f"LiteLLM {theirs:.0f}: {mine / theirs:.1f}x, 3 wanted",
        ]
    ]


def streams(count: int, minutes: float) -> list[list[str]]:
    """Many streams at once, again and again; errors and memory."""
    wrong: list[str] = []
    weights: list[int] = []
    rounds = 0
    bodies = [{**ASK, "stream": True, "max_tokens": 100, "ignore_eos": True}] * count
    with lapis(0.05) as (door, pid):
        ends = time.monotonic() + minutes * 60
        while rounds < 2 or time.monotonic() < ends:
            wrong += asyncio.run(read_streams(door, bodies))
            weights.append(resident(pid))
            rounds += 1
            say(f"round {rounds}: {weights[-1] / 1e6:.0f} MB, {len(wrong)} wrong")
    for text in wrong[:3]:
        say(text)
    early = statistics.fmean(weights[1 : max(2, len(weights) // 4)])
    late = statistics.fmean(weights[-max(1, len(weights) // 4) :])
    return [
        [
            f"{rounds} x {count:,} streams of 100 tokens at once, answers that did not end well",
            str(len(wrong)),
            "0 wanted",
        ],
        [
            "memory of the server, the last quarter of the time, MB",
            f"{late / 1e6:.0f}",
            f"first quarter {early / 1e6:.0f}",
        ],
    ]


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=1600)
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--serve", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--keys", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve is not None:
        serve(options.serve, options.keys)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # servers are ended on the way out
    parts: list[tuple[str, Callable[[], list[list[str]]]]] = [
        ("one at a time", lambda: overhead(options.rounds)),
        ("at a model's pace", lambda: paced(options.rounds)),
        ("beside LiteLLM", lambda: beside_litellm(options.rounds, options.requests)),
    ]
    if options.streams:
        parts.append(("streams", lambda: streams(options.streams, options.minutes)))
    rows = []
    for name, part in parts:
        say(f"{name} …")
        for row in part():
            say("  ".join(row))
            rows.append(row)
    print_table(("what", "Lapis", "beside"), rows)


if __name__ == "__main__":
    main()
