"""Files as streams of bytes, compressed ones unpacked on the way with a limit on how far they may expand."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

from lapis.data.input import Input
from lapis.data.text_files import COMPRESSIONS, ending
from lapis.storage import open_url

UNPACKED = 1 << 20  # bytes unpacked at once
STEP = 4096
MAX_EXPANSION = 200  # times the compressed size; logs and tables reach 50
FREE_EXPANSION = 64 << 20  # bytes that may be unpacked before that is asked
CODECS = {".gz": "gzip", ".zst": "zstd"}


class Broken(Exception):
    """A compressed file that cannot be unpacked further, and after how many bytes."""

    def __init__(self, reason: str, offset: int) -> None:
        super().__init__(reason)
        self.reason, self.offset = reason, offset


class Unpacked(io.RawIOBase):
    """What a compressed file holds. Raises Broken where it is damaged, cut off, or expands beyond reason."""

    def __init__(self, file: IO[bytes], codec: str) -> None:
        import pyarrow

        self._file = _Counted(file)
        self._stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(self._file, mode="r"), codec)
        self._broken: Broken | None = None
        self.given = 0

    @property
    def taken(self) -> int:
        """Compressed bytes read so far."""
        return self._file.taken

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer; less only at the end, or where the damage begins, which the next call raises."""
        if self._broken is not None:
            raise self._broken
        view = memoryview(buffer)
        filled = 0
        while filled < len(view):
            count = self._step(view[filled : filled + STEP])
            filled += count
            self.given += count
            if not count:
                break
        if self._broken is not None and not filled:
            raise self._broken
        return filled

    def _step(self, view: memoryview) -> int:
        """Unpack a little: what the codec has done of a step that fails is lost."""
        try:
            count = int(self._stream.readinto(view))
        except OSError:
            if self._file.failed:
                raise
            self._broken = Broken("broken archive", self.given)
            return 0
        if self.given > FREE_EXPANSION and self.given > MAX_EXPANSION * self.taken:
            self._broken = Broken(f"expands more than {MAX_EXPANSION}-fold", self.given)
            return 0
        return count

    def close(self) -> None:
        """Close the file below too."""
        if not self.closed:
            self._file.close()
        super().close()


class _Counted:
    """A file that counts what is read of it, and knows whether it was the file that failed."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.taken = 0
        self.failed = False

    @property
    def closed(self) -> bool:
        return self._file.closed

    def read(self, size: int) -> bytes:
        try:
            block = self._file.read(size)
        except OSError:
            self.failed = True
            raise
        self.taken += len(block)
        return block

    def close(self) -> None:
        self._file.close()


def compressed(item: Input) -> bool:
    """Whether a file's name says that it is compressed."""
    return ending(item.name) in COMPRESSIONS


def unpacked(item: Input) -> IO[bytes] | Unpacked:
    """A file's bytes as they are stored, or an unbuffered stream of what it holds if it is compressed."""
    file = open_url(item.path)
    return Unpacked(file, CODECS[ending(item.name)]) if compressed(item) else file


@contextmanager
def opened(item: Input) -> Iterator[IO[bytes]]:
    """What a file holds, as a buffered stream."""
    stream = unpacked(item)
    with stream:
        yield io.BufferedReader(stream, UNPACKED) if isinstance(stream, Unpacked) else stream
