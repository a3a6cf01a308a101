"""Fine-tuning without training: what "auto" decides, what follows from a dead process, who may see what."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from lapis.audit import AuditLog
from lapis.db import open_database
from lapis.errors import ConflictError, InputError, NotFoundError
from lapis.gateway.attempt import Attempt, Made
from lapis.gateway.fine_tuned import FineTunedModels
from lapis.gateway.fine_tuning import Event, FineTuning, FineTuningJob, Request
from lapis.gateway.fine_tuning_loop import FineTuningLoop, decide
from lapis.gateway.hyperparameters import Hyperparameters, Kind, make_plan
from lapis.gateway.services import FileStore
from lapis.home import Home
from lapis.jobs.job import Job, State
from lapis.jobs.queue import JobQueue

AUTO = Hyperparameters()


@pytest.mark.parametrize(
    ("examples", "epochs", "batch"), [(1, 25, 1), (10, 10, 1), (48, 3, 3), (5_000, 3, 8), (60_000, 1, 8)]
)
def test_small_sets_are_gone_through_more_often(examples: int, epochs: int, batch: int) -> None:
    plan = make_plan("supervised", AUTO, examples, 100, 2048)
    assert (plan.n_epochs, plan.batch_size) == (epochs, batch)
    assert plan.steps >= epochs * examples / batch
    assert plan.steps % plan.kept == 0  # every epoch ends with a checkpoint that is served
    assert plan.kept % plan.interval == 0
    assert plan.interval <= 64


@pytest.mark.parametrize("kind", ["supervised", "dpo", "reinforcement"])
def test_what_is_asked_for_is_done(kind: Kind) -> None:
    asked = Hyperparameters(2, 4, 0.5, 0.3, 2.0, 3)
    plan = make_plan(kind, asked, 10, 100, 2048)
    assert (plan.n_epochs, plan.batch_size, plan.beta, plan.steps, plan.interval) == (2, 4, 0.3, 6, 3)
    assert plan.lr == pytest.approx(make_plan(kind, AUTO, 10, 100, 2048).lr / 2)
    assert plan.group == (16 if kind == "reinforcement" else 1)
    assert [step for step in range(7) if plan.is_kept(step)] == [3, 6]
    assert plan.batch_size * plan.group % plan.micro_batch == 0


def test_a_prompt_leaves_room_for_its_answer() -> None:
    plan = make_plan("reinforcement", AUTO, 10, 100, 160)
    assert (plan.max_tokens, plan.sequence) == (60, 160)
    with pytest.raises(InputError, match="no room for an answer"):
        make_plan("reinforcement", AUTO, 10, 155, 160)


@pytest.fixture
def jobs(home: Home) -> Iterator[FineTuning]:
    db = open_database(home.database_url)
    yield FineTuning(home, db, JobQueue(db), FileStore(home.files, db))
    db.dispose()


def created(jobs: FineTuning, metadata: dict[str, str] | None = None) -> FineTuningJob:
    file = jobs.files.put("default", "a.jsonl", "fine-tune", b"{}\n")
    request = Request("default", "tiny", "tiny", "d1", file.id, None, "supervised", {"n_epochs": "auto"}, 1)
    return jobs.create("default", "os:ana", request, metadata)


def begun(jobs: FineTuning, job: FineTuningJob) -> Attempt:
    """The attempt of a controller that has just started the work on a job."""
    queued = jobs.queue.get(str(jobs.get("default", job.id).queue_job_id))
    lease = jobs.queue.claim(queued, "x")
    assert lease is not None
    jobs.queue.started(lease)
    return Attempt(jobs.home, jobs.db, job.id, f"{queued.id}/{queued.attempt + 1}")


def ended(jobs: FineTuning, job: FineTuningJob, state: State, code: int | None = None) -> None:
    """The queue's job for it ends so."""
    queued = jobs.queue.get(str(jobs.get("default", job.id).queue_job_id))
    lease = jobs.queue.claim(queued, "x")
    assert lease is not None
    jobs.queue.started(lease)
    jobs.queue.finish(lease, state, f"exit status {code}", code)


def told(jobs: FineTuning, job: FineTuningJob) -> list[str]:
    return [row.message for row in jobs.events("default", job.id, None, 100).rows][::-1]


def test_an_attempt_that_lost_its_job_changes_nothing(jobs: FineTuning) -> None:
    job = created(jobs)
    check = begun(jobs, job)
    check.checked(examples=3, validation_examples=0)
    assert jobs.get("default", job.id).status == "queued"
    with pytest.raises(ConflictError):  # its part is done
        check.checked(examples=3, validation_examples=0)
    training = begun(jobs, job)
    training.tell(Event("started", "go"), Event("started", "go"), status="running", step=3)
    other = Attempt(jobs.home, jobs.db, job.id, training.name.replace("/1", "/2"))
    jobs.pause("default", job.id, "os:ana")
    made = Made("ft:x", "folder", "d2")
    for attempt in (training, other):
        with pytest.raises(ConflictError, match="is paused"):
            attempt.succeed(made, result_files=[])
    assert jobs.get("default", job.id).status == "paused"
    assert told(jobs, job).count("go") == 1


