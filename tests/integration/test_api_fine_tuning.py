"""Fine-tuning through the official client: files, jobs that train, events, checkpoints, and the models they make."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest
from openai.types.fine_tuning import FineTuningJob

from lapis.db import write
from lapis.gateway.services import Services
from lapis.home import Home
from lapis.jobs.queue import JobQueue
from lapis.server import RunningServer
from lapis.tables.fine_tuning import fine_tuned_models
from lapis.tenants.keys import ApiKeys
from lapis.tenants.tenant import Role, Tenants
from lapis.train.run import Run
from tests.postgres import Databases
from tests.tuned import (
    BASE,
    CHATS,
    FAST,
    PAIRS,
    all_events,
    answer,
    client_of,
    kill_work,
    tiny_home,
    tuning_server,
    until,
    until_ended,
    until_step,
    upload,
    workers,
)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RunningServer, openai.OpenAI]]:
    with tuning_server(tiny_home(Home(tmp_path_factory.mktemp("tuning") / "home"))) as both:
        yield both


@pytest.fixture(scope="module")
def client(served: tuple[RunningServer, openai.OpenAI]) -> openai.OpenAI:
    return served[1]


@pytest.fixture(autouse=True)
def _one_database(
    served: tuple[RunningServer, openai.OpenAI], databases: Databases | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On PostgreSQL the processes of jobs use the server's database."""
    if databases is not None:
        monkeypatch.setenv("LAPIS_DATABASE_URL", databases.of(served[0].services.home))


def test_a_killed_and_paused_job_makes_its_model_once(
    served: tuple[RunningServer, openai.OpenAI], client: openai.OpenAI
) -> None:
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
    told = (job.status, job.seed, job.fine_tuned_model, job.finished_at)
    assert told == ("validating_files", 7, None, None)
    client.files.delete(file)  # a job keeps what it was given

    until_step(client, job, 2)
    kill_work(job)
    until_step(client, job, 6)
    paused = client.fine_tuning.jobs.pause(job.id)
    assert paused.status == "queued"
    assert paused.paused_at is not None  # type: ignore[attr-defined]
    with pytest.raises(openai.ConflictError, match="is paused: it cannot be paused"):
        client.fine_tuning.jobs.pause(job.id)
    until(lambda: not workers(job))
    resumed = client.fine_tuning.jobs.resume(job.id)
    assert (resumed.status, resumed.paused_at) == ("queued", None)  # type: ignore[attr-defined]
    job = until_ended(client, job)
    assert job.status == "succeeded", job.error
    written = Run.find(served[0].services.home, job.id).samples()  # by the adapter, to the validation file
    assert [one["text"] for one in written[-1]["samples"]] == ["the fox", "the fox"]
    _told_once(client, job)
    _is_served(client, job)
    _is_deleted(client, job)


def _told_once(client: openai.OpenAI, job: FineTuningJob) -> None:
    """Every step, checkpoint and ending is told once, though the work began three times."""
    messages = [event.message for event in all_events(client, job)]
    begun = ("Fine-tuning job started.", "Training goes on from step")  # twice from one step, if killed soon
    once = [message for message in messages if not message.startswith(begun)]
    assert len(set(once)) == len(once)
    assert any(message.startswith(begun[1]) for message in messages)
    steps = [event.data["step"] for event in all_events(client, job) if "training loss" in event.message]  # type: ignore[index]
    assert steps == sorted(set(steps))
    assert messages[-1] == "The job has successfully completed"
    assert job.trained_tokens > 100  # type: ignore[operator]
    assert job.finished_at >= job.created_at  # type: ignore[operator]
    assert (job.hyperparameters.n_epochs, job.hyperparameters.batch_size) == (4, 2)


