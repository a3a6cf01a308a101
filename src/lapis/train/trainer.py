"""The training loop on one page: load, step, checkpoint, resume."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from lapis.checkpoint.piece import Box, Part, Sharded
from lapis.checkpoint.sharded import Checkpoint, load
from lapis.errors import ConflictError, LapisError, TrainingError
from lapis.hashing import digest_json
from lapis.home import Home
from lapis.kernels.memory import keep_freed_memory
from lapis.log import Progress, logger, silent
from lapis.model.config import ModelConfig
from lapis.model.store import open_folder
from lapis.train import bad_step, goodput, proof, schedule
from lapis.train.bad_step import Numbers
from lapis.train.base import check_base, model_folder
from lapis.train.checkpoints import Checkpoints, Snapshot
from lapis.train.compiled import compile_layers
from lapis.train.heartbeat import Heartbeat
from lapis.train.objective import Objective, StepBatch
from lapis.train.peak import gemm_flops, peak_memory, setup
from lapis.train.recipe import Recipe
from lapis.train.run import Run
from lapis.train.samples import sample_prompts
from lapis.train.segments import check_segments, follow, mixture_of, segments_before
from lapis.train.signs import give_signs
from lapis.train.start import first_replica
from lapis.train.stopping import stop_signals
from lapis.train.world import World, is_first, lost_peers, started

RECORD_EVERY_S = 0.25  # a step event at most this often, so that short steps do not fill the disk
SPEED_OVER = 20  # steps over which the shown speed is taken
PROOF_WITHIN_S = 5.0  # a run that is stopped computes the next step's loss too if a step takes less
MOST_SKIPPED = 5  # bad steps in a row, after which skipping does not help


def find_or_create(home: Home, recipe: Recipe, recipe_text: str, objective: Objective) -> Run:
    """The run of this recipe on this data: the one that was begun before, or a new one.

    It may have been begun with another mixture: `segments.settle` says what becomes of it then.
    """
    digest = digest_json([recipe.digest(), objective.digest])
    for run in reversed(Run.list(home)):
        if run.events.read("create")[0].get("recipe_digest") != digest or run.status() == "failed":
            continue
        if (
            run.status() != "finished" or mixture_of(run) == recipe.mixture
        ):  # else there is nothing to go on with
            return run
    return Run.create(home, recipe.name, recipe_text, digest)


def train(recipe: Recipe, objective: Objective, run: Run, progress: Progress = silent) -> Run:
    """Train a run to its end, from its last good checkpoint if it has one; a finished run is left as it is.

    Raises KeyboardInterrupt after SIGINT or SIGTERM, when the state is safely in a checkpoint; TrainingError when
    a step is bad and the recipe says stop, or when a resumed run does not go on as it did before; ConflictError
    if another process trains this run; UnavailableError if another of its ranks is gone.
    """
    if run.status() == "finished":
        return run
    keep_freed_memory()
    first = is_first()
    with run.hold() if first else nullcontext(), stop_signals() as stop:
        if not first:
            run, progress = run.watched(), silent
        with lost_peers():
            trainer = Trainer(recipe, objective, run)
            trainer.loop(progress, stop)
        # A signal in the last step came too late for the run, not for what comes after it. Ranks leave that to
        # their supervisor.
        if stop.is_set() and trainer.world.size == 1:
            raise KeyboardInterrupt
    return run


class Trainer:
    """Everything that a run is at one moment; `loop` moves it forward, a checkpoint keeps it."""

    def __init__(self, recipe: Recipe, objective: Objective, run: Run) -> None:
        self.spent, self.heartbeat = goodput.Spent(), Heartbeat.of_environment()
        self.recipe, self.section, self.objective, self.run = recipe, recipe.train, objective, run
        self.segments = follow(run, objective)
        home = Home(run.folder.parent.parent)
        mesh = recipe.mesh(started())
        self.world = World.alone() if mesh.size == 1 else World.join(mesh)
        self.replica, self.config = first_replica(recipe, objective, home, self.world)
        self.model = self.replica.model
        self.prompts = sample_prompts(recipe, objective, self.config, home)
        if self.section.compile:
            compile_layers(self.model, home)
        if self.world.size > 1 and mesh.pp == 1:  # stages differ: none is behind another one
            give_signs(self.model, self.heartbeat)
        self.setup = setup(self.model) + (f", mesh {mesh}" if mesh.size > 1 else "")
        self.setup += f", {self.section.pipeline}" if mesh.pp > 1 else ""
        self.step = 0  # steps done
        self.tokens = 0  # seen in them
        self.trained_s = 0.0
        self.loss: float | None = None  # of the last step
        self.skipped = 0  # bad steps in a row
        self.good: deque[Numbers] = deque(maxlen=bad_step.WINDOW)  # the last good steps
        self.plan = self._first_plan()
        self.proofs: dict[int, Any] = {}  # losses that a resumed run must meet again
        self.checkpoints = Checkpoints(run, recipe.checkpoint, self.spent)
        self.peak = gemm_flops() * self.world.size
        self.recent: deque[tuple[float, int]] = deque(maxlen=SPEED_OVER)  # seconds and tokens of a step
        torch.manual_seed(self.section.seed)  # for whoever draws: a checkpoint keeps how far it came

    def loop(self, progress: Progress, stop: threading.Event) -> None:
        """Step until the plan is done or `stop` is set. The last state is always in a checkpoint."""
        with self.checkpoints:
            self._begin()
            self._steps(progress, stop)
            with self.heartbeat.busy():
                done = self.plan.done(self.step)
                self._check_weights()
                self.checkpoints.finish(self._measured() if done else self._snapshot())
            self._end("finished" if done else "stopped")

    def _steps(self, progress: Progress, stop: threading.Event) -> None:
        recorded, last = -math.inf, time.monotonic()
        stopped, _ = self.world.agree(stop.is_set(), 0.0)
        while not self.plan.done(self.step) and not stopped:
            before = self.tokens
            norm = self._one_step()
            self.heartbeat.stepped(self.step)
            now = time.monotonic()
            if self.section.compile and not self.recent:
                self.spent.move(now - last, "step", "compile")  # the first step is nearly nothing else
            self.recent.append((now - last, self.tokens - before))
            self.trained_s, last = self.trained_s + now - last, now
            if now - recorded >= RECORD_EVERY_S or self.plan.done(self.step):
                recorded = now
                self._record(norm, progress)
            stopped, self.trained_s = self.world.agree(stop.is_set(), self.trained_s)
            self._close_plan()
            self.checkpoints.poll()
            if self.checkpoints.due(self.step) and not self.plan.done(self.step):
                with self.heartbeat.busy():
                    self._check_weights()
                    self.checkpoints.begin(self._measured())
                last = time.monotonic()  # saving is not training time

    def _measured(self) -> Snapshot:
        """The present state with its score. A measurement that fails costs no step: a reward can."""
        try:
            score = self._measure()
        except LapisError:
            self._keep_steps()
            raise
        return self._snapshot(score)

    def _keep_steps(self) -> None:
        """Save all steps before an error goes on. Of several ranks the others may not meet it, and would wait."""
        if self.world.size == 1:
            self._check_weights()
            self.checkpoints.finish(self._snapshot())
            self._write_end("stopped")

    def _check_weights(self) -> None:
        """Raise TrainingError if the weights are not finite: they are not saved, nothing could go on from them."""
        if self.replica.finite():
            return
        kept = self.checkpoints.kept()
        self._write_end("failed")
        raise TrainingError(
            f"The weights of the run {self.run.id} are not finite after step {self.step}; they were not saved.",
            hint=f"{kept} Train with a lower rate: --set train.lr=… --set train.embed_lr=…",
        )

    def _snapshot(self, score: float | None = None) -> Snapshot:
        """The present state, as a checkpoint keeps it; its score is the loss on held-out text, if that was measured."""
        state = {
            "step": self.step,
            "tokens": self.tokens,
            "trained_s": self.trained_s,
            "loss": self.loss,
            "plan": asdict(self.plan),
            "optimizer_steps": self.replica.updates,
            "good": list(self.good),
            "skipped": self.skipped,
            "model": asdict(self.config),
            "recipe_digest": self.recipe.digest(),
            "data_digest": self.objective.digest,
            **segments_before(self.segments, self.step),
        }
        groups = {**self.replica.groups(), "random": {"torch": self._first_ranks(torch.get_rng_state())}}
        return Snapshot(self.step, groups, state, score)

    def _first_ranks(self, whole: Tensor) -> Sharded[Tensor]:
        """A tensor that the first rank saves and all read."""
        shape = tuple(whole.shape)
        return Sharded(shape, (Part(Box.whole(shape), whole, owned=self.world.is_main),))

    def _one_step(self) -> float:
        batch = self._batch()
        with self.spent.on("step"):
            numbers = self._gradients(batch)
            why = bad_step.complaint(numbers, self.good, self.section.outlier)
        if why is None:
            self.skipped = 0
        else:
            numbers = self._replay(batch, numbers, why)
        self._prove(numbers.loss)
        if not self.skipped:
            self.heartbeat.works()
            scale = self.plan.scale(self.step)
            with self.spent.on("step"):
                self.replica.update(
                    numbers.norm, lr=self.section.lr * scale, embed_lr=self.section.embed_lr * scale
                )
            self.loss = numbers.loss
            if self.section.outlier is not None:
                self.good.append(numbers)
        self.step += 1
        self.tokens += batch.tokens
        return numbers.norm

    def _batch(self) -> StepBatch:
        """This process's share of the step. If it cannot be had, all before it is saved before the error goes on."""
        begun = time.monotonic()
        try:
            with self.spent.on("data"):
                batch = self.objective.step(self.step, *self.replica.share)
        except LapisError:
            self._keep_steps()
            raise
        self.spent.move(batch.worked_s, "data", "step")
        self.heartbeat.waits(time.monotonic() - begun)
        return batch

    def _gradients(self, batch: StepBatch) -> Numbers:
        """Add the gradients of all micro-batches; the step's loss and the norm of its gradient."""

        def share(model: Any, micro: Any) -> Any:
            return self.objective.loss(model, micro, batch.weight)

        loss = self.replica.backward(share, batch.micros)
        self.heartbeat.waits()
        return self.replica.finish(loss)

    def _replay(self, batch: StepBatch, first: Numbers, why: str) -> Numbers:
        """Do a bad step's passes once more, tell what it was, and act on it as the recipe says.

        With "skip" a step that is good the second time is taken; then `skipped` is 0. Raises TrainingError.
        """
        with self.spent.on("replay"):
            self.replica.drop_gradients()
            again = self._gradients(batch)
        fault, still = (
            bad_step.fault(first, again),
            bad_step.complaint(again, self.good, self.section.outlier),
        )
        self.skipped = self.skipped + 1 if still else 0
        stop = self.section.bad_step == "stop" or self.skipped > MOST_SKIPPED
        samples = self.checkpoints.ranks.gather(
            batch.samples
        )  # every rank calls the step bad, for all add up
        self.run.events.note(
            "bad_step",
            step=self.step,
            why=why,
            fault=fault,
            action="stop" if stop else "skip" if still else "replay taken",
            samples=list(dict.fromkeys(number for part in samples for number in part)),
            numbers=[value.hex() for value in (*first, *again)],  # loss and norm, twice
        )
        if stop:
            self._fail(first, again, why, fault)
        if still:
            self.replica.drop_gradients()
        return again

    def _fail(self, first: Numbers, again: Numbers, why: str, fault: bad_step.Fault) -> None:
        kept = self.checkpoints.kept()
        self._write_end("failed")
        told = {
            "data": "done again it gives the same bits, so it comes from data or weights",
            "hardware": f"done again it gives loss {again.loss} and gradient {again.norm}: this machine miscomputes",
        }
        raise TrainingError(
            f"Step {self.step} of the run {self.run.id} is bad ({why}): loss {first.loss}, gradient {first.norm}; "
            f"{told[fault]}.",
            hint=f"{kept} The event bad_step names the samples. Train with a lower rate "
            "(--set train.lr=… --set train.embed_lr=…), or past such steps: --set train.bad_step=skip",
        )

    def _prove(self, loss: float) -> None:
        """Write down the losses after a checkpoint; after a resume, meet those that were written down."""
        before = self.proofs.pop(self.step, None)
        if before is not None and not proof.agrees(before, loss, self.setup, self.section.dtype):
            raise TrainingError(
                f"The resumed run {self.run.id} does not go on as it did: the loss of step {self.step} is "
                f"{loss!r} ({loss.hex()}), it was {float.fromhex(before['loss'])!r} ({before['loss']}).",
                hint=f"Kernels, data or machine changed: then {before['setup']}, now {self.setup}. Nothing was "
                "overwritten.",
            )
        saved = self.checkpoints.last
        if saved is not None and self.step < saved + proof.STEPS:
            self.run.events.note(
                proof.EVENT, checkpoint=saved, step=self.step, loss=loss.hex(), setup=self.setup
            )

    def _begin(self) -> None:
        events, now, base = self.run.events.read(), goodput.clock(), self._base_facts()
        facts: dict[str, Any] = {
            "parameters": self.config.parameters,
            **self.objective.facts(),
            **base,
            "recipe_digest": self.recipe.digest(),
            "kernels": self.model.ops.name,
            "bit_exact": self.model.ops.bit_exact,
            "threads": torch.get_num_threads(),
            "gemm_flops": self.peak,
            "clock": now,
            "gap": round(goodput.gap(events, now, time.time()), 3),
        }
        self.run.events.write("start", **facts)
        checkpoint = self.checkpoints.newest()
        if checkpoint is not None:
            self._resume(checkpoint)
            self.proofs = proof.expected(events, self.step)
        if self.step == 0:
            self._measure()

    def _base_facts(self) -> dict[str, str]:
        """Which weights the run started from. Raises ConflictError if adapters would go on beside others."""
        source = self.recipe.model.source
        if source is None:
            return {}
        digest = open_folder(source, model_folder(source, Home(self.run.folder.parent.parent))).digest
        if self.recipe.lora is not None:
            check_base(self.run, digest)
        return {"base_digest": digest}

    def _resume(self, checkpoint: Checkpoint) -> None:
        state = load(checkpoint, {}).state
        if ModelConfig(**state["model"]) != self.config or state["data_digest"] != self.objective.digest:
            raise ConflictError(
                f"The checkpoint {checkpoint.folder} belongs to other data or another model than this recipe.",
                hint="Give the recipe another name, so that it becomes a run of its own.",
            )
        check_segments(state, self.segments, checkpoint.folder)
        random = torch.get_rng_state()
        load(checkpoint, {**self.replica.groups(), "random": {"torch": self._first_ranks(random)}})
        self.replica.resumed(state["optimizer_steps"])
        torch.set_rng_state(random)
        self.step, self.trained_s, self.loss = state["step"], state["trained_s"], state["loss"]
        self.tokens, self.skipped = state["tokens"], state["skipped"]
        self.good.extend(Numbers(*numbers) for numbers in state["good"])
        self.plan = schedule.Plan(**state["plan"])
        self.run.events.write(
            "resume", step=self.step, checkpoint=checkpoint.folder.name, seconds=self.trained_s
        )

    def _measure(self) -> float | None:
        """Tell how the model does on what is held out, and what it writes; the loss on what is held out."""
        loss = self._held_out()
        self._sample()
        return loss

    def _held_out(self) -> float | None:
        """Tell how the model does on held-out examples, and on held-out text if that is asked for; the loss there."""
        if self.recipe.data is not None and not self.recipe.checkpoint.best:
            return None
        with self.spent.on("heldout"):
            measured = self.objective.heldout(self.replica.measure)
        if measured:
            self.run.events.note("heldout", step=self.step, **_plain(measured))
        loss = measured.get("loss", math.nan)
        return loss if math.isfinite(loss) else None

    def _sample(self) -> None:
        """Tell what the model writes by now. What goes wrong in that costs the run nothing but an event."""
        written = list(self.objective.answered())
        if self.prompts.prompts:
            with self.spent.on("samples"):
                whole = self.replica.whole()
                try:
                    written += [] if whole is None else self.prompts.continued(whole)
                except (LapisError, MemoryError, torch.OutOfMemoryError) as error:
                    logger.warning("step %s: the model was not sampled: %s", self.step, error)
                    self.run.events.note("samples_failed", step=self.step, why=str(error))
        if written:
            self.run.events.note("samples", step=self.step, samples=[one.facts() for one in written])

    def _end(self, reason: str) -> None:
        slow = not self.recent or self.recent[-1][0] >= PROOF_WITHIN_S
        slow, _ = self.world.agree(slow, 0.0)
        if reason == "stopped" and not slow:  # the next step's loss, so that the resume can be proved
            numbers = self._gradients(self._batch())
            # A bad one proves nothing: a resume replays it.
            if bad_step.complaint(numbers, self.good, self.section.outlier) is None:
                self._prove(numbers.loss)
            self.replica.drop_gradients()
        self._write_end(reason)
        if reason == "stopped":
            raise KeyboardInterrupt

    def _write_end(self, reason: str) -> None:
        facts = {"step": self.step, "loss": self.loss, "seconds": self.trained_s}
        self.run.events.write("end", **facts, reason=reason, spent=self.spent.facts())

    def _first_plan(self) -> schedule.Plan:
        section = self.section
        if section.steps is None:
            return schedule.by_minutes(section.warmup, section.final)
        return schedule.by_steps(
            section.steps, section.warmup, section.decay, section.schedule, section.final
        )

    def _close_plan(self) -> None:
        section = self.section
        if section.minutes is None or not schedule.decay_is_due(
            self.plan, self.trained_s, section.minutes, section.decay
        ):
            return
        self.plan = schedule.close(self.plan, self.step, self.trained_s, section.minutes)
        self.run.events.note("plan", **asdict(self.plan))

    def _record(self, norm: float, progress: Progress) -> None:
        speed = self._speed()
        share = (
            1.0 if self.model.lora is None else 2 / 3
        )  # frozen weights have no gradient: one product in three
        mfu = speed * share * self.config.flops_per_token(self.section.sequence) / self.peak
        lr = self.section.lr * self.plan.scale(self.step - 1)
        self.run.events.note(
            "step",
            step=self.step,
            loss=self.loss,
            lr=lr,
            tokens=self.tokens,
            tokens_per_s=round(speed, 1),
            mfu=round(mfu, 4),
            memory=peak_memory(self.model.ops.device),
            **_plain({"grad_norm": norm, **self.objective.metrics()}),
            seconds=round(self.trained_s, 3),
            spent=self.spent.facts(),
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


def _plain(figures: Mapping[str, float]) -> dict[str, float | None]:
    """Figures as JSON has them: None for one that is not finite."""
    return {name: value if math.isfinite(value) else None for name, value in figures.items()}
