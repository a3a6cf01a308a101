"""A fine-tuning job whose process, its shell and the server are killed again and again ends as an unbroken one."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import openai
import pytest
from openai.types.fine_tuning import FineTuningJob

from lapis.home import Home
from tests.tuned import BASE, CHATS, ENDED, all_events, answer, tiny_home, until, until_step, upload, workers

KILLS = 8
HYPERPARAMETERS = {"n_epochs": 10, "batch_size": 2, "learning_rate_multiplier": 3}


class ServerProcess:
    """`lapis serve` in a process of its own, and a strict client of it."""

    def __init__(self, home: Home, log: Path) -> None:
        command = [sys.executable, "-m", "lapis.cli.main", "serve", "--port", "0", "--no-console"]
        environment = {**os.environ, "LAPIS_HOME": str(home.root)}
        with log.open("ab") as out:
            before = out.tell()
            self.process = subprocess.Popen(command, env=environment, stdout=out, stderr=out)
        until(lambda: b" at http" in log.read_bytes()[before:])
        url = re.findall(rb"at (http\S+)", log.read_bytes()[before:])[-1].decode()
        self.client = openai.OpenAI(
            base_url=url, api_key="unused", timeout=120, _strict_response_validation=True
        )

    def kill(self) -> None:
        """End it at once; its jobs go on."""
        self.client.close()
        self.process.kill()
        self.process.wait()


def kill_job(job: FineTuningJob, random: random.Random) -> None:
    """Kill what works on a job, if anything does just now: its process, or the shell that stands before it."""
    for process in workers(job):
        shell = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
        os.kill(random.choice([process, shell]), signal.SIGKILL)


def begin(client: openai.OpenAI) -> FineTuningJob:
    return client.fine_tuning.jobs.create(
        model=BASE,
        training_file=upload(client, CHATS),
        validation_file=upload(client, CHATS[:2]),
        seed=3,
        method={"type": "supervised", "supervised": {"hyperparameters": HYPERPARAMETERS}},  # type: ignore[typeddict-item]
    )


def step_of(client: openai.OpenAI, job: FineTuningJob) -> int:
    """The last step that was told."""
    return max(
        (event.data["step"] for event in all_events(client, job) if event.type == "metrics"), default=0
    )  # type: ignore[index]


def wait(client: openai.OpenAI, job: FineTuningJob) -> FineTuningJob:
    give_up = time.monotonic() + 400
    while job.status not in ENDED:
        assert time.monotonic() < give_up, [event.message for event in all_events(client, job)]
        time.sleep(0.5)
        job = client.fine_tuning.jobs.retrieve(job.id)
    assert job.status == "succeeded", job.error
    return job


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_kills_anywhere_change_nothing_of_what_is_made(home: Home, tmp_path: Path) -> None:
    chance, log = random.Random(7), tmp_path / "log"
    server = ServerProcess(tiny_home(home), log)
    try:
        whole = wait(server.client, begin(server.client))
        job = begin(server.client)
        for kill in range(KILLS):
            if kill % 2:  # work that never comes further is given up after three starts
                until_step(server.client, job, step_of(server.client, job) + 1)
            time.sleep(chance.uniform(0.2, 6))
            if kill % 4 == 3:
                server.kill()
                server = ServerProcess(home, log)
            else:
                kill_job(job, chance)
            if server.client.fine_tuning.jobs.retrieve(job.id).status in ENDED:
                break
        job = wait(server.client, job)
        client, names = server.client, [str(one.fine_tuned_model) for one in (whole, job)]
        digests = [client.models.retrieve(name).digest for name in names]  # type: ignore[attr-defined]
        assert digests[0] == digests[1]
        assert answer(client, names[0]) == answer(client, names[1])
        messages = [event.message for event in all_events(client, job)]
        for once in (
            "Files validated",
            "Checkpoint created at step 40",
            "New fine-tuned model",
            "The job has succ",
        ):
            assert len([message for message in messages if message.startswith(once)]) == 1, messages
        assert sum(name in model.id for name in names[1:] for model in client.models.list()) == 11
        points = [list(client.fine_tuning.jobs.checkpoints.list(one.id)) for one in (whole, job)]
        losses = [[point.metrics.full_valid_loss for point in one] for one in points]
        assert losses[0] == losses[1]
        assert len(client.files.list(purpose="fine-tune-results").data) == 2
    finally:
        server.kill()
