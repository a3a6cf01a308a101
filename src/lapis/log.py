"""What happened: events.jsonl (one JSON object per fact) and the progress of long work in the terminal."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from lapis.errors import StorageError
from lapis.storage import storage_errors

logger = logging.getLogger("lapis")


class Progress(Protocol):
    """Where long work reports to: `done` of `total` units, and a short text beside it."""

    def __call__(self, done: float, total: float | None = None, text: str = "") -> None: ...


def bytes_text(count: float) -> str:
    """A number of bytes in the unit that fits it: 999 bytes, 1.0 kB, 123 MB."""
    units = ("bytes", "kB", "MB", "GB", "TB")
    power = min(len(units) - 1, (len(str(int(count))) - 1) // 3)
    value = count / 1000**power
    return f"{value:,.1f} {units[power]}" if power and value < 100 else f"{value:,.0f} {units[power]}"


def silent(done: float, total: float | None = None, text: str = "") -> None:
    """A Progress that shows nothing."""


class EventLog:
    """Append-only events.jsonl. Each line is one object with `time` (seconds since 1970), `event` and its facts."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._warned = False  # that an event could not be noted

    def note(self, event: str, **facts: Any) -> None:
        """Append an event that its writer can do without: while none can be written, a first warning says so."""
        try:
            self.write(event, **facts)
        except StorageError as error:
            if not self._warned:
                logger.warning("what happens is not written down: %s", error.message)
            self._warned = True
        else:
            self._warned = False

    def write(self, event: str, **facts: Any) -> None:
        """Append one event as one line, after a line that a killed writer left torn too. Raises StorageError."""
        line = json.dumps({"time": round(time.time(), 3), "event": event, **facts}, allow_nan=False) + "\n"
        with storage_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab+") as file:
                if file.tell() and file.seek(-1, os.SEEK_END) >= 0 and file.read(1) != b"\n":
                    line = "\n" + line
                file.write(line.encode())

    def read(self, event: str | None = None) -> list[dict[str, Any]]:
        """All events in order, or those of one name; a torn last line (killed writer) is left out."""
        if not self.path.exists():
            return []
        events = []
        for line in self.path.read_bytes().splitlines():
            try:
                fact = json.loads(line)
            except ValueError:
                continue  # only the line a writer was killed in can be torn
            if event is None or fact["event"] == event:
                events.append(fact)
        return events


class UntoldEvents(EventLog):
    """Reads like EventLog and writes nothing: of several ranks one tells."""

    def write(self, event: str, **facts: Any) -> None:
        """Nothing."""


@contextmanager
def progress(title: str, unit: str = "", stream: Any = None) -> Iterator[Progress]:
    """Show long work: a live line in a terminal, one plain line every few seconds elsewhere."""
    stream = stream or sys.stderr
    if stream.isatty():
        with _live(title, unit, stream) as report:
            yield report
    else:
        yield _plain(title, unit, stream)


@contextmanager
def _live(title: str, unit: str, stream: Any) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bar

    columns = [  # the text says what there is to say, the time left too; all fits into 80 columns
        TextColumn("{task.description:<8}"),
        BarColumn(bar_width=8),
        TextColumn("{task.fields[text]}"),
    ]
    with Bar(*columns, console=Console(file=stream), transient=True) as bar:
        task = bar.add_task(title, total=None, text="")

        def report(done: float, total: float | None = None, text: str = "") -> None:
            bar.update(task, completed=done, total=total, text=text or _amount(done, total, unit))

        yield report


def _plain(title: str, unit: str, stream: Any, every: float = 5.0) -> Progress:
    last = time.monotonic()

    def report(done: float, total: float | None = None, text: str = "") -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= every:
            last = now
            print(f"{title}: {text or _amount(done, total, unit)}", file=stream, flush=True)

    return report


def _amount(done: float, total: float | None, unit: str) -> str:
    return f"{done:,.0f}{f' of {total:,.0f}' if total else ''} {unit}".strip()
