"""The training loop on one page: load, step, checkpoint, resume."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from lapis.checkpoint.retention import Retention
from lapis.checkpoint.sharded import Checkpoint, latest, load, save
from lapis.errors import ConflictError, TrainingError
from lapis.hashing import digest_json
from lapis.home import Home
from lapis.kernels.memory import keep_freed_memory
from lapis.log import Progress, silent
from lapis.model.config import ModelConfig
from lapis.model.families import build
from lapis.train import schedule
from lapis.train.objective import Objective, StepBatch
from lapis.train.optimizer import FlatParameters, Optimizer
from lapis.train.peak import gemm_flops
from lapis.train.recipe import Recipe
from lapis.train.run import Run

RECORD_EVERY_S = 0.25  # a step event at most this often, so that short steps do not fill the disk
SPEED_OVER = 20  # steps over which the shown speed is taken


def find_or_create(home: Home, recipe: Recipe, recipe_text: str, objective: Objective) -> Run:
    """The run of this recipe on this data: the one that was begun before, or a new one."""
    digest = digest_json([recipe.digest(), objective.digest])
    for run in reversed(Run.list(home)):
        if run.events.read("create")[0].get("recipe_digest") == digest and run.status() != "failed":
            return run
    return Run.create(home, recipe.name, recipe_text, digest)


def train(recipe: Recipe, objective: Objective, run: Run, progress: Progress = silent) -> Run:
    """Train a run to its end, from its last good checkpoint if it has one; a finished run is left as it is.

    Raises KeyboardInterrupt after SIGINT or SIGTERM, when the state is safely in a checkpoint; TrainingError when
    the loss or the gradient is no longer finite; ConflictError if another process trains this run.
    """
    if run.status() == "finished":
        return run
    keep_freed_memory()
    with run.hold(), _stop_signals() as stop:
        Trainer(recipe, objective, run).loop(progress, stop)
    return run


class Trainer:
    """Everything that a run is at one moment; `loop` moves it forward, a checkpoint keeps it."""

    def __init__(self, recipe: Recipe, objective: Objective, run: Run) -> None:
        self.recipe, self.section, self.objective, self.run = recipe, recipe.train, objective, run
        self.config = recipe.model.resolve(objective.tokenizer.vocab_size)
        self.model = build(self.config)
        self.model.init_weights(self.section.seed)
        objective.begin(self.model)
        self.flat = FlatParameters(self.model)
        self.optimizer = Optimizer(
            self.flat,
            self.model.ops,
            muon=self.section.optimizer == "muon",
            clip=self.section.clip,
            weight_decay=self.section.weight_decay,
        )
        self.step = 0  # steps done
        self.tokens = 0  # seen in them
        self.trained_s = 0.0
        self.loss: float | None = None  # of the last step
        self.plan = self._first_plan()
        self.peak = gemm_flops()
        self.recent: deque[tuple[float, int]] = deque(maxlen=SPEED_OVER)  # seconds and tokens of a step

    def loop(self, progress: Progress, stop: threading.Event) -> None:
        """Step until the plan is done or `stop` is set. The last state is always in a checkpoint."""
        self._begin()
        saved, recorded, last = time.monotonic(), 0.0, time.monotonic()
        while not self.plan.done(self.step) and not stop.is_set():
            before = self.tokens
            norm = self._one_step()
            now = time.monotonic()
            self.recent.append((now - last, self.tokens - before))
            self.trained_s, last = self.trained_s + now - last, now
            if now - recorded >= RECORD_EVERY_S or self.plan.done(self.step):
                recorded = now
                self._record(norm, progress)
            self._close_plan()
            if now - saved >= self.recipe.checkpoint.seconds:
                self.save()
                saved = last = time.monotonic()  # saving is not training time
        self.save()
        reason = "finished" if self.plan.done(self.step) else "stopped"
        self.run.events.write("end", step=self.step, loss=self.loss, seconds=self.trained_s, reason=reason)
        if reason == "stopped":
            raise KeyboardInterrupt

    def save(self) -> Checkpoint:
        """Commit the present state as a checkpoint."""
        state = {
            "step": self.step,
            "tokens": self.tokens,
            "trained_s": self.trained_s,
            "loss": self.loss,
            "plan": asdict(self.plan),
            "optimizer_steps": self.optimizer.steps,
            "model": asdict(self.config),
            "recipe_digest": self.recipe.digest(),
            "data_digest": self.objective.digest,
        }
        groups = {"model": self._weights(), "optimizer": self.optimizer.state()}
        keep = Retention(self.recipe.checkpoint.keep)
        checkpoint = save(self.run.checkpoints, self.step, groups, state, keep)
        self.run.events.write(
            "checkpoint", step=self.step, folder=checkpoint.folder.name, digest=checkpoint.digest
        )
        return checkpoint

    def _one_step(self) -> float:
        batch = self.objective.step(self.step, 0, 1)
        value = self._gradients(batch)
        scale = self.plan.scale(self.step)
        norm = self.optimizer.step(lr=self.section.lr * scale, embed_lr=self.section.embed_lr * scale)
        if not (math.isfinite(value) and math.isfinite(norm)):
            self.run.events.write("end", step=self.step, loss=None, seconds=self.trained_s, reason="failed")
            raise TrainingError(
                f"The run {self.run.id} is no longer finite at step {self.step}: loss {value}, gradient {norm}.",
                hint="The last checkpoint is good. Train with a lower rate: --set train.lr=… --set train.embed_lr=…",
            )
        self.step, self.loss = self.step + 1, value
        self.tokens += sum(len(micro.ids_T) for micro in batch.micros)
        return norm

    def _gradients(self, batch: StepBatch) -> float:
        """Add the gradients of all micro-batches; returns the loss of this rank's share."""
        total = 0.0
        for micro in batch.micros:
            loss = self.objective.loss(self.model, micro, batch.weight)
            torch.autograd.backward(loss)
            total += loss.item()
        return total

    def _begin(self) -> None:
        facts: dict[str, Any] = {
            "parameters": self.config.parameters,
            **self.objective.facts(),
            "recipe_digest": self.recipe.digest(),
            "kernels": self.model.ops.name,
            "bit_exact": self.model.ops.bit_exact,
            "threads": torch.get_num_threads(),
            "gemm_flops": self.peak,
        }
        self.run.events.write("start", **facts)
        checkpoint = latest(self.run.checkpoints)
        if checkpoint is not None:
            self._resume(checkpoint)

    def _resume(self, checkpoint: Checkpoint) -> None:
        loaded = load(checkpoint)
        state = loaded.state
        if ModelConfig(**state["model"]) != self.config or state["data_digest"] != self.objective.digest:
            raise ConflictError(
                f"The checkpoint {checkpoint.folder} belongs to other data or another model than this recipe.",
                hint="Give the recipe another name, so that it becomes a run of its own.",
            )
        self.optimizer.load(loaded.groups["optimizer"], state["optimizer_steps"])
        self.step, self.trained_s, self.loss = state["step"], state["trained_s"], state["loss"]
        self.tokens = state["tokens"]
        self.plan = schedule.Plan(**state["plan"])
        self.run.events.write("resume", step=self.step, checkpoint=checkpoint.folder.name)

    def _first_plan(self) -> schedule.Plan:
        section = self.section
        if section.steps is not None:
            return schedule.by_steps(section.steps, section.warmup, section.decay)
        return schedule.by_minutes(section.warmup)

    def _close_plan(self) -> None:
        section = self.section
        if section.minutes is None or not schedule.decay_is_due(
            self.plan, self.trained_s, section.minutes, section.decay
        ):
            return
        self.plan = schedule.close(self.plan, self.step, self.trained_s, section.minutes)
        self.run.events.write("plan", **asdict(self.plan))

    def _record(self, norm: float, progress: Progress) -> None:
        speed = self._speed()
        mfu = speed * self.config.flops_per_token(self.section.sequence) / self.peak
        lr = self.section.lr * self.plan.scale(self.step - 1)
        self.run.events.write(
            "step",
            step=self.step,
            loss=self.loss,
            lr=lr,
            tokens=self.tokens,
            tokens_per_s=round(speed, 1),
            mfu=round(mfu, 4),
            grad_norm=norm,
            seconds=round(self.trained_s, 3),
        )
        of = f"/{self.plan.steps:,}" if self.plan.steps else ""
        left = self._left_s(speed)
        progress(
            self.trained_s,
            self.trained_s + left,
            f"step {self.step:,}{of}  loss {self.loss or math.nan:.3f}  {speed:,.0f} tokens/s  MFU {mfu:.2f}  "
            f"{int(left) // 60}:{int(left) % 60:02d} left",
        )

    def _speed(self) -> float:
        """Tokens per second over the last steps; the first step of a process warms up and is not counted."""
        steady = list(self.recent)[1:] if len(self.recent) < SPEED_OVER else list(self.recent)
        seconds, tokens = zip(*(steady or self.recent), strict=True)
        return float(sum(tokens) / sum(seconds))

    def _left_s(self, speed: float) -> float:
        if self.plan.steps is not None:
            return (self.plan.steps - self.step) * self.tokens / self.step / speed
        assert self.section.minutes is not None, "a run without minutes has its steps planned from the start"
        return max(0.0, self.section.minutes * 60 - self.trained_s)

    def _weights(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.model.named_parameters()}


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """SIGINT and SIGTERM set the event, so that the step in progress ends whole; a second SIGINT interrupts at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def request(signum: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
