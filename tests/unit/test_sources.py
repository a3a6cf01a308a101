"""Sources: every format, every kind of broken file, in an order that nobody's listing decides."""

from __future__ import annotations

import gzip
import json
import os
from importlib.util import find_spec
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import zstandard

from lapis.data.document import Document
from lapis.data.environment import environment_files
from lapis.data.formats.part import Note, Skip
from lapis.data.readers import plan_parts, read_part
from lapis.data.recipe import DataConfig, SourceConfig
from lapis.data.sources import list_inputs
from lapis.errors import InputError, UnavailableError
from tests.sources import documents, read, skips, source
from tests.texts import prose, write_corpus

needs_html = pytest.mark.skipif(
    find_spec("resiliparse") is None or find_spec("fastwarc") is None, reason="lapis[html] is not installed"
)

RECORDS = [{"text": prose(n, 30), "lic": f"L{n % 2}", "kind": "code" if n == 3 else "x"} for n in range(6)]


def write_jsonl(path: Path) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in RECORDS).encode()


def test_the_listing_tells_how_many_files_it_has_looked_at(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(prose(1, 30))
    told: list[str] = []
    config = DataConfig(sources=(source(tmp_path),))
    list_inputs(config, lambda done, total=None, text="": told.append(text))
    assert told == ["1 of 2 files listed", "2 of 2 files listed"]


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_rows_come_with_text_licence_and_kind(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows{ending}"
    plain = write_jsonl(path)
    match path.suffix:
        case ".gz":
            path.write_bytes(gzip.compress(plain))
        case ".zst":
            path.write_bytes(zstandard.compress(plain[:100]) + zstandard.compress(plain[100:]))
        case ".parquet":
            parquet.write_table(pa.Table.from_pylist(RECORDS), path, row_group_size=4)
        case _:
            path.write_bytes(plain)
    found = documents(source(path, licence_column="lic", kind_column="kind", name="rows"))
    assert [document.text for document in found] == [record["text"] for record in RECORDS]
    assert [document.licence for document in found] == ["L0", "L1"] * 3
    assert [document.kind for document in found] == ["prose"] * 3 + ["code"] + ["prose"] * 2
    assert len({document.path for document in found}) == 6
    assert {document.source for document in found} == {"rows"}


def test_spans_of_a_big_file_give_each_line_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(write_jsonl(path))
    for size in (1, 7, 100, 333):
        monkeypatch.setattr("lapis.data.formats.part.SPAN_BYTES", size)
        assert [one.text for one in documents(source(path))] == [record["text"] for record in RECORDS]


def test_parquet_is_cut_into_spans_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.parquet"
    parquet.write_table(pa.Table.from_pylist(RECORDS), path, row_group_size=4)
    monkeypatch.setattr("lapis.data.formats.part.SPAN_BYTES", 200)
    parts = plan_parts(list_inputs(DataConfig(sources=(source(path),))).inputs)
    assert len(parts) > 2
    assert [one.path for one in documents(source(path))] == [f"rows.parquet#{n}" for n in range(6)]


def test_a_row_group_is_read_in_any_order_of_its_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lapis.data.formats.parquet.BATCH_ROWS", 7)
    monkeypatch.setattr("lapis.data.formats.part.SPAN_BYTES", 1000)
    rows = [{"text": prose(n)} for n in range(200)]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet", row_group_size=90)
    parts = plan_parts(list_inputs(DataConfig(sources=(source(tmp_path / "rows.parquet"),))).inputs)
    assert len(parts) > 12
    orders = [
        [*range(len(parts))],
        [*range(len(parts))][::-1],
        [*range(0, len(parts), 2)],
        [3, 4, 3, 9, 1, 2],
    ]
    for order in orders:
        for part in (parts[n] for n in order):
            first = part.row_group * 90
            found = [one.text for one in read_part(part, 10_000) if isinstance(one, Document)]
            assert found == [row["text"] for row in rows[first + part.start : first + part.stop]]


def test_a_parquet_file_that_is_written_again_is_not_read_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lapis.data.formats.part.SPAN_BYTES", 1000)
    path = tmp_path / "rows.parquet"
    table = pa.Table.from_pylist([{"text": prose(n)} for n in range(50)])
    parquet.write_table(table, path)
    first, second, *_ = plan_parts(list_inputs(DataConfig(sources=(source(path),))).inputs)
    assert all(isinstance(one, Document) for one in read_part(first, 10_000))
    path.unlink()
    parquet.write_table(table.slice(1), path)
    assert [one.reason for one in read_part(second, 10_000)] == ["changed while it was read"]


def test_broken_records_are_counted_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    lines = [
        b'{"text": "a"}',
        b"{",
        b'{"text": 7}',
        b"[]",
        b'{"other": 1}',
        b"\xff\xfe",
        b"",
        b'{"text": "b\\ud800"}',
    ]
    path.write_bytes(b"\n".join(lines))
    assert [one.text for one in documents(source(path))] == ["a", "b\ufffd"]
    assert [reason for reason, _ in skips(source(path))] == [
        "broken record", "no text in 'text'", "broken record", "no text in 'text'", "broken record",
    ]  # fmt: skip


def test_a_record_that_is_too_long_is_skipped_not_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lapis.data.formats.part.MAX_RECORD", 1000)
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "x" * 5000}) + "\n" + json.dumps({"text": "short"}) + "\n")
    assert [one.text for one in documents(source(path))] == ["short"]
    assert skips(source(path)) == [("record too long", "rows.jsonl#0")]


