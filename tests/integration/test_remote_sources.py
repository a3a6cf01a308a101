"""Sources behind URLs: a store in memory and a real HTTP server give what local files give, or say what is wrong."""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from lapis.data.pipeline import prepare
from lapis.data.readers import plan_parts, read_part
from lapis.data.recipe import DataConfig, HeldoutConfig, TokenizerConfig
from lapis.data.shards import Dataset
from lapis.data.sources import list_inputs
from lapis.errors import InputError, UnavailableError
from lapis.home import Home
from tests.sources import documents, source
from tests.texts import prose, write_corpus

pytest.importorskip("aiohttp", reason="fsspec reads HTTP with aiohttp")


class Plain(SimpleHTTPRequestHandler):
    """What `python -m http.server` answers: whole files, no checksums."""

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


class WithTags(Plain):
    """A server that names the bytes of each file and gives any range of them."""

    def send_head(self):  # type: ignore[no-untyped-def]
        """The head of an answer, and the file set to the beginning of what is asked for."""
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            return super().send_head()
        content = path.read_bytes()
        low, high = 0, len(content) - 1
        if asked := self.headers.get("Range"):
            first, last = asked.removeprefix("bytes=").split("-")
            low, high = int(first), min(int(last or high), high)
        self.send_response(206 if asked else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{hashlib.md5(content).hexdigest()}"')
        self.send_header("Content-Length", str(high - low + 1))
        if asked:
            self.send_header("Content-Range", f"bytes {low}-{high}/{len(content)}")
        self.end_headers()
        part = path.open("rb")
        part.seek(low)
        return _Limited(part, high - low + 1)


class _Limited:
    """The first bytes of a file."""

    def __init__(self, file, size):  # type: ignore[no-untyped-def]
        self._file, self._left = file, size

    def read(self, size: int = -1) -> bytes:
        """At most what is left."""
        block = self._file.read(self._left if size < 0 else min(size, self._left))
        self._left -= len(block)
        return bytes(block)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files of several formats."""
    root = write_corpus(tmp_path / "texts", 30)
    rows = [{"text": prose(100 + n)} for n in range(20)]
    (root / "more").mkdir()
    (root / "more" / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (root / "more" / "packed.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": prose(200)}).encode()))
    parquet.write_table(pa.table({"text": [prose(300 + n) for n in range(20)]}), root / "rows.parquet")
    return root


@pytest.fixture(params=[Plain, WithTags])
def server(request: pytest.FixtureRequest, folder: Path) -> Iterator[str]:
    """A real HTTP server over the folder; its URL."""
    serving = ThreadingHTTPServer(("127.0.0.1", 0), partial(request.param, directory=str(folder)))
    thread = threading.Thread(target=serving.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{serving.server_port}/"
    serving.shutdown()
    thread.join()
    serving.server_close()


@pytest.fixture
def memory(folder: Path) -> Iterator[str]:
    """The folder's files in memory; their URL."""
    files = fsspec.filesystem("memory")
    files.put(str(folder), "/store/texts", recursive=True)
    yield "memory://store/texts/"
    files.rm("/store", recursive=True)


def made(path: Path | str, home: Path) -> Dataset:
    data = DataConfig(sources=(source(path, name="texts"),), heldout=HeldoutConfig(min_bytes=2000))
    return prepare(data, TokenizerConfig(vocab_size=400), Home(home), workers=1)


def files(dataset: Dataset) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in dataset.folder.iterdir() if path.name != "report.json"}


def test_the_same_bytes_give_the_same_dataset_wherever_they_lie(
    folder: Path, memory: str, server: str, tmp_path: Path
) -> None:
    local = made(folder, tmp_path / "a")
    assert local.manifest["documents"] > 60
    for n, url in enumerate((memory, server)):
        assert files(made(url, tmp_path / str(n))) == files(local)


def test_one_file_and_a_pattern_are_read_as_they_are_locally(folder: Path, memory: str, server: str) -> None:
    for inner in ("more/rows.jsonl", "rows.parquet", "more/*.jsonl*", "*.parquet", "0001.txt"):
        local = documents(source(folder / inner, name="x"))
        assert local
        for url in (memory, server):
            assert documents(source(url + inner, name="x")) == local


@pytest.mark.parametrize("server", [WithTags], indirect=True)
def test_a_checksum_of_the_store_names_a_file(server: str, folder: Path) -> None:
    def identities() -> list[str]:
        return [one.digest for one in list_inputs(DataConfig(sources=(source(server),))).inputs]

    before = identities()
    assert identities() == before
    (folder / "0003.txt").write_text(prose(999))
    assert len(set(identities()) - set(before)) == 1


def test_a_remote_file_that_changes_is_counted_not_mixed(memory: str) -> None:
    parts = plan_parts(list_inputs(DataConfig(sources=(source(memory + "more/rows.jsonl"),))).inputs)
    fsspec.filesystem("memory").pipe("/store/texts/more/rows.jsonl", b'{"text": "another"}')
    (found,) = [one for part in parts for one in read_part(part, 65_536)]
    assert (getattr(found, "reason", ""), getattr(found, "lost", False)) == (
        "changed while it was read",
        True,
    )


def test_what_is_not_there_is_named(memory: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing at memory://store/nowhere"):
        documents(source("memory://store/nowhere/"))
    with pytest.raises(InputError, match="Protocol not known"):
        documents(source("s4://bucket/x"))


def test_a_missing_driver_is_named_with_its_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(UnavailableError, match="driver") as caught:
        documents(source("s3://bucket/x/"))
    assert caught.value.hint == "pip install s3fs"


def test_a_store_that_does_not_answer_is_an_error_not_an_empty_source(folder: Path) -> None:
    serving = ThreadingHTTPServer(("127.0.0.1", 0), partial(Plain, directory=str(folder)))
    port = serving.server_port
    serving.server_close()
    with pytest.raises(UnavailableError, match="could not be read"):
        documents(source(f"http://127.0.0.1:{port}/0001.txt"))


@pytest.mark.parametrize("server", [Plain], indirect=True)
def test_a_file_that_is_removed_meanwhile_is_counted(server: str, folder: Path) -> None:
    parts = plan_parts(list_inputs(DataConfig(sources=(source(server + "more/rows.jsonl"),))).inputs)
    shutil.rmtree(folder / "more")
    (found,) = [one for part in parts for one in read_part(part, 65_536)]
    assert getattr(found, "reason", "") == "vanished while it was read"


def test_a_server_that_goes_away_meanwhile_ends_the_run(folder: Path) -> None:
    serving = ThreadingHTTPServer(("127.0.0.1", 0), partial(Plain, directory=str(folder)))
    thread = threading.Thread(target=serving.serve_forever)
    thread.start()
    url = f"http://127.0.0.1:{serving.server_port}/more/rows.jsonl"
    (part,) = plan_parts(list_inputs(DataConfig(sources=(source(url),))).inputs)
    serving.shutdown()
    thread.join()
    serving.server_close()
    with pytest.raises(UnavailableError, match="could not be read"):
        list(read_part(part, 65_536))
