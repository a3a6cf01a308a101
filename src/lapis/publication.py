"""What a run tells its fine-tuning job while it trains: events, metrics, checkpoints; and the model at its end."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lapis.checkpoint.folder import listing
from lapis.checkpoint.sharded import Checkpoint
from lapis.errors import ConflictError, LapisError
from lapis.gateway.attempt import Attempt, Made
from lapis.gateway.files import FileStore
from lapis.gateway.fine_tuning import Event, FineTuningJob
from lapis.gateway.hyperparameters import Plan
from lapis.log import logger
from lapis.model.adapters import write_adapter
from lapis.model.manifest import Source, read_manifest
from lapis.model.peft import write_adapter_folder
from lapis.model.store import open_folder
from lapis.release.registry import Servable
from lapis.train.export import adapter_of, last_checkpoint
from lapis.train.run import Run

SECONDS = 0.5
RESULTS = "fine-tune-results"  # purpose of the file of metrics

# What our events say -> what OpenAI's metrics are called
STEP = {
    "loss": "train_loss", "lr": "learning_rate", "accuracy": "train_accuracy", "margin": "train_margin",
    "reward": "train_mean_reward", "length": "train_mean_length", "kl": "kl",
}  # fmt: skip
HELDOUT = {
    "loss": "full_valid_loss", "token_accuracy": "full_valid_mean_token_accuracy", "accuracy": "valid_accuracy",
    "margin": "valid_margin", "reward": "valid_mean_reward", "length": "valid_mean_length",
}  # fmt: skip
WORDS = {
    "train_loss": "training loss", "full_valid_loss": "full validation loss", "train_mean_reward": "mean reward",
    "valid_mean_reward": "full validation mean reward",
}  # fmt: skip


class Publication:
    """Tells of a run while it trains, from a thread of its own. All is told once, however often it begins anew.

    Leave it as a context manager: it tells the rest. If the job is not ours any more, it has the training stopped.
    """

    def __init__(self, attempt: Attempt, job: FineTuningJob, plan: Plan, run: Run, base: Servable) -> None:
        self._attempt, self._job, self._plan, self._run, self._base = attempt, job, plan, run, base
        self._steps: dict[
            int, Mapping[str, Any]
        ] = {}  # metrics that no checkpoint was told with yet, by step
        self._heldout: dict[int, Mapping[str, Any]] = {}
        self._furthest = 0  # step that was told
        self._number = 0  # lines of the run's events that were read
        self._read = 0  # bytes of them
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="publication", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        try:
            self.publish()
        except LapisError as failure:
            if error is None:
                raise
            logger.warning("%s: %s", self._job.id, failure.message)

    def publish(self) -> None:
        """Tell what is new. Raises ConflictError once the job is another's, StorageError."""
        told: list[Event] = []
        progress: dict[str, Any] = {}
        for number, fact in self._new_facts():
            told += self._events(number, fact, progress)
            if fact["event"] in ("checkpoint", "resume") and self._plan.is_kept(fact["step"]):
                self._attempt.tell(*told, **progress)
                told, progress = [], {}
                self._publish_checkpoint(fact["step"], fact["time"])
        if told or progress:
            self._attempt.tell(*told, **progress)

    def _follow(self) -> None:
        while not self._stop.wait(SECONDS):
            try:
                self.publish()
            except ConflictError as error:
                logger.warning("%s", error.message)
                os.kill(os.getpid(), signal.SIGTERM)  # the step in progress ends whole and is saved
                return
            except LapisError as error:  # a busy database, a full disk: the next try may get over it
                logger.warning("%s: %s", self._job.id, error)
                self._number = self._read = self._furthest = 0  # all is read again; nothing is told twice

    def _new_facts(self) -> list[tuple[int, dict[str, Any]]]:
        """The facts that the run has added since the last time, with their line numbers."""
        with self._run.events.path.open("rb") as file:
            file.seek(self._read)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._read += len(whole)
        found = []
        for line in whole.splitlines():
            self._number += 1
            try:
                found.append((self._number, json.loads(line)))
            except ValueError:  # a killed writer left it torn
                continue
        return found

    def _events(self, number: int, fact: Mapping[str, Any], progress: dict[str, Any]) -> list[Event]:
        """What a fact of the run means to the job's owner; what it means for the progress is added there."""
        kind, at = fact["event"], fact["time"]
        if kind == "step":
            metrics = {"step": fact["step"], "total_steps": self._plan.steps, **_named(fact, STEP)}
            self._steps[fact["step"]] = metrics
            if fact["step"] <= self._furthest:  # a resume does it again
                return []
            self._furthest = fact["step"]
            left = (self._plan.steps - fact["step"]) * fact["seconds"] / fact["step"]
            progress |= {"step": fact["step"], "estimated_finish": at + left}
            progress |= {"trained_tokens": fact["tokens"]}
            return [Event(f"step:{fact['step']}", self._told(metrics), at=at, metrics=metrics)]
        if kind == "heldout":
            metrics = {"step": fact["step"], "total_steps": self._plan.steps, **_named(fact, HELDOUT)}
            self._heldout[fact["step"]] = metrics
            return [Event(f"heldout:{fact['step']}", self._told(metrics), at=at, metrics=metrics)]
        if kind == "resume":
            return [Event(f"resume:{number}", f"Training goes on from step {fact['step']}.", at=at)]
        if kind == "bad_step":
            message = f"Step {fact['step']} was bad ({fact['why']}): {fact['action']}."
            return [Event(f"bad_step:{number}", message, "warn", at=at)]
        return []

    def _told(self, metrics: Mapping[str, Any]) -> str:
        figures = [f"{words}={metrics[name]:.4f}" for name, words in WORDS.items() if name in metrics]
        if self._job.request.kind == "reinforcement":
            figures = [
                figure for figure in figures if "loss" not in figure
            ]  # it is near 0 whatever is learnt
        return f"Step {metrics['step']}/{self._plan.steps}: {', '.join(figures)}"

    def _publish_checkpoint(self, step: int, at: float) -> None:
        if self._attempt.has_checkpoint(step):
            return
        found = next((one for one in listing(self._run.checkpoints)[0] if one.step == step), None)
        if found is None:  # an abandoned one; its step comes again
            return
        made = export(
            self._attempt, self._job, self._run, found, self._base, self._job.checkpoint_model(step)
        )
        metrics = self._metrics_of(step)
        told = Event(f"checkpoint:{step}", f"Checkpoint created at step {step}", at=at)
        self._attempt.checkpoint(step, metrics, made, at, told)

    def _metrics_of(self, step: int) -> dict[str, Any]:
        """What is known of a checkpoint's step: the last training metrics up to it, and what was held out."""
        last = max((known for known in self._steps if known <= step), default=None)
        trained = {} if last is None else self._steps[last]
        heldout = self._heldout.get(step, {})
        self._steps = {known: metrics for known, metrics in self._steps.items() if known > step}
        self._heldout = {known: metrics for known, metrics in self._heldout.items() if known > step}
        metrics = {"step": step, **{key: value for key, value in trained.items() if key.startswith("train_")}}
        metrics |= {key: value for key, value in heldout.items() if "valid" in key}
        if "full_valid_loss" in heldout:  # all of it is measured, every time
            metrics["valid_loss"] = heldout["full_valid_loss"]
        return metrics