def test_a_folder_gives_its_text_and_code_and_counts_the_rest(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus", 2)
    folder = tmp_path / "corpus"
    (folder / "a.py").write_text("print('hi')\n" * 10)
    (folder / "image.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0" + os.urandom(100))
    (folder / "noise").write_bytes(bytes(range(128, 256)) * 8)
    (folder / "empty.txt").touch()
    (folder / "dangling.txt").symlink_to("nowhere")
    (folder / "no.parquet").write_bytes(b"hello")
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("hidden")
    os.mkfifo(folder / "pipe")
    listing = list_inputs(DataConfig(sources=(source(folder),)))
    assert {item.name for item in listing.inputs} == {"0000.txt", "0001.txt", "a.py"}
    assert listing.step.reasons == {"binary": 2, "empty": 1, "unreadable": 2, "no parquet": 1}
    assert {one.path: one.kind for one in documents(source(folder))} == {
        "0000.txt": "prose", "0001.txt": "prose", "a.py": "code",
    }  # fmt: skip


def test_the_order_of_files_is_their_own(tmp_path: Path) -> None:
    write_corpus(tmp_path / "a", 10)
    write_corpus(tmp_path / "b", 10, first=100)
    a, b = source(tmp_path / "a"), source(tmp_path / "b")
    one, other = documents(a, b), documents(b, a)
    assert one == other
    assert [document.path for document in one] != sorted(document.path for document in one)


def test_a_limit_takes_the_first_files_of_that_order(tmp_path: Path) -> None:
    write_corpus(tmp_path / "a", 30)
    everything = documents(source(tmp_path / "a"))
    some = documents(source(tmp_path / "a"), max_bytes=5000)
    assert 2 < len(some) < 10
    assert some == everything[: len(some)]


def test_invalid_utf8_is_repaired_if_it_is_little_and_skipped_if_much(tmp_path: Path) -> None:
    text = prose(1).encode()
    (tmp_path / "little.txt").write_bytes(text[:100] + b"\xff" + text[100:])
    (tmp_path / "much.txt").write_bytes("Füße, Öl und Übermut: größer als je. ".encode("latin-1") * 20)
    (tmp_path / "fine.txt").write_text("A replacement character \ufffd that was meant. " * 5)
    found = read(DataConfig(sources=(source(tmp_path),)))
    assert [one.path for one in found if isinstance(one, Skip)] == ["much.txt"]
    assert [one for one in found if isinstance(one, Note)] == [Note("invalid bytes replaced")]
    texts = {one.path: one.text for one in found if isinstance(one, Document)}
    assert texts["little.txt"] == (text[:100].decode() + "\ufffd" + text[100:].decode())


def test_utf16_with_its_mark_is_read(tmp_path: Path) -> None:
    (tmp_path / "windows.txt").write_bytes("Grüße aus 東京".encode("utf-16"))
    assert documents(source(tmp_path))[0].text.lstrip("\ufeff") == "Grüße aus 東京"


def test_a_compressed_text_keeps_the_kind_of_its_name(tmp_path: Path) -> None:
    (tmp_path / "a.py.gz").write_bytes(gzip.compress(b"x = 1\n" * 20))
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"some text")[:-6])
    (tmp_path / "c.bin.gz").write_bytes(gzip.compress(b"\0\1\2" * 20))
    found = read(DataConfig(sources=(source(tmp_path),)))
    assert [(one.path, one.kind) for one in found if isinstance(one, Document)] == [("a.py.gz", "code")]
    assert {one.path: one.reason for one in found if isinstance(one, Skip)} == {
        "b.txt.gz#0": "broken archive", "c.bin.gz": "binary",
    }  # fmt: skip


