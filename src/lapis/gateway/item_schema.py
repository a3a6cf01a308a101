"""JSON Schemas of eval items: checked when they come, so that no schema can hold the server up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jsonschema_rs

from lapis.errors import InputError, nearest

LARGEST = 20_000  # parts of a schema with its references in their places: what one validation may look at
REFUSED = ("$dynamicRef", "$recursiveRef", "$id", "$anchor", "$dynamicAnchor", "$recursiveAnchor")
PARAM = "data_source_config.item_schema"


class ItemSchema:
    """A JSON Schema whose items are validated in time that grows with schema and item alone.

    References may point into the schema itself, not in a circle; patterns are those of a linear engine.
    """

    def __init__(self, schema: Mapping[str, Any]) -> None:
        """Raises InputError for what is no schema, or one that is refused."""
        self._schema = schema
        try:
            _expanded(schema, schema, {}, ())
            self._validator = jsonschema_rs.validator_for(
                dict(schema), offline=True, pattern_options=jsonschema_rs.RegexOptions()
            )
        except RecursionError as error:
            raise InputError("The item schema is nested too deep.", param=PARAM) from error
        except (ValueError, jsonschema_rs.ReferencingError) as error:
            message = str(getattr(error, "message", error)).partition("\n")[0]
            raise InputError(f"The item schema is no JSON Schema: {message}.", param=PARAM) from error

    def check_names(self, names: set[str], who: str) -> None:
        """Raise InputError for a field that no item can have, where the schema allows none but its own."""
        if self._schema.get("additionalProperties") is not False or "patternProperties" in self._schema:
            return
        known = self._schema.get("properties", {})
        for name in sorted(names - known.keys()):
            raise InputError(
                f"{who} reads item.{name}, which no item has. {nearest(name, known)}".strip(), param=PARAM
            )

    def problem(self, item: Any) -> str | None:
        """What is wrong with an item, and where; None for one that fits."""
        error = next(self._validator.iter_errors(item), None)
        if error is None:
            return None
        where = ".".join(["item", *(str(step) for step in error.instance_path)])
        return f"{where}: {error.message[:500]}"


def _expanded(part: Any, whole: Mapping[str, Any], known: dict[str, int], path: tuple[str, ...]) -> int:
    """How many parts a schema has with its references in their places. Raises InputError beyond LARGEST."""
    total = 1
    if isinstance(part, Mapping):
        for name, value in part.items():
            if name in REFUSED:
                raise InputError(f"The item schema uses {name!r}, which is not offered.", param=PARAM)
            if name == "$ref" and isinstance(value, str):
                total += _referred(value, whole, known, path)
            total += _expanded(value, whole, known, path)
    elif isinstance(part, list):
        total += sum(_expanded(value, whole, known, path) for value in part)
    if total > LARGEST:
        raise InputError(f"The item schema has more than {LARGEST:,} parts.", param=PARAM)
    return total


def _referred(reference: str, whole: Mapping[str, Any], known: dict[str, int], path: tuple[str, ...]) -> int:
    if reference in path:
        raise InputError(f"The item schema refers to itself in a circle by {reference!r}.", param=PARAM)
    if reference not in known:
        target: Any = whole
        for step in reference.removeprefix("#/").split("/"):
            step = step.replace("~1", "/").replace("~0", "~")
            if not reference.startswith("#/") or not isinstance(target, Mapping) or step not in target:
                raise InputError(f"The item schema's reference {reference!r} leads nowhere.", param=PARAM)
            target = target[step]
        known[reference] = _expanded(target, whole, known, (*path, reference))
    return known[reference]
