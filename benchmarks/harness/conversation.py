"""The other end of harness/engines.py's Worker: an engine in a process of its own, asked by lines of JSON.

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
    answers = os.fdopen(_OUTPUT, "w", buffering=1)
    _say(answers, {"version": version})
    for line in sys.stdin:
        asked = json.loads(line)
        seconds, tokens, times = generate(asked["prompts"], asked["tokens"])
        _say(answers, {"seconds": seconds, "tokens": tokens, "times": times})


def _say(file: Any, value: dict[str, Any]) -> None:
    file.write(json.dumps(value) + "\n")
    file.flush()


_OUTPUT = os.dup(1)  # what engines print themselves goes to the log
os.dup2(2, 1)
