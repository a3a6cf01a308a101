"""Arrow files, streams or with an index: what `datasets` writes with save_to_disk."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lapis.data.formats.parquet import BATCH_ROWS, columns, rows
from lapis.data.formats.part import Found, Part, byte_spans, skipped
from lapis.data.input import Input
from lapis.storage import open_url

MAGIC = b"ARROW1"
STREAM = b"\xff\xff\xff\xff"  # how every message of a stream begins


def spans(item: Input, span: int) -> list[Part]:
    """Spans of bytes, where the file is local: a batch belongs to the span in which it starts."""
    return [Part((item,))] if "://" in item.path else byte_spans(item, span)


def read(item: Input, part: Part, limit: int) -> Iterator[Found]:
    """A document a row."""
    import pyarrow

    row = 0
    try:
        with _opened(item) as file:
            for place, batch in _batches(file):
                if part.stop >= 0 and place >= part.stop:
                    return
                missing = [name for name in columns(item) if name not in batch.schema.names]
                if missing:
                    yield skipped(item, f"no column {missing[0]!r}")
                    return
                if place >= part.start:
                    for start in range(0, batch.num_rows, BATCH_ROWS):
                        yield from rows(item, batch.slice(start, BATCH_ROWS), row + start, limit)
                row += batch.num_rows
    except (pyarrow.ArrowInvalid, OSError) as error:
        if getattr(error, "errno", None) is not None:
            raise
        if part.stop < 0 or part.stop >= item.size:  # one span tells it
            yield skipped(item, "broken Arrow file", row)


def _opened(item: Input) -> Any:
    """A local file mapped into memory, so that what is passed over costs nothing."""
    import pyarrow

    return open_url(item.path) if "://" in item.path else pyarrow.memory_map(item.path)


def _batches(file: Any) -> Iterator[tuple[int, Any]]:
    """Every batch and where it starts."""
    import pyarrow

    if file.read(len(MAGIC)) == MAGIC:
        file.seek(0)
        table = pyarrow.ipc.open_file(file)
        for n in range(table.num_record_batches):
            yield 0, table.get_batch(n)
        return
    file.seek(0)
    stream = pyarrow.ipc.open_stream(file)
    while True:
        place = file.tell()
        try:
            batch = stream.read_next_batch()
        except StopIteration:
            return
        yield place, batch
