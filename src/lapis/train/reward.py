"""What an answer is worth: a function of the user's, a grader, a regular expression, or the right answer. No torch."""

from __future__ import annotations

import importlib.util
import math
import numbers
import re
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from lapis.data.prompts import Asked, Prompts
from lapis.errors import InputError, UnavailableError, nearest
from lapis.evaluate.graders.engine_ask import EngineAsk, Load
from lapis.evaluate.graders.grader import Grader, read_grader
from lapis.evaluate.graders.grading import Means, check, grade
from lapis.evaluate.graders.python_grader import PythonSandbox
from lapis.hashing import digest_bytes
from lapis.train.recipe import GrpoSection

Grade = Callable[[Any, str, dict[str, Any]], Any]
SHOWN = 200  # characters of an answer in an error
MENDED = "Mend it and run the same command, which goes on from the last checkpoint."


@dataclass(frozen=True)
class Reward:
    """Grades answers. `digest` is that of a function's file, "" where there is none."""

    name: str
    grade: Grade
    digest: str = ""

    def __call__(self, asked: Asked, answer: str) -> float:
        """What an answer is worth. Raises InputError naming the example if the function raises or tells no number."""
        prompt = asked.prompt
        question = prompt.asked if isinstance(prompt.asked, str) else [dict(turn) for turn in prompt.asked]
        try:
            value = self.grade(question, answer, dict(prompt.fields))
        except Exception as error:
            line = traceback.extract_tb(error.__traceback__)[-1]
            raise self._failed(
                asked, answer, f"{type(error).__name__}: {error} ({line.filename}:{line.lineno})"
            ) from error
        if not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise self._failed(asked, answer, f"it gave {value!r}, which is no finite number")
        return float(value)

    def _failed(self, asked: Asked, answer: str, why: str) -> InputError:
        shown = answer if len(answer) <= SHOWN else answer[:SHOWN] + "…"
        return InputError(
            f"The reward {self.name} failed for {asked.place}: {why}. The answer was {shown!r}.", hint=MENDED
        )


def reward_of(section: GrpoSection, prompts: Prompts, load: Load) -> Reward:
    """The reward that a recipe asks for; `load` gives an engine for a model that grades.

    Raises InputError for a function that cannot be had, a grader's program that does not load, a missing field.
    """
    if section.grader is not None:
        return graded(read_grader(section.grader), Means(EngineAsk(load), PythonSandbox()))
    if section.regex is not None:
        pattern = re.compile(section.regex)
        return Reward(f"regex {section.regex}", lambda _, answer, fields: float(bool(pattern.search(answer))))
    if section.exact is not None:
        return _exact(section.exact, prompts)
    assert section.reward is not None, "the recipe was checked"
    return _function(section.reward)


def graded(grader: Grader, means: Means) -> Reward:
    """A grader as a reward; the example's messages and other fields are its `item`.

    An answer that cannot be graded, such as one that is no JSON or makes the grader's program raise, is worth 0.
    What no answer could mend ends the run: a field that examples lack, a model that cannot be asked, no sandbox.
    """
    check(grader, means.sandbox)

    def reward(question: Any, answer: str, fields: dict[str, Any]) -> float:
        item = fields if isinstance(question, str) else {"messages": question, **fields}
        grading = grade(grader, answer, item, means)
        errors = grading.errors
        if errors.invalid_variable_error or errors.other_error:
            raise InputError(grading.message)
        if errors.model_grader_server_error or errors.python_grader_server_error:
            raise UnavailableError(grading.message)
        return grading.reward

    return Reward(f"grader {grader.name}", reward)


def _exact(field: str, prompts: Prompts) -> Reward:
    """1 for an answer that is the text of a field of its example, white space around it aside."""
    for asked in (*prompts.trained, *prompts.heldout):
        if not isinstance(asked.prompt.fields.get(field), str | int | float):
            known = nearest(field, map(str, asked.prompt.fields))
            raise InputError(
                f"{asked.place}: grpo.exact names the field {field!r}, which holds no text here. {known}".strip()
            )
    return Reward(
        f"exact {field}", lambda _, answer, fields: float(answer.strip() == str(fields[field]).strip())
    )


def _function(reference: str) -> Reward:
    """The function that "path/to/file.py:function" names."""
    file, _, name = reference.rpartition(":")
    path = Path(file).expanduser()
    try:
        source = path.read_bytes()
    except OSError as error:
        raise InputError(f"grpo.reward: {path} cannot be read: {error.strerror}.") from error
    module = _module(path)
    function = getattr(module, name, None)
    if not callable(function):
        known = nearest(name, (key for key, value in vars(module).items() if callable(value)))
        raise InputError(f"grpo.reward: {path} has no function {name!r}. {known}".strip())
    return Reward(reference, function, digest_bytes(source))


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"lapis_reward_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise InputError(f"grpo.reward: {path} is no Python file.", hint='Write "path/to/file.py:function".')
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where dataclasses look for it
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise InputError(f"grpo.reward: {path} cannot be loaded: {type(error).__name__}: {error}.") from error
    return module
