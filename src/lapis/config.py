"""Recipes: strict TOML into frozen models. An unknown key is an error that names the nearest one."""

from __future__ import annotations

import ast
import inspect
import json
import re
import textwrap
import tomllib
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from lapis.errors import ConfigError, nearest
from lapis.hashing import digest_json


class Section(BaseModel):
    """A table of a recipe: frozen, no unknown keys, no silent conversion between types, no infinite number."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    def digest(self) -> str:
        """The digest of all resolved values, defaults included."""
        return digest_json(self.model_dump(mode="json"))


Recipe = TypeVar("Recipe", bound=Section)
WORDS = {
    "tuple_type": "should be a list",
    "model_type": "should be a table",
    "dict_type": "should be a table",
}
BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")  # TOML's: all others stand in quotes


@dataclass(frozen=True)
class Field:
    """One setting as `lapis config` prints it: dotted key, type, default as TOML text, one sentence."""

    key: str
    type: str
    default: str
    text: str


def load(path: Path, schema: type[Recipe], sets: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and apply `a.b=c` overrides. Raises ConfigError naming file, key and nearest key."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"The recipe {path} cannot be read: {error.strerror}.") from error
    try:
        values = tomllib.loads(raw.decode("utf-8"))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"The recipe {path} is not valid TOML: {error}.") from error
    return parse(values, schema, sets, where=str(path))


def parse(
    values: dict[str, Any], schema: type[Recipe], sets: Sequence[str] = (), where: str = "recipe"
) -> Recipe:
    """Make a recipe of plain values and `a.b=c` overrides. Raises ConfigError."""
    for text in sets:
        _apply(values, text)
    try:
        # strict=True refuses lists for tuples from Python, but takes them from JSON-shaped input.
        return schema.model_validate(_tuples(values))
    except ValidationError as error:
        raise ConfigError(_explain(error, schema, where), hint="`lapis config` lists every key.") from error


def fields(schema: type[Section], prefix: str = "") -> Iterator[Field]:
    """Every setting of a recipe, in the order of its definition."""
    texts = _texts(schema)
    for name, info in schema.model_fields.items():
        key = f"{prefix}{info.alias or name}"  # an alias where the word is one of Python's own
        inner = _section_of(info.annotation)
        if inner is not None and typing.get_origin(info.annotation) is not tuple:
            yield from fields(inner, f"{key}.")
            continue
        default = "required" if info.is_required() else toml_value(_default(info))
        yield Field(key, _type_name(info.annotation), default, info.description or texts.get(name, ""))
        if inner is not None:
            yield from fields(inner, f"{key}[].")


def _texts(schema: type[Section]) -> dict[str, str]:
    """The sentence below each setting in the source of its class.

    Read when it is asked for: pydantic would read all of them whenever a program starts, for a fifth of a second.
    """
    found: dict[str, str] = {}
    for base in reversed(schema.__mro__):
        if not issubclass(base, Section) or base is Section:
            continue
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(definition, ast.ClassDef)
        for setting, below in pairwise(definition.body):
            if isinstance(setting, ast.AnnAssign) and isinstance(setting.target, ast.Name):
                match below:
                    case ast.Expr(ast.Constant(str(text))):
                        found[setting.target.id] = " ".join(text.split())
    return found


def to_toml(recipe: Section) -> str:
    """The resolved recipe as TOML text that `load` reads back to the same values."""
    lines: list[str] = []
    _write_table(recipe.model_dump(mode="json", exclude_none=True, by_alias=True), (), lines)
    return "\n".join(lines).strip() + "\n"


def toml_value(value: Any) -> str:
    """One value as TOML text; None has no TOML form and prints as `unset`."""
    if value is None:
        return "unset"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml_key(key)} = {toml_value(item)}" for key, item in value.items()) + "}"
    # TOML's basic strings are JSON's, but for one character
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")


def _toml_key(key: str) -> str:
    return key if BARE_KEY.fullmatch(key) else toml_value(key)


def _apply(values: dict[str, Any], text: str) -> None:
    key, sign, raw = text.partition("=")
    if not sign or not key.strip():
        raise ConfigError(f"--set {text!r} is not of the form a.b=value.", hint="Example: --set train.seed=7")
    try:
        value = tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        value = raw.strip()  # a bare word is a string: --set model.name=laptop
    *path, last = key.strip().split(".")
    table = values
    for part in path:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {text!r}: {part!r} is a value, not a table.")
    table[last] = value


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    if isinstance(value, list):
        return tuple(_tuples(item) for item in value)
    return value


def _explain(error: ValidationError, schema: type[Section], where: str) -> str:
    lines = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            known = _known_keys(schema, item["loc"][:-1])
            lines.append(f"{where}: unknown key {key!r}. {nearest(str(item['loc'][-1]), known)}".rstrip())
        elif item["type"] == "missing":
            lines.append(f"{where}: the key {key!r} is required and missing.")
        elif item["type"] == "value_error":
            # A rule of the recipe's own, of a key, a table or the whole: it names what it is about.
            rule = str(item["ctx"]["error"]).rstrip(".")
            lines.append(f"{where}: {key}: {rule}." if key else f"{where}: {rule}.")
        else:
            said = WORDS.get(item["type"], item["msg"]).rstrip(".")
            lines.append(f"{where}: {key} = {item['input']!r}: {said}.")
    return "\n".join(lines)


def _known_keys(schema: type[Section], path: tuple[int | str, ...]) -> list[str]:
    current: type[Section] | None = schema
    for part in path:
        if isinstance(part, int) or current is None:
            continue
        info = current.model_fields.get(part)
        current = _section_of(info.annotation) if info else None
    return [info.alias or name for name, info in current.model_fields.items()] if current else []


def _section_of(annotation: Any) -> type[Section] | None:
    if isinstance(annotation, type):
        return annotation if issubclass(annotation, Section) else None
    for inner in typing.get_args(annotation):
        found = _section_of(inner)
        if found is not None:
            return found
    return None


def _type_name(annotation: Any) -> str:
    if annotation is type(None):
        return "unset"
    if isinstance(annotation, type) and not typing.get_args(annotation):
        return "table" if issubclass(annotation, Section) else annotation.__name__
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " | ".join(repr(choice) for choice in inner)
    if origin is tuple:
        return f"list of {_type_name(inner[0])}"
    if origin is dict:
        return f"table of {_type_name(inner[1])}"
    if origin in (typing.Union, types.UnionType):
        return " | ".join(_type_name(part) for part in inner)
    if origin is typing.Annotated:
        return _type_name(inner[0])
    return str(annotation)


def _default(info: Any) -> Any:
    value = info.get_default(call_default_factory=True)
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else value


def _write_table(table: dict[str, Any], path: tuple[str, ...], lines: list[str]) -> None:
    plain = {key: value for key, value in table.items() if not isinstance(value, dict)}
    if path and plain:
        lines.extend(["", f"[{'.'.join(map(_toml_key, path))}]"])
    lines.extend(f"{_toml_key(key)} = {toml_value(value)}" for key, value in plain.items())
    for key, value in table.items():
        if isinstance(value, dict):
            _write_table(value, (*path, key), lines)
