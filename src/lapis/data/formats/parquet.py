"""Parquet files, by the span of rows of a row group."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lapis.data.formats import part as sizes
from lapis.data.formats.part import Found, Part, record, skipped
from lapis.data.input import Input
from lapis.errors import InputError, nearest
from lapis.storage import open_url

BATCH_ROWS = 1024
BATCH_BYTES = 8 << 20


def spans(item: Input, span: int) -> list[Part]:
    """Spans of rows, none with much more than `span` bytes; a file that cannot be read is one part, which says so."""
    import pyarrow

    try:
        with open_url(item.path) as file:
            facts = _table(file).metadata
            groups = [facts.row_group(n) for n in range(facts.num_row_groups)]
    except (pyarrow.ArrowInvalid, OSError):
        return [Part((item,))]
    parts = []
    for n, group in enumerate(groups):
        pieces = max(1, -(-group.total_byte_size // span))
        step = -(-group.num_rows // pieces) or 1
        for start in range(0, group.num_rows, step):
            parts.append(Part((item,), start, min(start + step, group.num_rows), n))
    return parts


def read(item: Input, part: Part, limit: int) -> Iterator[Found]:
    """A document a row."""
    import pyarrow

    row = 0
    try:
        with _group(item, part) as group:
            if group.missing:
                if part.row_group <= 0 and not part.start:  # one part tells it
                    yield skipped(item, f"no column {group.missing[0]!r}")
                return
            row = group.first
            for batch in group.rows(part.start, part.stop):
                yield from rows(item, batch, row + part.start, limit)
                row += batch.num_rows
    except (pyarrow.ArrowInvalid, OSError) as error:
        if getattr(error, "errno", None) is not None:
            raise
        yield skipped(item, "broken parquet", f"{row}" if row else "")


class _Group:
    """A row group that is read forwards, batch by batch: nothing in it can be entered but its first row."""

    def __init__(self, item: Input, number: int) -> None:
        self._file = open_url(item.path)
        try:
            table = _table(self._file)
            self.missing = [name for name in columns(item) if name not in table.schema_arrow.names]
            counts = [table.metadata.row_group(n).num_rows for n in range(number + 1)]
            self.first = sum(counts[:-1])  # rows of the groups before
            self._batches = iter(()) if self.missing else _batches(table, number, columns(item))
        except BaseException:
            self.close()
            raise
        self._count: int = counts[-1]
        self._batch: Any = None
        self.at = 0  # the first row of the batch

    def rows(self, start: int, stop: int) -> Iterator[Any]:
        """The rows of a part that starts in the present batch or after it."""
        while self.at < stop:
            if self._batch is None:
                self._batch = next(self._batches, None)
            if self._batch is None:
                return
            count = self._batch.num_rows
            low, high = max(start - self.at, 0), min(stop - self.at, count)
            if low < high:
                yield self._batch.slice(low, high - low)
            if self.at + count > stop:
                return
            self._batch = None
            self.at += count

    @property
    def ended(self) -> bool:
        """Whether all rows are read."""
        return self.at >= self._count

    def close(self) -> None:
        """Close the file."""
        self._file.close()


_held: dict[
    tuple[str, str, int, tuple[str, ...]], _Group
] = {}  # at most one: whose first part this process read


@contextmanager
def _group(item: Input, part: Part) -> Iterator[_Group]:
    """The row group of a part: the one that an earlier part of it has left open, else opened."""
    key = (item.path, item.state, part.row_group, tuple(columns(item)))
    group = _held.pop(key, None)
    if group is not None and group.at > part.start:
        group.close()
        group = None
    group = group or _Group(item, max(part.row_group, 0))
    try:
        yield group
    except BaseException:
        group.close()
        raise
    if group.ended or group.missing:
        group.close()
        return
    while _held:
        _held.popitem()[1].close()
    _held[key] = group


def rows(item: Input, batch: Any, first: int, limit: int) -> Iterator[Found]:
    """The rows of a batch, of which the first has this number; a text that is too long is never made."""
    import pyarrow
    import pyarrow.compute as compute

    text = batch.column(item.source.text_column)
    if pyarrow.types.is_dictionary(text.type):
        text = text.dictionary_decode()
    if _is_text(text.type):
        long = compute.fill_null(compute.greater(compute.binary_length(text), sizes.MAX_RECORD), False)
        if compute.any(long).as_py():
            for n, too_long in enumerate(long.to_pylist()):
                if too_long:
                    yield skipped(item, "record too long", first + n)
                else:
                    yield from rows(item, batch.slice(n, 1), first + n, limit)
            return
    for n, value in enumerate(batch.select(columns(item)).to_pylist()):
        yield from record(item, f"{item.name}#{first + n}", value, limit)


def columns(item: Input) -> list[str]:
    """The columns that a source names."""
    source = item.source
    named = (source.text_column, source.licence_column, source.kind_column)
    return list(dict.fromkeys(name for name in named if name))


def check_columns(inputs: list[Input]) -> None:
    """Raise InputError if no parquet file of a source has the column of its text: then the recipe is wrong."""
    import pyarrow

    wanted: dict[str, tuple[Input, set[str]]] = {}
    fine: set[str] = set()
    for item in inputs:
        if item.source.name in fine:
            continue
        try:
            with open_url(item.path) as file:
                known = set(_table(file).schema_arrow.names)
        except (pyarrow.ArrowInvalid, OSError) as error:
            if os.path.basename(item.source.path) == item.name:  # the recipe names this very file
                raise InputError(f"{item.path} is no readable parquet file: {error}.") from error
            continue
        if set(columns(item)) <= known:
            fine.add(item.source.name)
        else:
            wanted.setdefault(item.source.name, (item, set()))[1].update(known)
    for name, (item, known) in wanted.items():
        if name not in fine:
            column = next(column for column in columns(item) if column not in known)
            raise InputError(f"{item.path} has no column {column!r}.", hint=nearest(column, sorted(known)))


def _batches(table: Any, number: int, names: list[str]) -> Iterator[Any]:
    """The rows of a row group, in batches of a few MB."""
    group = table.metadata.row_group(number)
    each = max(1, group.total_byte_size // max(1, group.num_rows))
    size = max(1, min(BATCH_ROWS, BATCH_BYTES // each))
    batches: Iterator[Any] = table.iter_batches(batch_size=size, row_groups=[number], columns=names)
    return batches


def _is_text(kind: Any) -> bool:
    import pyarrow

    return bool(pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind))


def _table(file: Any) -> Any:
    import pyarrow.parquet as parquet

    return parquet.ParquetFile(file)
