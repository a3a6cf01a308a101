"""Forms with one file (multipart/form-data), whose bytes go on as they come: a file is never whole in memory."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from lapis.api.body import CLOSE
from lapis.errors import InputError

FORM_SECONDS = 3600.0  # for the whole form
IDLE_SECONDS = 60.0  # until its next bytes
FIELD_LIMIT = 64 * 1024  # bytes of all fields that are no file
FIELDS = 32
BLOCK = 1 << 20  # bytes that are written at once

Write = Callable[[bytes], None]  # takes the file's bytes, in a thread


@dataclass
class Form:
    """What a form had beside the file's bytes."""

    fields: dict[str, str] = field(default_factory=dict)
    filename: str | None = None  # None: it had no file


async def read_form(request: Request, write: Write, file_field: str, limit: int) -> Form:
    """Read a form, the bytes of its file into `write`.

    Raises HTTPException: 415 for another type, 413 for a file above `limit` bytes, 408 if it comes too slowly;
    InputError for a broken form or another file than `file_field`.
    """
    reader = _Reader(file_field, limit)
    try:
        parser = MultipartParser(_boundary(request), reader.callbacks())  # type: ignore[arg-type]
        async with asyncio.timeout(FORM_SECONDS):
            pieces = request.stream().__aiter__()
            while True:
                try:
                    async with asyncio.timeout(IDLE_SECONDS):
                        data = await pieces.__anext__()
                except StopAsyncIteration:
                    break
                parser.write(data)
                if len(reader.pending) >= BLOCK:
                    await asyncio.to_thread(write, reader.take())
        parser.finalize()
    except FormParserError as error:
        raise InputError(f"The form cannot be read: {error}.") from error
    except ClientDisconnect as error:
        raise InputError("The client hung up while sending the form.") from error
    except TimeoutError as error:
        raise HTTPException(408, "The form came too slowly.", CLOSE) from error
    if not reader.ended:
        raise InputError("The form ends before its last boundary.")
    if reader.pending:
        await asyncio.to_thread(write, reader.take())
    return reader.form


def _boundary(request: Request) -> bytes:
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        shown = kind.decode("latin-1") or "absent"
        raise HTTPException(
            415, f"The content type must be multipart/form-data with a boundary, not {shown}."
        )
    return options[b"boundary"]


class _Reader:
    """The parser's callbacks: fields are kept, the file's bytes wait in `pending`."""

    def __init__(self, file_field: str, limit: int) -> None:
        self.form = Form()
        self.pending = bytearray()
        self.ended = False
        self._file_field = file_field
        self._limit = limit
        self._file_bytes = 0
        self._field_bytes = 0
        self._header = (bytearray(), bytearray())
        self._disposition = b""
        self._name = ""
        self._value = bytearray()
        self._in_file = False

    def callbacks(self) -> dict[str, Callable[..., None]]:
        return {
            "on_part_begin": self._part_begin,
            "on_header_field": lambda data, start, end: self._header[0].extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._header[1].extend(data[start:end]),
            "on_header_end": self._header_end,
            "on_headers_finished": self._headers_finished,
            "on_part_data": self._part_data,
            "on_part_end": self._part_end,
            "on_end": self._end,
        }

    def take(self) -> bytes:
        taken = bytes(self.pending)
        self.pending.clear()
        return taken

    def _part_begin(self) -> None:
        self._disposition = b""
        self._value = bytearray()

    def _header_end(self) -> None:
        name, value = self._header
        if name.lower() == b"content-disposition":
            self._disposition = bytes(value)
        self._header = (bytearray(), bytearray())

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._name = _text(options.get(b"name", b""), "a field's name")
        self._in_file = b"filename" in options
        if not self._name:
            raise InputError("A part of the form has no name.")
        if not self._in_file:
            return
        if self._name != self._file_field or self.form.filename is not None:
            raise InputError(f"One file is expected, as {self._file_field!r}.", param=self._name[:80])
        self.form.filename = _text(options[b"filename"], "the file's name")

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        if self._in_file:
            self._file_bytes += end - start
            if self._file_bytes > self._limit:
                raise HTTPException(413, f"The file is larger than {self._limit:,} bytes.", CLOSE)
            self.pending += data[start:end]
            return
        self._field_bytes += end - start
        if self._field_bytes > FIELD_LIMIT:
            raise HTTPException(413, f"The form's fields are larger than {FIELD_LIMIT:,} bytes.", CLOSE)
        self._value += data[start:end]

    def _part_end(self) -> None:
        if self._in_file:
            return
        fields = self.form.fields
        if self._name in fields:
            raise InputError(f"The field {self._name[:80]!r} is given twice.", param=self._name[:80])
        if len(fields) >= FIELDS:
            raise InputError(f"The form has more than {FIELDS} fields.")
        fields[self._name] = _text(bytes(self._value), self._name[:80])

    def _end(self) -> None:
        self.ended = True


def _text(raw: bytes, what: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{what} is not UTF-8.") from error
