"""What a model is asked for an item of an eval, and what graders and readers are told of its answer. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lapis.errors import InputError
from lapis.evaluate.graders.grader import Message
from lapis.evaluate.graders.template import look_up, render, variables
from lapis.gateway.eval_runs import Used

SEED = 42  # unless a run says otherwise: a run can be repeated
CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"


@dataclass(frozen=True)
class Asking:
    """A request to the API for one item."""

    path: str
    messages: Sequence[Mapping[str, Any]]
    body: Mapping[str, Any]


@dataclass(frozen=True)
class Sampled:
    """An answer: its text (None: there is none), what else graders may read of it, and how it is shown."""

    text: str | None
    values: Mapping[str, Any]
    shown: Mapping[str, Any]
    usage: Mapping[str, Used] = field(default_factory=dict)
    failed: bool = False


def asking(source: Mapping[str, Any], item: Mapping[str, Any]) -> Asking:
    """What a run asks its model for an item. Raises InputError where a template cannot be filled."""
    messages = _messages(source["input_messages"], item)
    given = source.get("sampling_params") or {}
    params = {name: value for name, value in given.items() if value is not None}
    limit = params.pop("max_completion_tokens", None)
    body = {"model": source["model"], "seed": SEED, **params}
    if source["type"] == "completions":
        limits = {} if limit is None else {"max_completion_tokens": limit}
        return Asking(CHAT, messages, {**body, "messages": messages, **limits})
    limits = {} if limit is None else {"max_output_tokens": limit}
    return Asking(RESPONSES, messages, {**body, "input": messages, "store": False, **limits})


def sampled(asked: Asking, answer: Mapping[str, Any]) -> Sampled:
    """What the API answered."""
    text, calls, reason, used = _chat(answer) if asked.path == CHAT else _response(answer)
    model = str(asked.body["model"])
    output = [{"role": "assistant", "content": text}]
    values = {
        "choices": answer.get("choices", []),
        "output_tools": calls,
        "model": model,
        "finish_reason": reason,
    }
    shown = _shown(asked.messages, output, asked.body, reason, used)
    return Sampled(text, values, shown, {model: used})


def unanswered(asked: Asking | None, model: str, code: str, message: str) -> Sampled:
    """An item for which there is no answer, and why."""
    body = {"model": model} if asked is None else asked.body
    shown = _shown([] if asked is None else asked.messages, [], body, "error", Used())
    return Sampled(None, {}, {**shown, "error": {"code": code, "message": message}}, failed=True)


def given(sample: Mapping[str, Any] | None) -> Sampled:
    """The sample that a row brings along. Raises InputError where its text is none."""
    values = dict(sample or {})
    text = values.get("output_text")
    if text is not None and not isinstance(text, str):
        raise InputError("sample.output_text is no text.")
    output = [] if text is None else [{"role": "assistant", "content": text}]
    body = {"model": str(values.get("model", ""))}
    return Sampled(text, values, _shown([], output, body, str(values.get("finish_reason", "")), Used()))


def _messages(template: Mapping[str, Any], item: Mapping[str, Any]) -> list[dict[str, Any]]:
    values = variables(item, None)
    if template["type"] == "item_reference":
        found = look_up(template["item_reference"], values)
        found = [{"role": "user", "content": found}] if isinstance(found, str) else found
        if not isinstance(found, list) or not all(isinstance(message, dict) for message in found):
            raise InputError(f"{template['item_reference']} is neither a text nor a list of messages.")
        return [{name: value for name, value in message.items() if name != "type"} for message in found]
    messages = [Message.model_validate(message) for message in template["template"]]
    return [
        {"role": message.role, "content": "\n".join(render(text, values) for text in message.texts)}
        for message in messages
    ]


def _chat(answer: Mapping[str, Any]) -> tuple[str, list[Any], str, Used]:
    choice, usage = answer["choices"][0], answer["usage"]
    message = choice["message"]
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    used = Used(usage["prompt_tokens"], usage["completion_tokens"], cached, 1)
    return message.get("content") or "", message.get("tool_calls") or [], choice["finish_reason"], used


def _response(answer: Mapping[str, Any]) -> tuple[str, list[Any], str, Used]:
    usage = answer["usage"]
    parts = [part for item in answer["output"] if item["type"] == "message" for part in item["content"]]
    text = "".join(part["text"] for part in parts if part["type"] == "output_text")
    calls = [item for item in answer["output"] if item["type"] == "function_call"]
    reason = "length" if answer["status"] == "incomplete" else "tool_calls" if calls else "stop"
    cached = usage["input_tokens_details"]["cached_tokens"]
    return text, calls, reason, Used(usage["input_tokens"], usage["output_tokens"], cached, 1)


def _shown(
    messages: Sequence[Mapping[str, Any]],
    output: Sequence[Mapping[str, Any]],
    body: Mapping[str, Any],
    reason: str,
    used: Used,
) -> dict[str, Any]:
    """A sample as the client's type has it; what was left to the server is told as its default, no limit as 0."""
    limit = body.get("max_completion_tokens", body.get("max_output_tokens"))
    return {
        "input": [
            {"role": str(message["role"]), "content": _text(message["content"])} for message in messages
        ],
        "output": output,
        "finish_reason": reason,
        "model": body["model"],
        "max_completion_tokens": limit or 0,
        "seed": body.get("seed", 0),
        "temperature": body.get("temperature", 1.0),
        "top_p": body.get("top_p", 1.0),
        "usage": {
            "prompt_tokens": used.prompt_tokens,
            "completion_tokens": used.completion_tokens,
            "cached_tokens": used.cached_tokens,
            "total_tokens": used.prompt_tokens + used.completion_tokens,
        },
        "error": {"code": "", "message": ""},
    }


def _text(content: Any) -> str:
    if isinstance(content, list):
        return "\n".join(
            str(part.get("text", "")) if isinstance(part, dict) else str(part) for part in content
        )
    return content if isinstance(content, str) else ""
