"""SIGKILL at random moments, also while a checkpoint is written: the run ends with the weights of an unbroken one."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from lapis import config
from lapis.checkpoint.folder import listing
from lapis.checkpoint.manifest import SAVING
from lapis.data.shards import Dataset
from lapis.home import Home
from lapis.train.heartbeat import decode
from lapis.train.launch import Group
from lapis.train.pretrain import Pretraining
from lapis.train.rank import program
from lapis.train.recipe import Recipe, SupervisorSection
from lapis.train.run import Run
from lapis.train.supervisor import End, newest_step, supervise

from .conftest import tiny_recipe
from .test_supervisor import until
from .test_trainer import weights_digest

PATIENT = SupervisorSection(restarts=100, hang_seconds=3)
EVERY = 3  # steps between two checkpoints
SAVES_S = 2.0  # to wait for a checkpoint that is being written
RESUMES_S = 15.0  # from when a loss was seen until all go on


class Campaign:
    """Kills one rank after the other: every other one while a checkpoint is written; damages checkpoints as well.

    With `hang` the last one is not killed but stopped. `victims` are the ranks as they were struck.
    """

    def __init__(self, run: Run, kills: int, seed: int, hang: bool = False) -> None:
        self.run, self.left, self.hang, self.moments = run, kills + hang, hang, random.Random(seed)
        self.over = threading.Event()  # the run has ended
        self.victims: list[int] = []
        self.in_saves = 0
        self.harmed: set[str] = set()  # checkpoints
        self.left_behind: set[str] = set()  # by killed saves of earlier lives; they stay until the next save

    def __call__(self, group: Group) -> None:
        lives = 0
        while self.left:
            until(lambda lives=lives: self.life() > lives or self.over.is_set())  # type: ignore[misc]
            lives, self.left_behind = self.life(), self.folders()
            until(lambda: None not in group.pids or self.over.is_set())
            hang = self.hang and self.left == 1
            self.wait(group, in_save=bool(self.left % 2) and not hang)
            if self.left % 10 == 2:
                self.damage()
            saving, victim = self.saving(), self.moments.randrange(group.ranks)
            pid = group.pids[victim]
            if pid is None or self.over.is_set():
                return
            os.kill(pid, signal.SIGSTOP if hang else signal.SIGKILL)
            self.in_saves += bool(saving & self.folders())  # neither committed nor given up before the blow
            self.victims.append(victim)
            self.left -= 1

    def wait(self, group: Group, in_save: bool) -> None:
        """Until a random moment of the next few steps, or until a checkpoint is being written."""
        if in_save:
            give_up = time.monotonic() + SAVES_S
            while time.monotonic() < give_up:
                if self.saving():
                    time.sleep(self.moments.uniform(0, 0.005))
                    if self.saving():
                        return
                time.sleep(0.0005)
            return
        begun: int | None = None
        steps = self.moments.randint(0, EVERY)
        while begun is None or self.step(group) < begun + steps:
            if begun is None and self.step(group) >= 0:
                begun = self.step(group)
            if self.over.is_set():
                return
            time.sleep(0.002)
        time.sleep(self.moments.uniform(0, 0.02))

    def step(self, group: Group) -> int:
        """Steps that the first rank has done; -1 if it has just begun."""
        beat = decode(group.heartbeat(0).read_bytes())
        return beat.step if beat else -1

    def life(self) -> int:
        """How often the ranks began."""
        return len(self.run.events.read("start"))

    def saving(self) -> set[str]:
        """What the ranks that live now are writing, if they are."""
        return self.folders() - self.left_behind

    def folders(self) -> set[str]:
        """The checkpoints that are not committed, of all lives."""
        with suppress(FileNotFoundError):
            return {path.name for path in self.run.checkpoints.iterdir() if path.name.startswith(SAVING)}
        return set()

    def damage(self) -> None:
        """Flip a bit of the newest of several whole checkpoints: the next start must not take it."""
        found = listing(self.run.checkpoints)[0] if self.run.checkpoints.is_dir() else ()
        whole = [one.folder for one in found if one.folder.name not in self.harmed]
        if len(whole) < 2:
            return  # some kills ago the other one was hit, and since then no save has lived
        with suppress(FileNotFoundError):  # it is being replaced just now
            path = next(whole[-1].glob("model*.safetensors"), whole[-1] / "none")
            with path.open("r+b") as file:
                file.seek(self.moments.randrange(path.stat().st_size))
                bit = file.read(1)[0] ^ (1 << self.moments.randrange(8))
                file.seek(-1, os.SEEK_CUR)
                file.write(bytes([bit]))
            self.harmed.add(whole[-1].name)


def supervised(recipe: Recipe, objective: Pretraining, run: Run, ranks: int, attack: Campaign | None) -> None:
    """Train a run to its end by several ranks and a spare one, under attack or not."""
    ranks_program = program(Home(run.folder.parent.parent), run, objective, recipe.train)
    with Group(ranks_program, ranks, run.folder / "ranks", spares=1) as group:
        attacker = threading.Thread(target=attack, args=(group,)) if attack else None
        if attacker:
            attacker.start()
        end = supervise(group, PATIENT, run.events, lambda: newest_step(run.checkpoints))
        if attack and attacker:
            attack.over.set()
            attacker.join()
    assert end == End("finished", 0)


def campaign(
    texts: Path,
    dataset: Dataset,
    home: Home,
    ranks: int,
    steps: int,
    kills: int,
    seed: int,
    hang: bool = False,
) -> Campaign:
    recipe = tiny_recipe(texts, steps=steps, batch=8, micro_batch=2, checkpoint={"steps": EVERY})
    objective = Pretraining(recipe.train, dataset)
    whole, broken = (Run.create(home, name, config.to_toml(recipe), "0" * 64) for name in ("whole", "broken"))
    supervised(recipe, objective, whole, ranks, None)
    attack = Campaign(broken, kills, seed, hang)
    supervised(recipe, objective, broken, ranks, attack)
    assert attack.left == 0, "it was over too early: raise the number of steps"
    lost = broken.events.read("rank_lost")
    causes = [-9] * kills + [None] * hang
    assert [(event["rank"], event["exit"]) for event in lost] == list(
        zip(attack.victims, causes, strict=True)
    )
    assert weights_digest(broken) == weights_digest(whole)
    goes_on = [event["time"] for event in broken.events.read("start")[1:]]
    waits = [later - event["time"] for event, later in zip(lost, goes_on, strict=True)]
    print(f"{kills} kills, {attack.in_saves} in saves, {len(attack.harmed)} damaged checkpoints, at work again after "
          f"{sorted(waits)[len(waits) // 2]:.2f} s (median), {max(waits):.2f} s (most)")  # fmt: skip
    assert max(waits) < RESUMES_S
    assert attack.in_saves > 0, "no kill fell into a save: the test would prove nothing"
    assert len(whole.events.read("start")) == 1, "one rank tells"
    return attack


def test_lost_and_hanging_ranks_change_nothing(texts: Path, dataset: Dataset, home: Home) -> None:
    campaign(texts, dataset, home, ranks=2, steps=30, kills=2, seed=1, hang=True)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_twenty_kills_of_two_ranks_change_nothing(texts: Path, dataset: Dataset, home: Home) -> None:
    assert campaign(texts, dataset, home, ranks=2, steps=300, kills=20, seed=2).harmed


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_hundred_kills_change_nothing(texts: Path, dataset: Dataset, home: Home) -> None:
    attack = campaign(texts, dataset, home, ranks=1, steps=300, kills=100, seed=3)
    assert attack.in_saves > 20
    assert len(attack.harmed) > 5