def _is_served(client: openai.OpenAI, job: FineTuningJob) -> None:
    name = job.fine_tuned_model
    assert name == f"ft:{BASE}:default:fox:{job.id.removeprefix('ftjob-')[:8]}"
    assert answer(client, name) == "the fox"
    assert answer(client, BASE) != "the fox"
    listed = [model for model in client.models.list() if model.id == name]
    assert [model.owned_by for model in listed] == ["default"]
    assert client.models.retrieve(name).parent == BASE  # type: ignore[attr-defined]
    points = client.fine_tuning.jobs.checkpoints.list(job.id, limit=100).data
    assert [point.step_number for point in points] == [16, 12, 8, 4]
    assert [point.fine_tuned_model_checkpoint for point in points] == [
        f"{name}:ckpt-step-{point.step_number}" for point in points
    ]
    assert points[0].metrics.full_valid_loss < points[-1].metrics.full_valid_loss  # type: ignore[operator]
    assert answer(client, points[0].fine_tuned_model_checkpoint) == "the fox"
    table = list(csv.DictReader(io.StringIO(client.files.content(job.result_files[0]).text)))
    assert int(table[-1]["step"]) == 16
    assert float(table[-1]["train_loss"]) == pytest.approx(points[0].metrics.train_loss)
    assert len(client.files.list(purpose="fine-tune-results").data) == 1


def _is_deleted(client: openai.OpenAI, job: FineTuningJob) -> None:
    name = str(job.fine_tuned_model)
    assert client.models.delete(name).deleted
    assert name not in [model.id for model in client.models.list()]
    with pytest.raises(openai.NotFoundError) as caught:
        answer(client, name)
    assert caught.value.code == "model_not_found"
    assert answer(client, f"{name}:ckpt-step-16") == "the fox"  # of the same adapter
    with pytest.raises(openai.PermissionDeniedError, match="only a project's own fine-tuned models"):
        client.models.delete(BASE)


@pytest.mark.long  # the way is that of the other methods; what is learnt is tested at the trainer
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


def test_files_that_cannot_be_trained_on_are_told_by_name_and_line(client: openai.OpenAI) -> None:
    unanswered = [CHATS[0], {"messages": [{"role": "user", "content": "a"}]}]
    broken = b'{"messages": []}\n'.replace(b"[]", json.dumps(CHATS[0]["messages"]).encode()) + b"{oops\n"
    jobs = {
        "my chats.jsonl:2: the chat has no assistant turn": {
            "training_file": upload(client, unanswered, "my chats.jsonl")
        },
        "held.jsonl:2: the line is not JSON": {
            "training_file": upload(client, CHATS),
            "validation_file": upload(client, broken, "held.jsonl"),
        },
    }
    made = {said: client.fine_tuning.jobs.create(model=BASE, **files) for said, files in jobs.items()}
    for said, job in made.items():
        job = until_ended(client, job)
        param = "validation_file" if job.validation_file else "training_file"
        assert (job.status, job.error.code, job.error.param) == ("failed", f"invalid_{param}", param)
        assert job.error.message.startswith(said)
        last = all_events(client, job)[-1]
        assert (last.level, last.message) == ("error", f"The job failed: {job.error.message}")


def test_chats_for_a_model_without_a_template_are_refused_before_training(
    served: tuple[RunningServer, openai.OpenAI],
) -> None:
    server, client = served
    tiny_home(server.services.home, "plain", template=None)
    job = client.fine_tuning.jobs.create(model="plain", training_file=upload(client, CHATS))
    job = until_ended(client, job)
    assert (job.status, job.error.param) == ("failed", "model")
    assert job.error.message.startswith("'plain' has no chat template")
    steps = [work.spec.argv[-2] for work in JobQueue(server.services.db).list() if job.id in work.spec.argv]
    assert steps == ["check"]


def test_what_cannot_be_asked_for_is_refused_at_once(client: openai.OpenAI) -> None:
    file, other = upload(client, CHATS), client.files.create(file=("b.jsonl", b"{}\n"), purpose="batch").id

    def refused(status: int, **request: Any) -> str:
        with pytest.raises(openai.APIStatusError) as caught:
            client.fine_tuning.jobs.create(**{"model": BASE, "training_file": file, **request})
        assert caught.value.status_code == status, caught.value
        return f"{caught.value.param}: {caught.value.message}"

    assert "model: " in refused(404, model="tiny-bass")
    assert "training_file: " in refused(404, training_file="file-nothere")
    assert "for the purpose 'batch'" in refused(400, training_file=other)
    assert "validation_file: " in refused(404, validation_file="file-nothere")
    assert "integrations are not offered" in refused(
        400, integrations=[{"type": "wandb", "wandb": {"project": "p"}}]
    )
    assert "suffix" in refused(400, suffix="a b")
    for wrong in ({"n_epochs": 0}, {"batch_size": "many"}, {"learning_rate_multiplier": -1}, {"epochs": 3}):
        assert "hyperparameters" in refused(400, hyperparameters=wrong)
    assert "'dpo' is given" in refused(400, method={"type": "supervised", "dpo": {}})
    assert "names the grader" in refused(400, method={"type": "reinforcement"})
    grader = {"type": "string_check", "name": "a", "operation": "is", "input": "", "reference": ""}
    assert "method.reinforcement.grader" in refused(
        400, method={"type": "reinforcement", "reinforcement": {"grader": grader}}
    )
    assert client.fine_tuning.jobs.list(metadata={"none": "such"}).data == []


