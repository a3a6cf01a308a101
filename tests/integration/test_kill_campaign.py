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
import torch

from lapis import config
from lapis.checkpoint.folder import listing
from lapis.checkpoint.manifest import SAVING
from lapis.data.shards import Dataset
from lapis.home import Home
from lapis.train.launch import Group
from lapis.train.pretrain import Pretraining
from lapis.train.rank import program
from lapis.train.recipe import CheckpointSection, SupervisorSection
from lapis.train.run import Run
from lapis.train.supervisor import End, newest_step, supervise
from lapis.train.trainer import train
from tests.rank_program import weights_after

from .conftest import tiny_recipe
from .test_supervisor import events_of, last_weights, run, told, until
from .test_trainer import weights_digest

PATIENT = SupervisorSection(restarts=100)
SAVES_S = 2.0  # to wait for a checkpoint that is being written


class Campaign:
    """Kills one rank after the other: every other one while a checkpoint is written; damages a checkpoint as well."""

    def __init__(self, folder: Path, kills: int, seed: int, most: int = 7) -> None:
        self.most = most  # steps of a life
        self.folder, self.left, self.moments = folder, kills, random.Random(seed)
        self.checkpoints = folder / "checkpoints"
        self.in_saves, self.damaged = 0, 0

    def __call__(self, group: Group) -> None:
        lives = 0
        while self.left and None in group.exits:
            until(lambda lives=lives: self.life() > lives)  # type: ignore[misc]
            lives = self.life()
            self.wait(in_save=bool(self.left % 2))
            if self.left % 10 == 2:
                self.damage()
            until(lambda: None not in group.pids)
            saving = self.saving()
            victim = group.pids[self.moments.randrange(group.ranks)]
            assert victim is not None
            os.kill(victim, signal.SIGKILL)
            self.in_saves += saving
            self.left -= 1

    def wait(self, in_save: bool) -> None:
        """Until a random moment of the next few steps, or until a checkpoint is being written."""
        if in_save:
            give_up = time.monotonic() + SAVES_S
            while not self.saving() and time.monotonic() < give_up:
                time.sleep(0.0005)
            time.sleep(self.moments.uniform(0, 0.005))
        else:
            steps = self.moments.randint(0, self.most)
            until(lambda: self.steps() >= steps)
            time.sleep(self.moments.uniform(0, 0.05))

    def life(self) -> int:
        """How often the ranks began."""
        return len(told(self.folder, "start"))

    def steps(self) -> int:
        """How many steps they have told of since."""
        events = [event["event"] for event in events_of(self.folder).read()]
        return events[::-1][: events[::-1].index("start")].count("step")

    def saving(self) -> bool:
        with suppress(FileNotFoundError):
            return any(path.name.startswith(SAVING) for path in self.checkpoints.iterdir())
        return False

    def damage(self) -> None:
        """Flip a bit of the newest checkpoint: the next start must not take it."""
        until(lambda: self.checkpoints.is_dir() and bool(listing(self.checkpoints)[0]))
        with suppress(FileNotFoundError, IndexError):  # it is being replaced just now
            path = listing(self.checkpoints)[0][-1].folder / "model.safetensors"
            with path.open("r+b") as file:
                file.seek(self.moments.randrange(path.stat().st_size))
                bit = file.read(1)[0] ^ (1 << self.moments.randrange(8))
                file.seek(-1, os.SEEK_CUR)
                file.write(bytes([bit]))
            self.damaged += 1


def campaign(folder: Path, steps: int, kills: int, seed: int) -> Campaign:
    attack = Campaign(folder, kills, seed)
    assert run(folder, steps, section=PATIENT, attack=attack, every=3, step_s=0.04) == End("finished", 0)
    assert attack.left == 0, "it was over too early: raise the number of steps"
    assert len(told(folder, "restart")) == kills
    assert attack.in_saves > 0, "no kill fell into a save: the test would prove nothing"
    assert attack.damaged > 0
    assert torch.equal(last_weights(folder), weights_after(steps, ranks=2))
    return attack


def test_six_kills_change_nothing(tmp_path: Path) -> None:
    campaign(tmp_path, steps=60, kills=6, seed=1)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_hundred_kills_change_nothing(tmp_path: Path) -> None:
    attack = campaign(tmp_path, steps=300, kills=100, seed=2)
    assert attack.in_saves > 20
    assert attack.damaged > 5


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_trainer_too_ends_with_the_same_weights(home: Home, texts: Path, dataset: Dataset) -> None:
    recipe = tiny_recipe(texts, steps=1000)
    recipe = recipe.model_copy(update={"checkpoint": CheckpointSection(seconds=0.05)})
    objective = Pretraining(recipe.train, dataset)
    whole, broken = (Run.create(home, name, config.to_toml(recipe), "0" * 64) for name in ("whole", "broken"))
    train(recipe, objective, whole)
    attack = Campaign(broken.folder, kills=10, seed=3, most=2)
    with Group(program(home, broken, objective), 1, broken.folder / "ranks") as group:
        attacker = threading.Thread(target=attack, args=(group,))
        attacker.start()
        end = supervise(group, 0, PATIENT, broken.events, lambda: newest_step(broken.checkpoints))
        attacker.join()
    assert (end, attack.left) == (End("finished", 0), 0)
    assert attack.in_saves > 0
    assert weights_digest(broken) == weights_digest(whole)