def make_model(attempt: Attempt, job: FineTuningJob, plan: Plan, run: Run, base: Servable) -> None:
    """Register what a finished run has made, and end its job with success."""
    steps, heldout = run.steps(), run.events.read("heldout")
    made = export(attempt, job, run, last_checkpoint(run), base, job.model)
    results = _results(attempt, job, csv_of(job.request.kind, steps, heldout))
    tokens = steps[-1]["tokens"] if steps else 0
    told = [
        Event("model", f"New fine-tuned model created: {made.name}"),
        Event("succeeded", "The job has successfully completed"),
    ]
    attempt.succeed(made, *told, result_files=[results], trained_tokens=tokens, step=plan.steps)


def export(
    attempt: Attempt, job: FineTuningJob, run: Run, checkpoint: Checkpoint, base: Servable, name: str
) -> Made:
    """A checkpoint's adapter as a folder that can be served; one that is there already is taken."""
    folder = attempt.home.fine_tuning / job.id / f"step-{checkpoint.step}"
    if not folder.is_dir():
        shape, adapter = adapter_of(run, checkpoint)
        with tempfile.TemporaryDirectory(prefix="lapis-adapter-") as temporary:
            plain = Path(temporary) / "adapter"
            write_adapter(plain, shape, adapter, base.name)
            source = Source("run", run.id, base.licence)
            write_adapter_folder(plain, folder, open_folder(base.name, base.folder), source)
    return Made(name, str(folder.relative_to(attempt.home.root)), read_manifest(folder).digest)


def csv_of(kind: str, steps: Sequence[Mapping[str, Any]], heldout: Sequence[Mapping[str, Any]]) -> bytes:
    """The metrics of every step as a table."""
    if kind == "reinforcement":
        columns = ["step", "train_mean_reward", "train_mean_length", "kl", "valid_mean_reward"]
    else:
        columns = [
            "step",
            "train_loss",
            "train_accuracy",
            "full_valid_loss",
            "full_valid_mean_token_accuracy",
        ]
    measured = {fact["step"]: _named(fact, HELDOUT) for fact in heldout}
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for fact in steps:
        writer.writerow({"step": fact["step"], **_named(fact, STEP), **measured.get(fact["step"], {})})
    return text.getvalue().encode()


def _results(attempt: Attempt, job: FineTuningJob, table: bytes) -> str:
    """The id of the job's file of metrics; one that an attempt before left is taken."""
    store, filename = FileStore(attempt.home.files, attempt.db), f"{job.id}-step_metrics.csv"
    for file in store.list(job.project_id, purpose=RESULTS)[0]:
        if file.filename == filename:
            return file.id
    return store.put(job.project_id, filename, RESULTS, table).id


def _named(fact: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {name: fact[ours] for ours, name in names.items() if fact.get(ours) is not None}
