"""The ways in which a request can bind the form of an answer, read into a Grammar."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lapis.errors import InputError
from lapis.tokenizer.grammar import Grammar

NAME_LENGTH = 64


def read_format(value: Mapping[str, Any] | None, param: str, *, nested: bool) -> Grammar | None:
    """OpenAI's response_format (`nested`: the schema lies under json_schema) or text.format; None is any text.

    Raises InputError with `param`.
    """
    kind = "text" if value is None else value.get("type")
    if value is None or kind == "text":
        return None
    if kind == "json_object":
        return Grammar.json_object(param)
    if kind != "json_schema":
        raise InputError(f"{param}.type must be text, json_object or json_schema.", param=param)
    described = value.get("json_schema") if nested else value
    if not isinstance(described, Mapping):
        raise InputError(f"{param}.json_schema must be an object.", param=param)
    name, strict = described.get("name", "schema"), described.get("strict")
    if not isinstance(name, str) or not 0 < len(name) <= NAME_LENGTH:
        raise InputError(f"{param}: the schema needs a name of 1 to {NAME_LENGTH} characters.", param=param)
    if strict is not None and not isinstance(strict, bool):
        raise InputError(f"{param}: strict must be true or false.", param=param)
    if "schema" not in described:
        raise InputError(f"{param}: the schema is missing.", param=param)
    return Grammar.json_schema(described["schema"], bool(strict), param)


def read_structure(value: Mapping[str, Any] | None) -> Grammar | None:
    """vLLM's structured_outputs: exactly one of json, regex, choice, grammar (Lark). Raises InputError."""
    param = "structured_outputs"
    if value is None:
        return None
    if len(value) != 1:
        raise InputError(f"{param} takes exactly one of json, regex, choice, grammar.", param=param)
    kind, given = next(iter(value.items()))
    if kind == "json":
        return Grammar.json_schema(given, True, param)
    if kind == "choice" and isinstance(given, list):
        return Grammar.choice(given, param)
    if kind in ("regex", "grammar") and isinstance(given, str):
        return Grammar.regex(given, param) if kind == "regex" else Grammar.lark(given, param)
    raise InputError(
        f"{param}: json is a schema, choice a list of strings, regex and grammar are strings.", param=param
    )


def one_form(form: Grammar | None, structure: Grammar | None) -> Grammar | None:
    """Whichever is given. Raises InputError for both."""
    if form is not None and structure is not None:
        raise InputError(
            "response_format and structured_outputs both bind the answer; give one of them.",
            param="structured_outputs",
        )
    return form or structure
