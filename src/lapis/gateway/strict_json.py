"""JSON read strictly: what JSON does not allow, or could be read in two ways, is refused."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any, NoReturn

from lapis.errors import InputError

MAX_DEPTH = 700  # levels of nested objects and arrays; what walks them by recursion has room for more


def read_json(raw: bytes, what: str = "The body") -> Any:
    """Any JSON value. Raises InputError for broken JSON, NaN, infinity, doubled keys, lone surrogates, depth."""
    try:
        text = raw.decode("utf-8")
        value = json.loads(text, parse_constant=_constant, parse_float=_number, object_pairs_hook=fields_once)
    except UnicodeDecodeError as error:
        raise InputError(f"{what} is not UTF-8: {error.reason} at byte {error.start}.") from error
    except json.JSONDecodeError as error:
        raise InputError(
            f"{what} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}."
        ) from error
    except RecursionError as error:
        raise InputError(f"{what} is nested too deep.") from error
    except ValueError as error:  # an integer of thousands of digits
        raise InputError(f"{what} has a number that cannot be read: {error}.") from error
    if depth(value) > MAX_DEPTH:
        raise InputError(f"{what} is nested deeper than {MAX_DEPTH} levels.")
    if "\\ud" in text or "\\uD" in text:
        _refuse_surrogates(value, what, "")
    return value


def _constant(name: str) -> NoReturn:
    raise InputError(f"There is a {name}, which JSON does not know.")


def _number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise InputError(f"The number {text[:40]} is too large.")
    return number


def fields_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object's fields. Raises InputError for one that is given twice."""
    values = dict(pairs)
    if len(values) < len(pairs):
        times = Counter(name for name, _ in pairs)
        double = next(name for name, count in times.items() if count > 1)
        raise InputError(f"The field {double!r} is given twice.", param=double)
    return values


def _refuse_surrogates(value: Any, what: str, where: str) -> None:
    if isinstance(value, str):
        if any("\ud800" <= letter <= "\udfff" for letter in value):
            field = where or what
            raise InputError(
                f"{field} has half of a surrogate pair, which is no character.", param=where or None
            )
    elif isinstance(value, dict):
        for name, item in value.items():
            _refuse_surrogates(name, what, where)
            _refuse_surrogates(item, what, f"{where}.{name}" if where else name)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _refuse_surrogates(item, what, f"{where}[{index}]")


def depth(value: Any) -> int:
    """Levels of nesting, counted without recursion."""
    found, level = 0, [value]
    while level := [item for item in level if isinstance(item, dict | list)]:
        found += 1
        level = [part for item in level for part in (item.values() if isinstance(item, dict) else item)]
    return found
