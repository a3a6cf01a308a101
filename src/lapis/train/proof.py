"""A resume proves itself: the losses after a checkpoint are written down, and met again after a resume from it. Pure.

They lie in the run's events, not in the checkpoint: they are known only when the next steps are done.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

EVENT, SEGMENT = "proof", "segment"
STEPS = 2  # the first shows weights and data, the second the optimizer's state and the schedule as well
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}  # relative, on other kernels or another layout


def expected(events: Iterable[Mapping[str, Any]], checkpoint: int) -> dict[int, Mapping[str, Any]]:
    """By step, the last proof that was written of a step after the checkpoint of that step.

    From the step on at which another mixture of the data begins, what was written before that is no proof any more.
    """
    found: dict[int, Mapping[str, Any]] = {}
    for event in events:
        if event["event"] == SEGMENT:
            found = {step: proof for step, proof in found.items() if step < event["from_step"]}
        if event["event"] == EVENT and event["checkpoint"] == checkpoint:
            found[event["step"]] = event
    return found


def agrees(proof: Mapping[str, Any], loss: float, setup: str, dtype: str) -> bool:
    """Whether a loss is the one written down: the same bits in the same setup, nearly the same otherwise."""
    before = float.fromhex(proof["loss"])
    if proof["setup"] == setup or not math.isfinite(before):  # a step that was skipped is one here too
        return before.hex() == loss.hex()
    return abs(before - loss) <= TOLERANCE[dtype] * abs(before)
