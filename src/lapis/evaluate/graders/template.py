"""`{{ item.question }}` and `{{ sample.output_text }}`: the text of a grader with the values of one sample in it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from lapis.errors import InputError

NAMESPACES = ("item", "sample")
TEXT_LIMIT = 1 << 20  # characters of a rendered text
_PLACE = re.compile(r"\{\{(.*?)\}\}", re.DOTALL)
_STEP = re.compile(r"""\.\s*([\w-]+)|\[\s*(\d+)\s*\]|\[\s*"([^"\]]*)"\s*\]|\[\s*'([^'\]]*)'\s*\]""")
_ROOT = re.compile(r"[A-Za-z_]\w*")


class MissingError(InputError):
    """A template names what an item or a sample does not have."""


class NotJsonError(InputError):
    """A template reads `sample.output_json`, and the sample's text is no JSON."""


def variables(item: Any, text: str | None, sample: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What templates may name: `item`, and `sample` with the output's text, if any, and its JSON where it is JSON."""
    made: dict[str, Any] = dict(sample or {})
    if text is None:
        return {"item": {} if item is None else item, "sample": made}
    made["output_text"] = text
    try:
        made["output_json"] = json.loads(text)
    except (ValueError, RecursionError):
        made.pop("output_json", None)
    return {"item": {} if item is None else item, "sample": made}


def render(template: str, values: Mapping[str, Any]) -> str:
    """A template's text: strings as they are, anything else as JSON. What was put in is not read again.

    Raises MissingError, NotJsonError, and InputError for a broken template or a text beyond TEXT_LIMIT.
    """
    pieces: list[str] = []
    size = end = 0
    for match in _PLACE.finditer(template):
        value = look_up(match[1], values)
        shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        pieces += template[end : match.start()], shown
        size += match.start() - end + len(shown)
        end = match.end()
        if size > TEXT_LIMIT:
            raise InputError(f"A template's text would be longer than {TEXT_LIMIT:,} characters.")
    return "".join(pieces) + template[end:]


def look_up(expression: str, values: Mapping[str, Any]) -> Any:
    """The value that `item.a.b[0]["c d"]` names. Raises MissingError, NotJsonError, InputError (no such form)."""
    path = read_path(expression)
    value: Any = values
    for number, step in enumerate(path):
        if isinstance(value, Mapping) and step in value:
            value = value[step]
        elif isinstance(value, list) and step.isdigit() and int(step) < len(value):
            value = value[int(step)]
        elif path[:2] == ["sample", "output_json"] and number == 1:
            raise NotJsonError(f"{{{{{expression}}}}}: the sample's text is no JSON.")
        else:
            before = ".".join(path[:number])
            raise MissingError(f"{{{{{expression}}}}}: there is no {step!r} in {before or 'a template'}.")
    return value


def read_path(expression: str) -> list[str]:
    """The steps of a variable's name. Raises InputError for another form or namespace."""
    text = expression.strip()
    root = _ROOT.match(text)
    if root is None or root[0] not in NAMESPACES:
        raise InputError(
            f"{{{{{expression}}}}} names neither item nor sample.",
            hint="Write {{ item.NAME }} or {{ sample.output_text }}.",
        )
    path, place = [root[0]], root.end()
    while place < len(text):
        step = _STEP.match(text, place)
        if step is None:
            raise InputError(
                f"{{{{{expression}}}}} cannot be read from {text[place : place + 20]!r} on.",
                hint='Write names with dots and brackets: {{ item.a.b[0]["c d"] }}.',
            )
        path.append(next(part for part in step.groups() if part is not None))
        place = step.end()
    return path


def check_template(template: str) -> None:
    """Raise InputError where a template has a place that no sample could fill."""
    for match in _PLACE.finditer(template):
        read_path(match[1])


def item_names(template: str) -> set[str]:
    """The fields of an item that a template reads. Raises InputError as `check_template`."""
    paths = [read_path(match[1]) for match in _PLACE.finditer(template)]
    return {path[1] for path in paths if path[0] == "item" and len(path) > 1}
