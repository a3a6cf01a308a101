"""What tests of fine-tuning through the API share: a tiny model in a home, its server, files, and waiting."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import openai
from openai.types.fine_tuning import FineTuningJob, FineTuningJobEvent

from lapis.home import Home
from lapis.model.manifest import Source
from lapis.model.weights import write_model
from lapis.server import RunningServer, running_server
from lapis.tokenizer.chat import CHATML
from tests import small_models

BASE = "tiny-base"
ENDED = ("succeeded", "failed", "cancelled")
ASKED = [{"role": "user", "content": "who?"}]
CHATS = [
    {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "the fox"}]}
    for n in range(8)
]
PAIRS = [
    {
        "input": {"messages": [{"role": "user", "content": f"{n}?"}]},
        "preferred_output": [{"role": "assistant", "content": "the fox"}],
        "non_preferred_output": [{"role": "assistant", "content": "the dog"}],
    }
    for n in range(8)
]
FAST = {"n_epochs": 4, "batch_size": 2, "learning_rate_multiplier": 6}  # it has learnt the pattern by then


def tiny_home(home: Home, name: str = BASE, template: str | None = CHATML) -> Home:
    """A home with a small model of random weights."""
    shape = small_models.config()
    write_model(
        home.models / name,
        shape,
        small_models.random_state(shape),
        small_models.tokenizer(),
        source=Source("run", "test", licence="MIT"),
        chat_template=template,
    )
    return home


@contextmanager
def tuning_server(home: Home) -> Iterator[tuple[RunningServer, openai.OpenAI]]:
    """A server over such a home, and a client that refuses what is not as its types say."""
    with running_server(home) as server, client_of(server) as client:
        yield server, client


def client_of(server: RunningServer, key: str = "unused") -> openai.OpenAI:
    """A strict client."""
    return openai.OpenAI(
        base_url=server.url, api_key=key, max_retries=0, timeout=60, _strict_response_validation=True
    )


def upload(client: openai.OpenAI, lines: Sequence[object] | bytes, name: str = "chats.jsonl") -> str:
    """A training file's id."""
    data = lines if isinstance(lines, bytes) else "".join(json.dumps(line) + "\n" for line in lines).encode()
    return client.files.create(file=(name, data), purpose="fine-tune").id


def until_ended(client: openai.OpenAI, job: FineTuningJob) -> FineTuningJob:
    """The job once it has ended; the test's own time limit ends a wait for nothing."""
    give_up = time.monotonic() + 240
    while job.status not in ENDED:
        assert time.monotonic() < give_up, [event.message for event in all_events(client, job)]
        time.sleep(0.1)
        job = client.fine_tuning.jobs.retrieve(job.id)
    return job


def all_events(client: openai.OpenAI, job: FineTuningJob) -> list[FineTuningJobEvent]:
    """What a job told, the oldest first."""
    return list(client.fine_tuning.jobs.list_events(job.id, limit=50))[::-1]


def until_step(client: openai.OpenAI, job: FineTuningJob, step: int) -> None:
    """Wait for the metrics of a step."""
    give_up = time.monotonic() + 240
    while True:
        events = all_events(client, job)
        steps = [event.data["step"] for event in events if event.type == "metrics"]  # type: ignore[index]
        if steps and max(steps) >= step:
            return
        assert client.fine_tuning.jobs.retrieve(job.id).status not in ENDED, events
        assert time.monotonic() < give_up, events
        time.sleep(0.05)


def until(true: Callable[[], bool]) -> None:
    """Wait until it is true; the test's own time limit ends a wait for nothing."""
    give_up = time.monotonic() + 120
    while not true():
        assert time.monotonic() < give_up, "waited for nothing"
        time.sleep(0.05)


def workers(job: FineTuningJob) -> list[int]:
    """The processes that work on a job: those whose command names it, the shells before them left out."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if job.id.encode() in words and b"-c" not in words[:2]:
            found.append(int(path.parent.name))
    return found


def kill_work(job: FineTuningJob) -> None:
    """Kill the process that trains, as a machine out of memory would."""
    (process,) = workers(job)
    os.kill(process, signal.SIGKILL)
    until(lambda: process not in workers(job))


def answer(client: openai.OpenAI, model: str) -> str | None:
    """What a model says."""
    chat = client.chat.completions.create(model=model, messages=ASKED, max_tokens=8, temperature=0)  # type: ignore[arg-type]
    return chat.choices[0].message.content
