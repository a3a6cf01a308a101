"""A rank that fine-tunes small models on a mesh: `python -m tests.tuning_worker FOLDER NAME…`, the names of CASES.

Each rank writes FOLDER/NAME.RANK.json: losses and gradient norms of some steps, and what is held out before and after.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from lapis.data.samples import Samples, Tokens
from lapis.model.config import ModelConfig
from lapis.model.families import build
from lapis.train.mesh import Mesh
from lapis.train.objective import Objective
from lapis.train.parallel import parallelize
from lapis.train.preference import Preferences
from lapis.train.recipe import DpoSection, TrainSection
from lapis.train.reference import Reference
from lapis.train.replica import Alone, Replica
from lapis.train.sft import Supervised
from lapis.train.world import World
from tests import small_models

STEPS, VOCABULARY, LR = 5, 300, 0.0001


@dataclass(frozen=True)
class Case:
    """What is learned, by which model, on which mesh."""

    objective: str
    mesh: str
    model: str = "llama"

    @property
    def name(self) -> str:
        """Of the files that belong to it."""
        return f"{self.objective}-{self.model}-{self.mesh.replace('=', '').replace(',', '-')}"

    @property
    def config(self) -> ModelConfig:
        """The model's."""
        return small_models.families()[self.model]


CASES = tuple(
    Case(objective, mesh, model)
    for objective in ("sft", "dpo")
    for mesh, model in (
        ("dp=2", "llama"), ("fsdp=2", "llama"), ("tp=2", "llama"), ("cp=2", "llama"), ("ep=2", "mixtral"),
        ("tp=2", "gpt2"), ("fsdp=2,tp=2", "llama"), ("fsdp=2,cp=2", "gpt2"),
    )
)  # fmt: skip


def section(case: Case) -> TrainSection:
    """Few examples a step, so that ranks have unequal numbers of micro-batches."""
    return TrainSection(
        objective=case.objective, steps=STEPS, batch=4, micro_batch=1, sequence=64, seed=3, optimizer="adamw",
        dtype="fp32", clip=0.5,
    )  # fmt: skip


def objective(case: Case) -> Objective:
    """Eight random texts, or pairs, and three that are held out; the second half of each is trained on."""
    random, size = np.random.default_rng(5), 2 if case.objective == "dpo" else 1

    def text() -> Tokens:
        count = int(random.integers(6, 60))
        return Tokens(random.integers(3, VOCABULARY, count), np.arange(count) >= count // 2)

    found = [tuple(text() for _ in range(size)) for _ in range(11)]
    samples = Samples(tuple(found[:8]), tuple(found[8:]), 0, "digest")
    if case.objective == "dpo":
        return Preferences(section(case), DpoSection(beta=0.1), samples, small_models.tokenizer())
    return Supervised(section(case), samples, small_models.tokenizer())


def tuned(
    goal: Objective, replica: Replica, reference: Callable[[], Reference] | None = None
) -> dict[str, Any]:
    """Some steps of a replica."""
    goal.begin(replica.model, reference)
    found: dict[str, Any] = {"losses": [], "norms": [], "heldout": [goal.heldout(replica.measure)]}
    for step in range(STEPS):
        batch = goal.step(step, *replica.share)
        loss = replica.backward(
            lambda model, micro, weight=batch.weight: goal.loss(model, micro, weight), batch.micros
        )
        numbers = replica.finish(loss)
        found["losses"].append(numbers.loss)
        found["norms"].append(numbers.norm)
        replica.update(numbers.norm, lr=LR, embed_lr=LR)
    return {**found, "heldout": [*found["heldout"], goal.heldout(replica.measure)]}


def in_one_process(case: Case) -> dict[str, Any]:
    """What the ranks must give."""
    model = build(case.config, dtype=torch.float32)
    model.load_state_dict({name: x.float() for name, x in small_models.random_state(case.config).items()})
    return tuned(objective(case), Alone(model, section(case)))


def of_rank(case: Case) -> dict[str, Any]:
    """What this rank sees."""
    world = World.join(Mesh.parse(case.mesh), torch.device("cpu"))
    replica = parallelize(case.config, world, section(case))
    replica.fill((name, x.float()) for name, x in small_models.random_state(case.config).items())
    return tuned(objective(case), replica, replica.reference)


def main(folder: Path, names: list[str]) -> None:
    """Every case of the names on this rank."""
    torch.set_num_threads(1)
    for case in CASES:
        if case.name in names:
            (folder / f"{case.name}.{os.environ['RANK']}.json").write_text(json.dumps(of_rank(case)))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
