"""Which texts an answer may be: plain values that name a language. `inference/structured.py` enforces them.

A Grammar is checked for form and size where it is made; whether its schema, pattern or rules make sense is
found when it is compiled, which also happens before its request is queued.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from lapis.errors import InputError

MAX_DEPTH = 64  # levels of nested objects and arrays in a schema
MAX_SIZE = 128 << 10  # characters of a grammar
MAX_CHOICES = 1024

# White space that a JSON text may have between two of its parts. A model that hesitates writes spaces
# without end; this is enough for texts that are indented up to 30 columns.
SPACE = r"[ \n\t]{1,32}"

Kind = Literal["json", "regex", "lark"]


@dataclass(frozen=True)
class Grammar:
    """A language: a JSON schema, a regular expression or a context-free grammar; equal ones are compiled once.

    `param` is the request's field that an error about it names.
    """

    kind: Kind
    text: str
    strict: bool = True
    param: str = field(default="response_format", compare=False)

    @staticmethod
    def json_schema(
        schema: Mapping[str, Any], strict: bool = False, param: str = "response_format"
    ) -> Grammar:
        """JSON texts that a JSON Schema (2020-12) allows. Raises InputError.

        A keyword that cannot be enforced is an error with `strict`; without, it binds nothing.
        """
        return Grammar("json", schema_text(schema, param), strict, param)

    @staticmethod
    def json_object(param: str = "response_format") -> Grammar:
        """Any JSON object."""
        return Grammar("json", '{"type":"object"}', True, param)

    @staticmethod
    def regex(pattern: str, param: str = "response_format") -> Grammar:
        """Texts that a regular expression matches as a whole (Rust's syntax, no look-around)."""
        return Grammar("regex", _checked(pattern, param), True, param)

    @staticmethod
    def lark(text: str, param: str = "response_format") -> Grammar:
        """Texts that a context-free grammar in Lark's notation derives from its rule `start`."""
        return Grammar("lark", _checked(text, param), True, param)

    @staticmethod
    def choice(texts: Sequence[str], param: str = "response_format") -> Grammar:
        """One of the texts. Raises InputError if there are none, too many, or an empty one."""
        if isinstance(texts, str) or not 0 < len(texts) <= MAX_CHOICES:
            raise InputError(f"A choice needs 1 to {MAX_CHOICES} texts.", param=param)
        if not all(isinstance(text, str) and text for text in texts):
            raise InputError("Every text of a choice must be a string that is not empty.", param=param)
        return Grammar("lark", _checked("start: " + " | ".join(map(literal, texts)), param), True, param)


def literal(text: str) -> str:
    """A text as a string of Lark's notation."""
    return json.dumps(text, ensure_ascii=False)


def schema_text(schema: object, param: str) -> str:
    """A JSON schema as one line, its properties in their order. Raises InputError with this `param`."""
    if not isinstance(schema, Mapping):
        raise InputError("A JSON schema must be an object.", param=param)
    if _depth(schema) > MAX_DEPTH:
        raise InputError(f"The JSON schema is nested deeper than {MAX_DEPTH} levels.", param=param)
    kept = {key: value for key, value in schema.items() if key != "x-guidance"}  # the compiler's own switches
    try:
        text = json.dumps(kept, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise InputError(f"The JSON schema cannot be written as JSON: {error}.", param=param) from error
    return _checked(text, param)


def _checked(text: object, param: str) -> str:
    if not isinstance(text, str) or not text:
        raise InputError("A grammar must be a text that is not empty.", param=param)
    if len(text) > MAX_SIZE:
        message = f"The grammar has {len(text):,} characters; at most {MAX_SIZE:,} are allowed."
        raise InputError(message, param=param)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        message = "The grammar holds half of a surrogate pair, which is no Unicode character."
        raise InputError(message, param=param) from error
    if "\0" in text:
        raise InputError("The grammar holds a NUL character.", param=param)
    return text


def _depth(value: object) -> int:
    """Levels of nesting, counted without recursion: the value comes from outside."""
    depth, level = 0, [value]
    while level and depth <= MAX_DEPTH:
        nested = [item for item in level if isinstance(item, Mapping | list | tuple)]
        depth += bool(nested)
        level = [part for item in nested for part in (item.values() if isinstance(item, Mapping) else item)]
    return depth
