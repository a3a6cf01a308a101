"""The other end of harness/engines.py's Worker and harness/training.py's Trainee: asked by lines of JSON.

Imports nothing but the standard library: it also runs in the peers' environments.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

Times = list[list[float]]
Generate = Callable[[list[list[int]], int], tuple[float, int, Times]]  # prompts, new tokens each


def converse(version: str, generate: Generate) -> None:
    """Answer `{"prompts": [[id, …], …], "tokens": n}` with `{"seconds", "tokens", "times"}` until the input ends."""

    def answer(asked: dict[str, Any]) -> dict[str, Any]:
        seconds, tokens, times = generate(asked["prompts"], asked["tokens"])
        return {"seconds": seconds, "tokens": tokens, "times": times}

    answer_all({"version": version}, answer)


def answer_all(greeting: dict[str, Any], answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Say the greeting, then answer line by line until the input ends."""
    answers = os.fdopen(_OUTPUT, "w", buffering=1)
    _say(answers, greeting)
    for line in sys.stdin:
        _say(answers, answer(json.loads(line)))


def _say(file: Any, value: dict[str, Any]) -> None:
    file.write(json.dumps(value) + "\n")
    file.flush()


_OUTPUT = os.dup(1)  # what engines print themselves goes to the log
os.dup2(2, 1)