def test_jobs_models_and_files_of_another_project_are_not_there(
    served: tuple[RunningServer, openai.OpenAI], client: openai.OpenAI
) -> None:
    server, _ = served
    services = server.services
    tenants, keys = Tenants(services.db), ApiKeys(services.db)
    names = {name: tenants.create_project(name, "os:ana").id for name in ("ours", "theirs")}
    clients = {
        name: client_of(server, keys.create(name, "os:ana", project=id, scopes=Role.OWNER.scopes)[1])
        for name, id in names.items()
    }
    ours, theirs = clients["ours"], clients["theirs"]
    file = upload(ours, CHATS)
    job = ours.fine_tuning.jobs.create(model=BASE, training_file=file, suffix="mine")
    jobs = theirs.fine_tuning.jobs
    for ask in (jobs.retrieve, jobs.cancel, jobs.pause, jobs.resume, jobs.list_events, jobs.checkpoints.list):
        foreign, unknown = said(lambda ask=ask: ask(job.id)), said(lambda ask=ask: ask("ftjob-1"))
        assert foreign.replace(job.id, "ftjob-1") == unknown
    assert said(lambda: jobs.create(model=BASE, training_file=file)).replace(file, "file-1") == said(
        lambda: jobs.create(model=BASE, training_file="file-1")
    )
    assert jobs.list().data == []
    ours.fine_tuning.jobs.cancel(job.id)

    model = registered(services, names["ours"], job.id)
    permissions = ours.fine_tuning.checkpoints.permissions
    assert ours.models.retrieve(model).id == model
    foreign = theirs.fine_tuning.checkpoints.permissions
    for name in (model, "ft:unknown"):
        assert said(lambda name=name: theirs.models.retrieve(name)).startswith(f"There is no model {name!r}")
        assert said(lambda name=name: theirs.models.delete(name)).startswith(f"There is no model {name!r}")
        assert said(lambda name=name: foreign.list(name)) == f"There is no model {name!r} here."
    assert "no project 'proj_1'" in said(lambda: permissions.create(model, project_ids=["proj_1"]))
    (lent,) = permissions.create(model, project_ids=[names["theirs"]])
    assert permissions.create(model, project_ids=[names["theirs"]]).data == [lent]
    assert [one.project_id for one in permissions.list(model)] == [names["theirs"]]
    assert permissions.list(model, project_id=names["ours"]).data == []
    services.router.refresh()
    assert model in [one.id for one in theirs.models.list()]
    with pytest.raises(openai.PermissionDeniedError, match="another project's"):
        theirs.models.delete(model)
    assert permissions.delete(lent.id, fine_tuned_model_checkpoint=model).deleted
    services.router.refresh()
    assert model not in [one.id for one in theirs.models.list()]
    assert said(lambda: permissions.delete(lent.id, fine_tuned_model_checkpoint=model)).startswith(
        "There is no permission"
    )
    assert ours.models.delete(model).deleted


def registered(services: Services, project_id: str, job_id: str) -> str:
    """A model of a project, as if a job had made it."""
    base = services.router.lookup(BASE)[0]
    row = {"name": f"ft:{BASE}:default:mine:1", "project_id": project_id, "job_id": job_id, "base": BASE}
    row |= {"base_digest": base.digest, "digest": "0" * 64, "folder": "none", "licence": "MIT"}
    with write(services.db) as connection:
        connection.execute(fine_tuned_models.insert().values(**row, created_at=1.0))
    return row["name"]


def said(ask: Callable[[], object]) -> str:
    """The words of a 404."""
    with pytest.raises(openai.NotFoundError) as caught:
        ask()
    return caught.value.body["message"]  # type: ignore[index]
