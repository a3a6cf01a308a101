"""The whole way on one machine: text, dataset, training, evaluation, release, served answer, summary.

Every stage is named by what goes into it, so a stage that is done is not done again and a killed one goes on.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lapis import config
from lapis.audit import os_user
from lapis.data.pipeline import prepare
from lapis.data.shards import Dataset
from lapis.db import open_database
from lapis.errors import ConfigError, InputError
from lapis.evaluate.report import FIVE_GRAM
from lapis.home import Home
from lapis.log import progress
from lapis.release.registry import Registry
from lapis.release.release import Release, State
from lapis.server import running_server
from lapis.storage import lock
from lapis.tenants.keys import ApiKeys
from lapis.train.export import exported_run, last_checkpoint
from lapis.train.measure import measure_run
from lapis.train.pretrain import Pretraining
from lapis.train.recipe import Recipe
from lapis.train.run import Run
from lapis.train.trainer import find_or_create, train

NAME = "quickstart"
CONTEXT = 256  # tokens: in minutes of training, many short windows teach more than few long ones
DEFAULT_BYTES = 32_000_000  # raw text of the environment that is read: enough for half an hour of training
PROMPT_WORDS = 12
HEAD_CHARS = 1500
ANSWER_TOKENS = 96
KEY_SECONDS = 600


@dataclass(frozen=True)
class Stage:
    """One row of the summary. `new` is False when the result was there from an earlier time."""

    name: str
    seconds: float
    came_in: str
    came_out: str
    place: str
    new: bool


@dataclass
class Quickstart:
    """One walk: its stages so far, and who is told of them."""

    home: Home
    say: Callable[[str], None]
    stages: list[Stage] = field(default_factory=list)

    def stage(self, name: str, work: Callable[[], tuple[str, str, str, bool]]) -> None:
        """Do one stage and keep its row; `work` returns what came in, what came out, where it lies, if it is new."""
        self.say(f"{name} …")
        start = time.monotonic()
        came_in, came_out, place, new = work()
        self.stages.append(Stage(name, round(time.monotonic() - start, 2), came_in, came_out, place, new))
        self.say(f"{name}: {came_out}{'' if new else ' (was done before)'}")


def quickstart(
    home: Home, texts: Sequence[Path], minutes: float, say: Callable[[str], None]
) -> dict[str, Any]:
    """Go the whole way, tell `say` line by line, return the facts.

    Raises the stages' errors, and ConflictError if another quickstart runs in this home.
    """
    recipe = quickstart_recipe(texts, minutes)
    walk = Quickstart(home, say)
    start = time.monotonic()
    with lock(home.root / "quickstart.lock", f"A quickstart in {home.root}"):
        dataset = _prepare(walk, recipe)
        run = _train(walk, recipe, dataset)
        report = _evaluate(walk, run)
        release = _release(walk, run)
        prompt = opening(dataset)
        answer = _ask(walk, release, prompt)
    return {
        "stages": [asdict(stage) for stage in walk.stages],
        "seconds": round(time.monotonic() - start, 1),
        "home": str(home.root),
        "run": run.id,
        "release": release.id,
        "evaluation": report,
        "prompt": prompt,
        "answer": answer,
    }


def quickstart_recipe(texts: Sequence[Path], minutes: float) -> Recipe:
    """The recipe of a quickstart. Raises ConfigError for no training time, InputError for a path that is not there."""
    if minutes <= 0:
        raise ConfigError(
            f"--minutes {minutes:g}: training needs more than no time.",
            hint="Example: lapis quickstart --minutes 3",
        )
    missing = [path for path in texts if not path.exists()]
    if missing:
        raise InputError(f"There is no file or folder {missing[0]}.", hint="Give --text an existing path.")
    sources = [{"path": str(path.absolute())} for path in texts] or [
        {"kind": "environment", "name": "environment"}
    ]
    values = {
        "name": NAME,
        "data": {"sources": sources, "max_bytes": 0 if texts else DEFAULT_BYTES},
        "model": {"context": CONTEXT},
        "train": {"minutes": float(minutes)},
        "checkpoint": {"seconds": 30.0},
    }
    return config.parse(values, Recipe, where="quickstart")


def opening(dataset: Dataset) -> str:
    """A prompt: some words of a held-out document, from a paragraph behind its head (heads are often licences)."""
    texts = [document.text for document in dataset.heldout()]
    for text in texts:
        start = text.find("\n\n", HEAD_CHARS)
        words = re.findall(r"\s*\S+", text[start:])[:PROMPT_WORDS]
        if start > 0 and len(words) == PROMPT_WORDS:
            return "".join(words).strip("\n")
    return texts[0][:80]


def _prepare(walk: Quickstart, recipe: Recipe) -> Dataset:
    made: list[Dataset] = []

    def work() -> tuple[str, str, str, bool]:
        before = set(walk.home.data.glob("*")) if walk.home.data.is_dir() else set()
        with progress("data") as report:
            dataset = prepare(recipe.sources, recipe.tokenizer, walk.home, progress=report)
        made.append(dataset)
        first, steps = dataset.report[0], dataset.report
        came_in = f"{first.documents_in:,} texts, {first.bytes_in / 1e6:,.1f} MB"
        heldout = sum(len(document.text.encode()) for document in dataset.heldout())
        came_out = f"{dataset.tokens:,} tokens, {heldout / 1e6:.2f} MB held out"
        for step in steps:
            walk.say(
                f"  {step.step:<12} {step.documents_in:>8,} -> {step.documents_out:>8,} documents  {step.top_reasons()}"
            )
        return came_in, came_out, str(dataset.folder), dataset.folder not in before

    walk.stage("data", work)
    return made[0]


def _train(walk: Quickstart, recipe: Recipe, dataset: Dataset) -> Run:
    objective = Pretraining(recipe.train, dataset, recipe.mixture)
    run = find_or_create(walk.home, recipe, config.to_toml(recipe), objective)

    def work() -> tuple[str, str, str, bool]:
        new = run.status() != "finished"
        with progress("train") as report:
            train(recipe, objective, run, report)
        summary = run.summary()
        assert summary.parameters and summary.tokens and summary.step and summary.loss and summary.seconds
        came_in = f"{summary.tokens:,} tokens"
        came_out = (
            f"{summary.parameters / 1e6:.1f} M parameters, {summary.step:,} steps, loss {summary.loss:.3f}, "
            f"{summary.tokens / summary.seconds:,.0f} tokens/s"
        )
        return came_in, came_out, str(run.folder), new

    walk.stage("train", work)
    return run


def _evaluate(walk: Quickstart, run: Run) -> dict[str, Any]:
    def work() -> tuple[str, str, str, bool]:
        known = run.evaluation()
        new = known is None or known["weights"] != last_checkpoint(run).digest
        if new:
            with progress("evaluate") as report:
                run.write_evaluation(measure_run(run, progress=report).to_dict())
        result = _evaluation(run)
        came_in = f"{result['documents']:,} held-out documents, {result['bytes'] / 1e6:.2f} MB"
        came_out = (
            f"{result['bits_per_byte']:.3f} bits per byte (5-gram {result['yardsticks'][FIVE_GRAM]:.3f})"
        )
        return came_in, came_out, str(run.folder / "eval.json"), new

    walk.stage("evaluate", work)
    return _evaluation(run)


def _evaluation(run: Run) -> dict[str, Any]:
    result = run.evaluation()
    assert result is not None, "the stage before has written it"
    return result


def _release(walk: Quickstart, run: Run) -> Release:
    made: list[Release] = []

    def work() -> tuple[str, str, str, bool]:
        registry = Registry(walk.home, open_database(walk.home.database_url))
        known = [
            item for item in registry.list(NAME) if item.run_id == run.id and item.state is not State.RETIRED
        ]
        if known:
            release = known[-1]
        else:
            with exported_run(walk.home, run.id) as exported:
                release = registry.create(
                    NAME, exported.folder, run.id, exported.report, os_user(), exported.lineage
                )
        if release.state is State.EVALUATED:
            release = registry.approve(release.id, os_user(), *_excuse(registry, release))
        made.append(release)
        folder = registry.folder / release.name / str(release.version)
        return f"run {run.id}", f"{release.id}, {release.digest[:12]}", str(folder), not known

    walk.stage("release", work)
    return made[0]


def _excuse(registry: Registry, release: Release) -> tuple[bool, str]:
    """Whether gates must be overridden, and the reason that is recorded: a quickstart shows what it made."""
    refusing = [gate.text for gate in registry.judge(release) if gate.verdict == "refuse"]
    if not refusing:
        return False, ""
    return True, f"quickstart approves its own model to show it, although: {' '.join(refusing)}"


def _ask(walk: Quickstart, release: Release, prompt: str) -> str:
    answers: list[str] = []

    def work() -> tuple[str, str, str, bool]:
        from openai import OpenAI

        with running_server(walk.home, [release.name]) as server, _key(walk.home) as key:
            client = OpenAI(base_url=server.url, api_key=key)
            completion = client.completions.create(
                model=release.name,
                prompt=prompt,
                max_tokens=ANSWER_TOKENS,
                temperature=0.7,
                top_p=0.95,
                seed=0,
            )
        usage = completion.usage
        assert usage is not None
        answers.append(completion.choices[0].text)
        return f"{usage.prompt_tokens} tokens", f"{usage.completion_tokens} tokens", server.url, True

    walk.stage("ask", work)
    return answers[0]


@contextmanager
def _key(home: Home) -> Iterator[str]:
    """A key for one question where this home requires keys; anything goes where it does not."""
    keys = ApiKeys(open_database(home.database_url))
    if not keys.exist():
        yield "no-key-needed"
        return
    key, text = keys.create(NAME, os_user(), expires_at=time.time() + KEY_SECONDS)
    try:
        yield text
    finally:
        keys.revoke(key.prefix, os_user())