def test_a_file_that_vanishes_or_changes_is_counted(tmp_path: Path) -> None:
    write_corpus(tmp_path, 4)
    parts = plan_parts(list_inputs(DataConfig(sources=(source(tmp_path),))).inputs)
    (tmp_path / "0000.txt").unlink()
    (tmp_path / "0001.txt").write_text("another length")
    original = (tmp_path / "0002.txt").read_text()
    (tmp_path / "0002.txt").write_text(original.swapcase())  # the same length
    found = [one for part in parts for one in read_part(part, 65_536)]
    assert {one.path: (one.reason, one.lost) for one in found if isinstance(one, Skip)} == {
        "0000.txt": ("vanished while it was read", True),
        "0001.txt": ("changed while it was read", True),
        "0002.txt": ("changed while it was read", True),
    }
    assert [one.path for one in found if isinstance(one, Document)] == ["0003.txt"]


def test_long_texts_are_cut_at_borders(tmp_path: Path) -> None:
    text = "".join(prose(n) for n in range(20))
    (tmp_path / "book.txt").write_text(text)
    found = documents(source(tmp_path), document_chars=5000)
    assert "".join(one.text for one in found) == text
    assert all(len(one.text) <= 5000 and one.text.endswith("\n") for one in found)
    assert [one.path for one in found[:3]] == ["book.txt", "book.txt#2", "book.txt#3"]


@needs_html
def test_html_gives_its_main_text(tmp_path: Path) -> None:
    article = "<p>".join(prose(n, 60) for n in range(4))
    head, body = "<title>T</title><script>bad()</script>", f"<nav>Menu</nav><main><p>{article}</main>"
    (tmp_path / "a.html").write_text(f"<html><head>{head}</head><body>{body}</body></html>")
    (one,) = documents(source(tmp_path))
    assert prose(0, 60).split()[0] in one.text
    assert "bad()" not in one.text


@needs_html
def test_warc_gives_its_html_responses(tmp_path: Path) -> None:
    body = (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n<html><body><p>"
        + prose(1).encode()
        + b"</p></body></html>"
    )
    head = (
        b"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: http://example.org/a\r\n"
        b"WARC-Record-ID: <urn:uuid:0>\r\nContent-Type: application/http; msgtype=response\r\n"
        b"Content-Length: " + str(len(body)).encode() + b"\r\n\r\n"
    )
    (tmp_path / "a.warc.gz").write_bytes(gzip.compress(head + body + b"\r\n\r\n"))
    (one,) = documents(source(tmp_path, licence="CC0-1.0"))
    assert one.path == "a.warc.gz#0:http://example.org/a"
    assert one.licence == "CC0-1.0"
    assert prose(1).split()[0] in one.text


def test_html_without_its_packages_is_counted_or_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lapis.data.readers._version", lambda package: "missing")
    (tmp_path / "a.html").write_text("<p>text")
    assert skips(source(tmp_path)) == [("HTML needs pip install 'lapis[html]'", "a.html")]
    with pytest.raises(UnavailableError, match="resiliparse") as caught:
        skips(source(tmp_path, format="html"))
    assert "lapis[html]" in caught.value.hint


def test_wrong_paths_columns_and_files_are_named(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus", 1)
    with pytest.raises(InputError, match="no file or folder") as caught:
        documents(source(tmp_path / "corpsu"))
    assert "corpus" in caught.value.hint
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no files"):
        documents(source(tmp_path / "empty"))
    (tmp_path / "x.parquet").write_bytes(b"not at all")
    with pytest.raises(InputError, match="no parquet file"):
        documents(source(tmp_path / "x.parquet"))
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and no end")
    with pytest.raises(InputError, match="no readable parquet file"):
        documents(source(tmp_path / "cut.parquet"))
    parquet.write_table(pa.table({"texts": ["a"]}), tmp_path / "y.parquet")
    with pytest.raises(InputError, match="no column 'text'") as caught:
        documents(source(tmp_path / "y.parquet"))
    assert "texts" in caught.value.hint


def test_a_folder_of_binary_files_is_an_error(tmp_path: Path) -> None:
    for n in range(3):
        (tmp_path / f"{n}.bin").write_bytes(os.urandom(50) + b"\0")
    with pytest.raises(InputError, match=r"no text in .*: binary 3"):
        documents(source(tmp_path))


def test_two_sources_of_one_name_cannot_differ_in_priority(tmp_path: Path) -> None:
    write_corpus(tmp_path, 1)
    one = SourceConfig(path=str(tmp_path), name="x", priority=0)
    with pytest.raises(InputError, match="called 'x'"):
        documents(one, SourceConfig(path=str(tmp_path), name="x", priority=1))


def test_the_environment_has_texts_with_licences() -> None:
    found = {name: licence for name, _, licence in environment_files()}
    assert found["stdlib/json/__init__.py"] == "PSF-2.0"
    assert found["site-packages/click/__init__.py"] == "BSD-3-Clause"
    assert any(name.endswith("/METADATA") for name in found)
    assert not any("__pycache__" in name for name in found)
