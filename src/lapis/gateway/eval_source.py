"""The data of an eval run, row by row: from the request itself or from a file of JSON lines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from lapis.errors import InputError
from lapis.gateway.files import FileStore
from lapis.gateway.item_schema import ItemSchema
from lapis.gateway.strict_json import depth, read_json

LARGEST = 100_000  # rows of a run
LINE = 8 << 20  # bytes
# Levels of a source or a row: with what is around it in an answer below 255, where pydantic gives up.
DEPTH = 200
MARK = b"\xef\xbb\xbf"  # with which some programs begin a file
KEYS = {"item", "sample"}


class DataRow(NamedTuple):
    """An item, and the sample to grade where there is one already."""

    item: Mapping[str, Any]
    sample: Mapping[str, Any] | None


def data_rows(source: Mapping[str, Any], files: FileStore, project_id: str) -> Iterator[DataRow]:
    """The rows of a run's source. Raises InputError naming the place, NotFoundError for a file that is gone."""
    if source["type"] == "file_content":
        for number, value in enumerate(source["content"]):
            yield _row(value, f"source.content[{number}]")
        return
    name = source["id"]
    with files.open(project_id, name) as file:
        number = 0
        while line := file.readline(LINE + 1):
            number += 1
            where = f"{name}, line {number:,}"
            if len(line) > LINE:
                raise InputError(f"{where} is longer than {LINE >> 20} MiB.", param="data_source")
            if not line.strip():
                continue
            try:
                value = read_json(line.removeprefix(MARK) if number == 1 else line, "The row")
            except InputError as error:
                raise InputError(f"{where}: {error.message}", param="data_source") from error
            if depth(value) > DEPTH:
                raise InputError(f"{where}: a row is nested deeper than {DEPTH} levels.", param="data_source")
            yield _row(value, where)


def count_rows(source: Mapping[str, Any], files: FileStore, project_id: str, schema: ItemSchema) -> int:
    """How many rows there are, each of them checked. Raises as `data_rows`, and InputError for a wrong item."""
    count = 0
    for count, row in enumerate(data_rows(source, files, project_id), start=1):
        problem = schema.problem(row.item)
        if problem is not None:
            raise InputError(
                f"Row {count:,} does not fit the eval's item schema: {problem}", param="data_source"
            )
        if count > LARGEST:
            raise InputError(f"A run takes at most {LARGEST:,} rows.", param="data_source")
    if not count:
        raise InputError("The data source has no rows.", param="data_source")
    return count


def _row(value: Any, where: str) -> DataRow:
    if not isinstance(value, dict) or not isinstance(value.get("item"), dict):
        raise InputError(
            f'{where}: a row is {{"item": {{…}}}}, with "sample" where it is there.', param="data_source"
        )
    unknown = sorted(value.keys() - KEYS)
    if unknown:
        raise InputError(
            f"{where}: unknown field {unknown[0]!r}; a row has item and sample.", param="data_source"
        )
    sample = value.get("sample")
    if sample is not None and not isinstance(sample, dict):
        raise InputError(f"{where}: the sample is no object.", param="data_source")
    return DataRow(value["item"], sample)
