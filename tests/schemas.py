"""Random JSON schemas of moderate size, for tests of structured answers."""

from __future__ import annotations

from random import Random
from typing import Any

NAMES = ("a", "name", "größe", 'with "quotes"', "x y", "n1")


def random_schema(random: Random, depth: int = 3) -> dict[str, Any]:
    """A schema whose texts are short enough to be finished, whatever is sampled."""
    leaves = [_string, _integer, _number, _constant, _nothing]
    nested = [_object, _object, _array, _either] if depth > 0 else []
    return random.choice(leaves + nested)(random, depth - 1)


def _string(random: Random, depth: int) -> dict[str, Any]:
    bound: dict[str, Any] = random.choice(
        [
            {"maxLength": random.randrange(8)},
            {"minLength": 2, "maxLength": 5},
            {"pattern": "^[a-z]{1,4}-[0-9]{2}$"},
            {"format": random.choice(["date", "uuid", "ipv4", "time"])},
        ]
    )
    return {"type": "string", **bound}


def _integer(random: Random, depth: int) -> dict[str, Any]:
    low = random.randrange(-200, 200)
    return {"type": "integer", "minimum": low, "maximum": low + random.randrange(500)}


def _number(random: Random, depth: int) -> dict[str, Any]:
    return {"type": "number", "minimum": 0, random.choice(["maximum", "exclusiveMaximum"]): 10}


def _constant(random: Random, depth: int) -> dict[str, Any]:
    values: list[Any] = ["red", 'a "b"\n', 3, -1.5, None, True, ["x", 1], {"k": []}]
    return random.choice([{"const": random.choice(values)}, {"enum": random.sample(values, 3)}])


def _nothing(random: Random, depth: int) -> dict[str, Any]:
    return {"type": random.choice([["boolean", "null"], "null", "boolean"])}


def _object(random: Random, depth: int) -> dict[str, Any]:
    names = random.sample(NAMES, random.randrange(1, 4))
    return {
        "type": "object",
        "properties": {name: random_schema(random, depth) for name in names},
        "required": random.sample(names, random.randrange(len(names) + 1)),
        "additionalProperties": False,
    }


def _array(random: Random, depth: int) -> dict[str, Any]:
    low = random.randrange(3)
    return {"type": "array", "items": random_schema(random, depth), "minItems": low, "maxItems": low + 2}


def _either(random: Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [random_schema(random, depth), random_schema(random, depth)]}
