"""A batch's input file: one request a line, all of them looked at before the first one runs. Pure but for reading."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import IO, Any

from lapis.errors import InputError
from lapis.gateway.strict_json import fields_once

MAX_LINES = 50_000
MAX_BYTES = 200_000_000  # of the file
MAX_LINE = 8 << 20  # bytes: what a request of its own may have
MAX_ID = 512  # characters of a custom_id
MAX_ERRORS = 100  # that are told


@dataclass(frozen=True)
class LineError:
    """What is wrong with a line of an input file, or with all of it."""

    code: str
    message: str
    line: int | None = None  # from 1
    param: str | None = None

    def facts(self) -> dict[str, Any]:
        """As it stands in a batch's `errors`."""
        return asdict(self)


@dataclass(frozen=True)
class Line:
    """Where a request stands in the file; `number` counts from 1."""

    number: int
    start: int
    size: int
    custom_id: str
    model: str


@dataclass
class BatchInput:
    """The requests of a file, or what is wrong with it."""

    lines: list[Line] = field(default_factory=list)
    errors: list[LineError] = field(default_factory=list)


def read_input(file: IO[bytes], endpoint: str) -> BatchInput:
    """All lines of a file for one endpoint. It stops after MAX_ERRORS wrong ones."""
    found = BatchInput()
    seen: dict[str, int] = {}
    for number, start, raw in _lines(file):
        if len(found.lines) == MAX_LINES:
            found.errors.append(
                LineError("too_many_requests", f"A batch has at most {MAX_LINES:,} requests.", number)
            )
        if len(found.errors) >= MAX_ERRORS:
            return found
        wanted, error = _request(raw, endpoint)
        if wanted is None:
            assert error is not None
            found.errors.append(LineError(error[0], error[1], number, error[2]))
            continue
        custom_id: str = wanted["custom_id"]
        if custom_id in seen:
            message = f"The custom_id {custom_id[:80]!r} stands in line {seen[custom_id]} already."
            found.errors.append(LineError("duplicate_custom_id", message, number, "custom_id"))
            continue
        seen[custom_id] = number
        found.lines.append(Line(number, start, len(raw), custom_id, wanted["body"]["model"]))
    if not found.lines and not found.errors:
        found.errors.append(LineError("empty_file", "The input file has no requests."))
    return found


def body_of(file: IO[bytes], line: Line) -> bytes:
    """The body of a request, read again from a file that was found right."""
    raw = os.pread(file.fileno(), line.size, line.start)  # many lines are read at once
    return json.dumps(json.loads(raw)["body"]).encode()


def _lines(file: IO[bytes]) -> Iterator[tuple[int, int, bytes]]:
    """Number, place and bytes of every line that is not blank; of one that is too long, only the beginning."""
    number, start = 0, 0
    while raw := file.readline(MAX_LINE + 1):
        number += 1
        size = len(raw)
        while len(raw) > MAX_LINE and not raw.endswith(b"\n") and (more := file.readline(MAX_LINE)):
            size += len(more)
            if more.endswith(b"\n"):
                break
        content = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
        if content.strip():
            yield number, start + size - len(content) if size == len(raw) else start, content
        start += size


def _request(raw: bytes, endpoint: str) -> tuple[dict[str, Any] | None, tuple[str, str, str | None] | None]:
    if len(raw) > MAX_LINE:
        return None, ("line_too_long", f"A line has at most {MAX_LINE:,} bytes.", None)
    try:
        wanted = json.loads(raw, object_pairs_hook=fields_once)
    except InputError as error:
        return None, ("invalid_json_line", error.message, error.param)
    except (ValueError, RecursionError):
        return None, ("invalid_json_line", "The line is not JSON.", None)
    wrong = _wrong(wanted, endpoint)
    return (None, wrong) if wrong is not None else (wanted, None)


def _wrong(wanted: Any, endpoint: str) -> tuple[str, str, str | None] | None:
    if not isinstance(wanted, dict):
        return "invalid_json_line", "The line is not a JSON object.", None
    missing = next((name for name in ("custom_id", "method", "url", "body") if name not in wanted), None)
    if missing is not None:
        return "missing_required_parameter", f"The field {missing!r} is required and missing.", missing
    custom_id, body = wanted["custom_id"], wanted["body"]
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_ID:
        return "invalid_custom_id", f"custom_id must be a text of 1 to {MAX_ID} characters.", "custom_id"
    if any("\ud800" <= letter <= "\udfff" for letter in custom_id):
        return (
            "invalid_custom_id",
            "custom_id has half of a surrogate pair, which is no character.",
            "custom_id",
        )
    if wanted["method"] != "POST":
        return "invalid_method", "method must be 'POST'.", "method"
    if wanted["url"] != endpoint:
        return "invalid_url", f"url must be the batch's endpoint, {endpoint!r}.", "url"
    if not isinstance(body, dict):
        return "invalid_request", "body must be a JSON object.", "body"
    if not isinstance(body.get("model"), str):
        return "missing_required_parameter", "The field 'body.model' is required and missing.", "body.model"
    if body.get("stream"):
        return "invalid_request", "Answers in a batch are not streamed.", "body.stream"
    return None
