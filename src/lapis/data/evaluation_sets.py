"""Evaluation sets as the items that must not be trained on: read from the files that a recipe names."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lapis.data.recipe import EvaluationSet
from lapis.errors import InputError
from lapis.hashing import digest_file


@dataclass(frozen=True)
class EvaluationItem:
    """One item: the texts of its columns, in the order of the recipe, the question first."""

    name: str
    columns: tuple[str, ...]

    @property
    def text(self) -> str:
        """All of it, a column a line."""
        return "\n".join(self.columns)


def set_facts(wanted: EvaluationSet) -> dict[str, Any]:
    """What a set is known by: its file's digest and the columns. Raises InputError if it is not there."""
    path = Path(wanted.path).expanduser()
    if not path.is_file():
        raise InputError(
            f"The evaluation set {wanted.path} is no file.",
            hint="Name .jsonl, .parquet or .txt files in [[data.decontamination.sets]].",
        )
    return {"sha256": digest_file(path), "columns": list(wanted.columns), "ending": path.suffix.lower()}


def read_items(wanted: EvaluationSet) -> list[EvaluationItem]:
    """The items of a set. Raises InputError for a file that does not have the columns, or no item."""
    path = Path(wanted.path).expanduser()
    read = {".jsonl": _json_lines, ".parquet": _parquet, ".txt": _paragraphs}.get(path.suffix.lower())
    if read is None:
        raise InputError(
            f"{path} is no evaluation set: its ending is {path.suffix or 'missing'}.",
            hint="It can be .jsonl, .parquet or .txt with a blank line between items.",
        )
    items = []
    for number, values in read(path, wanted.columns):
        columns = tuple(text for text in map(_text, values) if text.strip())
        if columns:
            items.append(EvaluationItem(f"{path.name}#{number}", columns))
    if not items:
        raise InputError(f"{path} has no item with text.", hint="Check `columns` of the evaluation set.")
    return items


def _json_lines(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, list[Any]]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                yield number, [row[name] for name in _named(path, columns)]
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(
                    f"Line {number} of {path} cannot be used: {error!r}.",
                    hint="Each line is a JSON object that has all the `columns` of the evaluation set.",
                ) from error


def _parquet(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, list[Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    try:
        table = parquet.read_table(path, columns=list(_named(path, columns)))
        values = [table[name].to_pylist() for name in columns]
    except (pa.ArrowException, KeyError, OSError) as error:
        raise InputError(
            f"{path} cannot be read: {error}.", hint="Check `columns` of the evaluation set."
        ) from error
    for number, row in enumerate(zip(*values, strict=True), 1):
        yield number, list(row)


def _paragraphs(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, list[Any]]]:
    for number, part in enumerate(path.read_text(encoding="utf-8").split("\n\n"), 1):
        yield number, [part]


def _named(path: Path, columns: tuple[str, ...]) -> tuple[str, ...]:
    if not columns:
        raise InputError(
            f"Which columns of {path} are the items is not said.",
            hint='For example: columns = ["question", "choices"], the question first.',
        )
    return columns


def _text(value: Any) -> str:
    """A value as text: lists (of choices) and objects line by line."""
    if value is None:
        return ""
    if isinstance(value, list | tuple):
        return "\n".join(map(_text, value))
    if isinstance(value, dict):
        return "\n".join(map(_text, value.values()))
    return str(value)
