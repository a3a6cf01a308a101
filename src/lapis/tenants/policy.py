"""Which models a project may use: all, only those of a list, or all but those of a list."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Literal

Mode = Literal["allow_list", "deny_list"]

_CHECKPOINT = re.compile(r":ckpt-step-\d+$")


@dataclass(frozen=True)
class ModelPolicy:
    """A list of models' names, and whether it allows or denies them."""

    mode: Mode = "deny_list"
    models: frozenset[str] = frozenset()

    def allows(self, model: str) -> bool:
        """Whether a model may be used. What is said of a name holds for its versions and checkpoints too.

        `poems` stands for `poems:2`, and `ft:tiny:org:x:1` for its checkpoints; other fine-tuned models need
        a name of their own in the list.
        """
        listed = any(model == name or model.startswith(f"{name}:") for name in self.models)
        return listed if self.mode == "allow_list" else not listed


EVERY_MODEL = ModelPolicy()


def family(model: str) -> str:
    """The name whose limits and price hold for a model: a release's for its versions, a model's for its checkpoints."""
    if model.startswith("ft:"):
        return _CHECKPOINT.sub("", model)
    return model.partition(":")[0]


def policy_of(mode: str | None, models: str | None) -> ModelPolicy:
    """A policy as it stands in a project's row."""
    if mode is None:
        return EVERY_MODEL
    return ModelPolicy(
        "allow_list" if mode == "allow_list" else "deny_list", frozenset(json.loads(models or "[]"))
    )
