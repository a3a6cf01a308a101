"""Records of 500 MB in every format that has records: counted, passed in bounded memory, and the next one is read."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

SIZE = 500 << 20
READ = """
import sys
from lapis.data.formats.part import Skip
from lapis.data.readers import plan_parts, read_part
from lapis.data.recipe import DataConfig, SourceConfig
from lapis.data.sources import list_inputs
for part in plan_parts(list_inputs(DataConfig(sources=(SourceConfig(path=sys.argv[1]),))).inputs):
    for one in read_part(part, 65_536):
        print(one.reason if isinstance(one, Skip) else one.text)
print(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
"""
WARC = (
    "WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Record-ID: <urn:uuid:0>\r\nContent-Type: {content}\r\n"
    "Content-Length: {length}\r\n\r\n"
)


def write(path: Path, begin: bytes, end: bytes) -> None:
    """A file with 500 MB of zeros in the middle, which take no room on disk."""
    with path.open("wb") as file:
        file.write(begin)
        file.seek(len(begin) + SIZE)
        file.write(end)


def read(path: Path) -> tuple[list[str], float]:
    """What is read of a file by a fresh process, and its peak memory in MiB."""
    done = subprocess.run([sys.executable, "-c", READ, str(path)], capture_output=True, text=True, check=True)
    *found, peak = done.stdout.splitlines()
    return found, int(peak) / 1024


def test_a_json_line_of_500_megabytes(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", b'{"text": "first"}\n{"text": "', b'"}\n{"text": "last"}\n')
    found, peak = read(tmp_path / "a.jsonl")
    assert found == ["first", "record too long", "last"]
    assert peak < 400


@pytest.mark.skipif(find_spec("fastwarc") is None, reason="lapis[html] is not installed")
def test_a_page_of_500_megabytes(tmp_path: Path) -> None:
    write(tmp_path / "a.html", b"<html><body>", b"</body></html>")
    found, peak = read(tmp_path / "a.html")
    assert found == ["record too long"]
    assert peak < 400


@pytest.mark.skipif(find_spec("fastwarc") is None, reason="lapis[html] is not installed")
def test_a_web_record_of_500_megabytes(tmp_path: Path) -> None:
    http = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n"
    kind = {"kind": "response", "content": "application/http; msgtype=response"}
    begin = WARC.format(length=len(http) + SIZE, **kind).encode() + http
    end = (
        b"\r\n\r\n"
        + WARC.format(length=4, kind="conversion", content="text/plain").encode()
        + b"last\r\n\r\n"
    )
    write(tmp_path / "a.warc", begin, end)
    found, peak = read(tmp_path / "a.warc")
    assert found == ["record too long", "last"]
    assert peak < 400
