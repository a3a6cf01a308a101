"""Input items of the Responses API: read strictly, written down in one form, and turned into chat messages."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from lapis.errors import InputError

Item = dict[str, Any]

MAX_ITEMS = 4096
ROLES = ("user", "system", "developer", "assistant")
FIELDS = {
    "message": {"id", "type", "role", "content", "status", "phase"},
    "function_call": {"id", "type", "call_id", "name", "arguments", "status", "parsed_arguments"},
    "function_call_output": {"id", "type", "call_id", "output", "status"},
}
# Fields of ours and of OpenAI's that the official client sends back with an answer's items, as null.
EMPTY = {"caller", "namespace", "created_by", "async", "async_", "name"}


def new_item_id(kind: str) -> str:
    """An id for an item: msg_…, fc_…, fco_…."""
    return f"{kind}_{uuid.uuid4().hex}"


def read_items(value: object) -> list[Item]:
    """A text or a list of items, each in one form with an id. Raises InputError naming the place."""
    if isinstance(value, str) and value:
        return [_message({"role": "user", "content": value}, "input")]
    if not isinstance(value, list) or not value:
        raise InputError("'input' must be a string or a list of items that is not empty.", param="input")
    if len(value) > MAX_ITEMS:
        raise InputError(f"'input' takes at most {MAX_ITEMS} items, got {len(value)}.", param="input")
    return [_item(item, f"input[{index}]") for index, item in enumerate(value)]


def chat_messages(items: Sequence[Item]) -> list[dict[str, Any]]:
    """Items as the messages of a chat: calls belong to the assistant's message before them."""
    messages: list[dict[str, Any]] = []
    for item in items:
        if item["type"] == "message":
            role = "system" if item["role"] == "developer" else item["role"]
            text = "".join(part["text"] for part in item["content"])
            messages.append({"role": role, "content": text})
        elif item["type"] == "function_call":
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": ""})
            function = {"name": item["name"], "arguments": item["arguments"]}
            call = {"id": item["call_id"], "type": "function", "function": function}
            messages[-1].setdefault("tool_calls", []).append(call)
        else:
            messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": item["output"]})
    return messages


def _item(item: object, where: str) -> Item:
    if not isinstance(item, dict):
        raise InputError(f"{where} must be an object.", param=where)
    kind = item.get("type", "message")
    if kind not in FIELDS:
        shown = kind[:40] if isinstance(kind, str) else kind
        raise InputError(
            f"Items of type {shown!r} are not offered, only {', '.join(FIELDS)}.", param=f"{where}.type"
        )
    known = FIELDS[kind]
    for name, value in item.items():
        if name not in known and not (name in EMPTY and value is None):
            raise InputError(f"Unknown field '{where}.{name}'.", param=f"{where}.{name}")
    if kind == "message":
        return _message(item, where)
    if kind == "function_call":
        return {
            "id": _id(item, "fc", where),
            "type": kind,
            "call_id": _text(item, "call_id", where),
            "name": _text(item, "name", where),
            "arguments": _text(item, "arguments", where),
            "status": "completed",
        }
    return {
        "id": _id(item, "fco", where),
        "type": kind,
        "call_id": _text(item, "call_id", where),
        "output": _joined(item.get("output"), f"{where}.output"),
        "status": "completed",
    }


def _message(item: Mapping[str, Any], where: str) -> Item:
    role = item.get("role")
    if role not in ROLES:
        raise InputError(f"{where}.role must be one of {', '.join(ROLES)}.", param=f"{where}.role")
    text = _joined(item.get("content"), f"{where}.content")
    kind = "output_text" if role == "assistant" else "input_text"
    part = {"type": kind, "text": text}
    if role == "assistant":
        part = {**part, "annotations": [], "logprobs": []}  # type: ignore[dict-item]
    return {
        "id": _id(item, "msg", where),
        "type": "message",
        "role": role,
        "status": "completed",
        "content": [part],
    }


def _joined(content: object, where: str) -> str:
    """A content as one string: a string, or a list of text parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise InputError(f"{where} must be a string or a list of text parts.", param=where)
    texts = []
    for part in content:
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise InputError(f"Every part of {where} must be an object with a type.", param=where)
        if part["type"] not in ("input_text", "output_text", "text"):
            raise InputError(f"Parts of type {part['type'][:40]!r} are not offered, only texts.", param=where)
        if not isinstance(part.get("text"), str):
            raise InputError(f"A text part of {where} has no text.", param=where)
        texts.append(part["text"])
    return "".join(texts)


def _text(item: Mapping[str, Any], name: str, where: str) -> str:
    value = item.get(name)
    if not isinstance(value, str) or (name != "arguments" and not 0 < len(value) <= 256):
        raise InputError(f"{where}.{name} must be a string.", param=f"{where}.{name}")
    return value


def _id(item: Mapping[str, Any], kind: str, where: str) -> str:
    value = item.get("id")
    if value is None:
        return new_item_id(kind)
    if not isinstance(value, str) or not 0 < len(value) <= 256:
        raise InputError(f"{where}.id must be a string.", param=f"{where}.id")
    return value
