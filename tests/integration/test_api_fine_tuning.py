"""Fine-tuning through the official client: files, jobs that train, events, checkpoints, and the models they make."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator

import openai
import pytest

from lapis.home import Home
from lapis.server import RunningServer
from tests.tuned import (
    BASE,
    CHATS,
    FAST,
    PAIRS,
    all_events,
    answer,
    tiny_home,
    tuning_server,
    until_ended,
    upload,
)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RunningServer, openai.OpenAI]]:
    with tuning_server(tiny_home(Home(tmp_path_factory.mktemp("tuning") / "home"))) as both:
        yield both


@pytest.fixture(scope="module")
def client(served: tuple[RunningServer, openai.OpenAI]) -> openai.OpenAI:
    return served[1]


def test_a_model_is_fine_tuned_asked_and_deleted(client: openai.OpenAI) -> None:
    file, held = upload(client, CHATS), upload(client, CHATS[:2], "held.jsonl")
    job = client.fine_tuning.jobs.create(
        model=BASE,
        training_file=file,
        validation_file=held,
        seed=7,
        suffix="fox",
        metadata={"team": "a"},
        method={"type": "supervised", "supervised": {"hyperparameters": FAST}},
    )
    assert (job.status, job.seed, job.fine_tuned_model, job.finished_at) == (
        "validating_files",
        7,
        None,
        None,
    )
    client.files.delete(file)  # a job keeps what it was given
    job = until_ended(client, job)
    assert job.status == "succeeded", job.error
    name = f"ft:{BASE}:default:fox:{job.id.removeprefix('ftjob-')[:8]}"
    assert job.fine_tuned_model == name
    assert (job.hyperparameters.n_epochs, job.hyperparameters.batch_size) == (4, 2)
    assert job.trained_tokens > 100
    assert job.finished_at >= job.created_at

    assert answer(client, name) == "the fox"
    assert answer(client, BASE) != "the fox"
    listed = {model.id: model for model in client.models.list()}
    assert listed[name].owned_by == "default"
    assert client.models.retrieve(name).parent == BASE  # type: ignore[attr-defined]

    points = client.fine_tuning.jobs.checkpoints.list(job.id, limit=100).data
    assert [point.step_number for point in points] == [16, 12, 8, 4]
    assert [point.fine_tuned_model_checkpoint for point in points] == [
        f"{name}:ckpt-step-{point.step_number}" for point in points
    ]
    assert points[0].metrics.full_valid_loss < points[-1].metrics.full_valid_loss
    assert points[0].metrics.train_loss < 1
    assert answer(client, points[0].fine_tuned_model_checkpoint) == "the fox"

    table = list(csv.DictReader(io.StringIO(client.files.content(job.result_files[0]).text)))
    assert [int(row["step"]) for row in table][-1] == 16
    assert float(table[-1]["train_loss"]) == pytest.approx(points[0].metrics.train_loss)

    assert client.models.delete(name).deleted
    assert name not in [model.id for model in client.models.list()]
    with pytest.raises(openai.NotFoundError) as caught:
        answer(client, name)
    assert caught.value.code == "model_not_found"
    assert answer(client, points[0].fine_tuned_model_checkpoint) == "the fox"  # of the same adapter


def test_preferences_are_learnt(client: openai.OpenAI) -> None:
    hyperparameters = {**FAST, "beta": 0.2, "n_epochs": 3}
    job = client.fine_tuning.jobs.create(
        model=BASE,
        training_file=upload(client, PAIRS),
        validation_file=upload(client, PAIRS[:2]),
        method={"type": "dpo", "dpo": {"hyperparameters": hyperparameters}},  # type: ignore[typeddict-item]
    )
    job = until_ended(client, job)
    assert job.status == "succeeded", job.error
    assert job.method.dpo.hyperparameters.beta == 0.2  # type: ignore[union-attr]
    metrics = client.fine_tuning.jobs.checkpoints.list(job.id).data[0].metrics
    assert metrics.valid_accuracy == 1.0  # type: ignore[attr-defined]
    assert answer(client, job.fine_tuned_model) is not None  # type: ignore[arg-type]


def test_a_graders_reward_is_earned(client: openai.OpenAI) -> None:
    prompts = [{"messages": [{"role": "user", "content": f"{n}?"}], "letter": "e"} for n in range(8)]
    grader = {
        "type": "string_check",
        "name": "has-e",
        "operation": "like",
        "input": "{{ sample.output_text }}",
        "reference": "{{ item.letter }}",
    }
    job = client.fine_tuning.jobs.create(
        model=BASE,
        training_file=upload(client, prompts),
        method={
            "type": "reinforcement",
            "reinforcement": {
                "grader": grader,
                "hyperparameters": {"n_epochs": 1, "batch_size": 4, "compute_multiplier": 0.5},
            },
        },  # type: ignore[typeddict-item]
    )
    job = until_ended(client, job)
    assert job.status == "succeeded", job.error
    rewards = [
        event.data["train_mean_reward"] for event in all_events(client, job) if event.type == "metrics"
    ]  # type: ignore[index]
    assert len(rewards) == 2
    assert all(0 <= reward <= 1 for reward in rewards)
    assert job.method.reinforcement.grader.name == "has-e"  # type: ignore[union-attr]
    assert answer(client, job.fine_tuned_model) is not None  # type: ignore[arg-type]
