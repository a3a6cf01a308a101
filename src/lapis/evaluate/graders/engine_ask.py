"""Asks a model that grades with an engine of this process, for graders inside of a training run."""

from __future__ import annotations

from collections.abc import Callable

from lapis.errors import InputError, LapisError
from lapis.evaluate.graders.model_grader import Answer, Question
from lapis.inference.engine import Engine
from lapis.inference.request import Request, SamplingParams
from lapis.tokenizer.grammar import Grammar
from lapis.tokenizer.tools import prompt_with_tools

Load = Callable[[str], Engine]  # by a model's name


class EngineAsk:
    """Answers questions, and keeps each model that was asked. Close it."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._engines: dict[str, Engine] = {}

    def __call__(self, question: Question) -> Answer:
        """What the model says. Raises InputError (no chat template, no room for an answer), as the engine does."""
        engine = self._engines.get(question.model)
        if engine is None:
            engine = self._engines[question.model] = self._load(question.model)
        if engine.chat is None:
            raise InputError(f"{question.model!r} has no chat template, so it cannot grade.", param="model")
        prompt = prompt_with_tools(engine.chat, engine.tokenizer, question.messages, ())
        room = engine.context - len(prompt.ids)
        if room < 1:
            raise InputError(
                f"The question to {question.model!r} has {len(prompt.ids):,} tokens; its context is {engine.context:,}."
            )
        grammar = Grammar.json_schema(question.schema, strict=True)
        engine.prepare(grammar)
        params = SamplingParams(
            min(question.max_tokens, room),
            temperature=question.temperature,
            top_p=question.top_p,
            seed=question.seed,
            structure=grammar,
            visible_ids=prompt.visible_ids,
        )
        output = engine.submit(Request("grader", prompt.ids, params)).result()
        if output.finish_reason == "error":
            raise LapisError(f"{question.model!r} could not grade: {output.error}")
        return Answer(
            output.text,
            cut=output.finish_reason == "length",
            prompt_tokens=output.prompt_tokens,
            completion_tokens=output.completion_tokens,
            cached_tokens=output.cached_tokens,
        )

    def close(self) -> None:
        """End the engines."""
        for engine in self._engines.values():
            engine.close()
        self._engines.clear()