def test_work_that_a_signal_ended_begins_again_as_long_as_it_helps(jobs: FineTuning) -> None:
    job, loop = created(jobs), FineTuningLoop(jobs)
    begun(jobs, job).checked(examples=3, validation_examples=0)
    for _ in range(3):
        ended(jobs, job, State.FAILED, 137)
        loop.settle()
        assert jobs.get("default", job.id).status == "queued"
    begun(jobs, job).tell(status="running", step=1)  # progress: the count begins anew
    jobs.queue.cancel(str(jobs.get("default", job.id).queue_job_id), "os:root")
    assert decide(jobs.get("default", job.id), queued(State.FAILED, 137), None).act == "again"
    loop.settle()
    assert jobs.get("default", job.id).status == "running"


def queued(state: State, code: int | None = None, cancel_at: float | None = None) -> Any:
    job = Job.__new__(Job)
    facts = {"state": state, "exit_code": code, "reason": "why", "cancel_at": cancel_at}
    for name, value in facts.items():
        object.__setattr__(job, name, value)
    return job


def test_what_is_settled(jobs: FineTuning) -> None:
    job = replace(created(jobs), status="running", progress={"step": 4, "restarts": 3, "restart_step": 4})
    assert decide(job, queued(State.FAILED, 137), None).act == "fail"  # three times at the same step
    assert decide(job, queued(State.FAILED, 2), None).act == "fail"
    assert decide(job, queued(State.SUCCEEDED, 0), None).act == "fail"  # and told no result
    assert decide(job, queued(State.CANCELLED), None).act == "cancel"
    assert decide(job, queued(State.PREEMPTED), None).act == "queue"
    assert decide(job, queued(State.RUNNING), None).act == "wait"
    resumed = replace(job, status="queued", queue_job_id=None)
    assert decide(resumed, None, queued(State.RUNNING)).act == "wait"  # what it had before is still ending
    assert decide(resumed, None, queued(State.CANCELLED)).act == "work"
    cancelled = replace(job, status="cancelled", queue_job_id=None)
    assert decide(cancelled, None, queued(State.RUNNING)).act == "stop"  # whoever cancelled died before this
    assert decide(cancelled, None, queued(State.RUNNING, cancel_at=1.0)).act == "wait"


def test_a_job_whose_work_failed_says_why(jobs: FineTuning) -> None:
    job = created(jobs)
    ended(jobs, job, State.FAILED, 70)
    FineTuningLoop(jobs).settle()
    failed = jobs.get("default", job.id)
    assert failed.status == "failed"
    assert failed.progress["error"]["message"] == "The work ended: exit status 70."
    assert failed.finished_at is not None
    with pytest.raises(ConflictError, match="is failed: it cannot be cancelled"):
        jobs.cancel("default", job.id, "os:ana")


def test_every_audit_entry_says_which_projects_job_it_is_about(jobs: FineTuning) -> None:
    failed, left, done = created(jobs), created(jobs), created(jobs)
    ended(jobs, failed, State.FAILED, 70)
    FineTuningLoop(jobs).settle()
    jobs.pause("default", left.id, "os:ana")
    jobs.resume("default", left.id, "os:ana")
    jobs.cancel("default", left.id, "os:ana")
    begun(jobs, done).checked(examples=3, validation_examples=0)
    training = begun(jobs, done)
    training.tell(status="running", step=3)
    training.succeed(Made("ft:x", "models/x", "d2"), result_files=[])
    FineTunedModels(jobs.home, jobs.db).delete("default", "ft:x", "os:ana")
    entries = [entry for entry in AuditLog(jobs.db).entries() if not entry.action.startswith("job.")]
    assert {entry.action for entry in entries} == {
        *(f"fine_tuning.{act}" for act in ("create", "fail", "pause", "resume", "cancel", "succeed")),
        *("model.create", "model.delete"),
    }
    assert {entry.facts.get("project_id") for entry in entries} == {"default"}


def test_jobs_are_found_by_their_metadata(jobs: FineTuning) -> None:
    tricky = {'b"a': "x", "c": 'd,"a":"x"', "e": "A"}
    plain, other, none = created(jobs, {"a": "x"}), created(jobs, tricky), created(jobs)

    def found(metadata: Any) -> list[str]:
        return [job.id for job in jobs.list("default", metadata=metadata)[0]]

    assert found(None) == [none.id, other.id, plain.id]
    assert found({"a": "x"}) == [plain.id]
    assert found({"e": "A", "c": 'd,"a":"x"'}) == [other.id]
    assert found({"e": "a"}) == found({"a": "x", "e": "A"}) == []
    assert found("null") == [none.id]
    assert jobs.list("proj_other")[0] == []
    with pytest.raises(NotFoundError):
        jobs.get("proj_other", plain.id)
