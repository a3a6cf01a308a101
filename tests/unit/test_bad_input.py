"""Bad input: damage is counted with its place, what is sound around it is read, and nothing hangs or grows."""

from __future__ import annotations

import gzip
import json
import os
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import zstandard

from lapis.data.document import Document
from lapis.data.formats.packed import MAX_EXPANSION
from lapis.data.readers import plan_parts, read_part
from lapis.data.recipe import DataConfig
from lapis.data.repair import repair
from lapis.data.sources import list_inputs
from lapis.errors import InputError
from tests.sources import documents, pdf, read, skips, source, warc_record
from tests.texts import prose

needs_html = pytest.mark.skipif(find_spec("fastwarc") is None, reason="lapis[html] is not installed")
TEXTS = [prose(n) for n in range(200)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


@pytest.mark.parametrize(("ending", "pack"), [("gz", gzip.compress), ("zst", zstandard.compress)])
def test_a_truncated_archive_gives_what_comes_before(
    ending: str, pack: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    packed = pack(LINES)
    path = tmp_path / f"rows.jsonl.{ending}"
    path.write_bytes(packed[: int(len(packed) * 0.7)])
    found = documents(source(path))
    assert [one.text for one in found] == TEXTS[: len(found)]
    ((reason, place),) = skips(source(path))
    assert reason == "broken archive"
    read_to = int(place.rpartition("#")[2])
    sizes = [len(line) + 1 for line in LINES.split(b"\n")]
    assert sum(sizes[: len(found)]) <= read_to < sum(sizes[: len(found) + 1])
    assert len(found) > (100 if ending == "gz" else 0)  # zstd unpacks 128 KB at once


def test_a_damaged_archive_is_told_from_a_sound_one(tmp_path: Path) -> None:
    packed = bytearray(gzip.compress(LINES))
    packed[-5] ^= 1  # the checksum
    (tmp_path / "rows.jsonl.gz").write_bytes(packed)
    assert [reason for reason, _ in skips(source(tmp_path))] == ["broken archive"]


@pytest.mark.parametrize("name", ["zeros.jsonl.gz", "zeros.jsonl.zst", "zeros.txt.gz", "text.txt.zst"])
def test_a_bomb_is_stopped_early(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block = (b"a word and " if name.startswith("text") else bytes(10)) * 1_000_000
    member = zstandard.compress(block) if name.endswith("zst") else gzip.compress(block)
    (tmp_path / name).write_bytes(member * 1000)  # 10 GB
    monkeypatch.setattr("lapis.data.formats.packed.FREE_EXPANSION", 8 << 20)
    began = time.process_time()
    reasons = {reason for reason, _ in skips(source(tmp_path))}
    assert reasons <= {f"expands more than {MAX_EXPANSION}-fold", "binary", "record too long"}
    assert reasons
    assert time.process_time() - began < 3


def write_parquet(path: Path, rows: int = 400) -> bytes:
    table = pa.table({"text": [prose(n) for n in range(rows)]})
    parquet.write_table(table, path, row_group_size=100, compression="zstd", use_dictionary=False)
    return path.read_bytes()


def test_a_truncated_parquet_file_is_named_and_the_others_are_read(tmp_path: Path) -> None:
    write_parquet(tmp_path / "fine.parquet", 3)
    whole = write_parquet(tmp_path / "cut.parquet")
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    assert len(documents(source(tmp_path))) == 3
    assert skips(source(tmp_path)) == [("broken parquet", "cut.parquet")]


def test_a_damaged_row_group_costs_its_rows_and_no_others(tmp_path: Path) -> None:
    whole = bytearray(write_parquet(tmp_path / "a.parquet"))
    place = parquet.ParquetFile(tmp_path / "a.parquet").metadata.row_group(1).column(0).data_page_offset
    whole[place + 60 : place + 4000] = os.urandom(3940)
    (tmp_path / "a.parquet").write_bytes(whole)
    found = [one.path for one in documents(source(tmp_path))]
    assert found == [f"a.parquet#{n}" for n in (*range(100), *range(200, 400))]
    assert skips(source(tmp_path)) == [("broken parquet", "a.parquet#100")]


def test_a_truncated_arrow_stream_gives_its_first_batches(tmp_path: Path) -> None:
    table = pa.table({"text": TEXTS})
    path = tmp_path / "a.arrow"
    with pa.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=20)
    path.write_bytes(path.read_bytes()[:-100_000])
    found = documents(source(path))
    assert [one.text for one in found] == TEXTS[: len(found)]
    assert 0 < len(found) < 200
    assert skips(source(path)) == [("broken Arrow file", f"a.arrow#{len(found)}")]


def web_archive() -> list[bytes]:
    kind = {"kind": "conversion", "http": "text/plain"}
    return [warc_record(prose(n).encode(), f"http://{n}", **kind) for n in range(9)]


@needs_html
@pytest.mark.parametrize("span", [1 << 20, 700])
def test_after_a_damaged_web_record_reading_goes_on_with_the_next(
    span: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lapis.data.formats.part.SPAN_BYTES", 4 * span)
    records = web_archive()
    at = sum(map(len, records[:4]))
    for damage in (
        records[4][:100] + bytes(10) + records[4][110:],  # inside
        bytes(8) + records[4][8:],  # its beginning
        b"no record at all" + records[4],  # something between
        records[4][: len(records[4]) // 2],  # cut off
    ):
        (tmp_path / "a.warc.gz").write_bytes(b"".join([*records[:4], damage, *records[5:]]))
        good = [n for n in range(9) if n != 4 or damage.endswith(records[4])]
        assert [one.text for one in documents(source(tmp_path))] == [prose(n) for n in good]
        ((reason, place),) = skips(source(tmp_path))
        assert reason == "broken WARC record"
        assert place.startswith(f"a.warc.gz#{at}")


@needs_html
def test_a_web_archive_that_ends_inside_a_record_says_so(tmp_path: Path) -> None:
    records = web_archive()
    at = sum(map(len, records[:8]))
    for length in (3, 30, len(records[8]) // 2):
        (tmp_path / "a.warc.gz").write_bytes(b"".join(records[:8]) + records[8][:length])
        assert len(documents(source(tmp_path))) == 8
        ((reason, place),) = skips(source(tmp_path))
        assert reason == "broken WARC record"
        assert place.startswith(f"a.warc.gz#{at}")


@needs_html
def test_a_web_record_that_is_too_long_is_passed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lapis.data.formats.part.MAX_RECORD", 5000)
    records = web_archive()
    for size in (20_000, 2_000_000):  # the second is not even unpacked
        long = warc_record(b"<p>" + b"word " * (size // 5), "http://long")
        (tmp_path / "a.warc.gz").write_bytes(records[0] + long + records[1])
        assert [one.text for one in documents(source(tmp_path))] == [prose(0), prose(1)]
        assert skips(source(tmp_path)) == [("record too long", f"a.warc.gz#{len(records[0])}:http://long")]


@needs_html
def test_pages_that_are_nested_deep_do_not_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lapis.data.extract_apart.SECONDS", 0.5)
    text = prose(1)
    (tmp_path / "deep.html").write_text("<body>" + "<div>" * 5000 + text + "</div>" * 5000)
    (tmp_path / "hidden.html").write_text("<body>" + "</p>" * 5000 + "<div></b>" * 4000 + text)
    (tmp_path / "tables.html").write_text("<td><table>t" * 100_000 + text)  # takes minutes
    (tmp_path / "ordinary.html").write_text("<body>" + "<div>" * 100 + text + "</div>" * 100)
    fonts = "".join(f"<p><font size={n}>word" for n in range(2000))  # nobody closes them: it took seconds
    (tmp_path / "fonts.html").write_text(f"<body>{fonts}<p>{text}")
    assert "ordinary.html" in {one.path for one in documents(source(tmp_path))}
    assert sorted(skips(source(tmp_path)))[:3] == [
        ("HTML nested too deep", "deep.html"),
        ("HTML nested too deep", "hidden.html"),
        ("HTML that takes its parser too long, or ends it", "tables.html"),
    ]


@needs_html
def test_a_page_that_was_too_hard_costs_only_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lapis.data.extract_apart.SECONDS", 0.5)
    hard = ("<td><table>t" * 100_000).encode()
    fine = f"<body><p>{prose(1, 20_000)}</p>".encode()
    pages = [warc_record(page, f"http://{n}") for n, page in enumerate((fine, hard, fine, fine))]
    (tmp_path / "a.warc.gz").write_bytes(b"".join(pages))
    found = read(DataConfig(sources=(source(tmp_path),)))
    assert {one.path.rpartition("//")[2][0] for one in found if isinstance(one, Document)} == {"0", "2", "3"}


def test_nul_bytes_are_taken_out_of_records_and_make_a_file_binary(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one\\u0000two"}\n')
    (tmp_path / "b.txt").write_bytes(b"one\0two")
    (one,) = documents(source(tmp_path))
    assert repair(one.text) == "onetwo"
    listing = list_inputs(DataConfig(sources=(source(tmp_path),)))
    assert listing.step.reasons == {"binary": 1}


def test_documents_without_text_are_counted(tmp_path: Path) -> None:
    rows = [{"text": ""}, {"text": " \n\t"}, {"text": None}, {"text": "a"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "b.txt").write_text("\n\n  \n")
    assert [one.text for one in documents(source(tmp_path))] == ["a"]
    reasons = sorted(reason for reason, _ in skips(source(tmp_path)))
    assert reasons == ["no text", "no text", "no text", "no text in 'text'"]


def test_links_that_lead_in_circles_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one.txt").write_text(prose(1))
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "a" / "self").symlink_to("self")
    (tmp_path / "link.txt").symlink_to(tmp_path / "a" / "one.txt")
    listing = list_inputs(DataConfig(sources=(source(tmp_path),)))
    assert {one.name for one in listing.inputs} == {"a/one.txt", "link.txt"}
    assert listing.step.reasons == {"link to a folder": 1, "unreadable": 1}


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_file_that_changes_under_the_reader_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(LINES if name.endswith("l") else gzip.compress(LINES))
    (part,) = plan_parts(list_inputs(DataConfig(sources=(source(path),))).inputs)
    found = read_part(part, 65_536)
    assert isinstance(next(found), Document)
    with path.open("ab") as file:
        file.write(b"more")
    with pytest.raises(InputError, match="changed while it was read"):
        list(found)


def test_archives_are_counted_or_refused_with_what_to_do(tmp_path: Path) -> None:
    for name in ("a.zip", "b.tar.gz", "c.tgz", "d.txt.bz2", "e.jsonl.xz"):
        (tmp_path / name).write_bytes(b"PK\3\4 whatever")
    (tmp_path / "f.txt").write_text(prose(1))
    listing = list_inputs(DataConfig(sources=(source(tmp_path),)))
    assert listing.step.reasons == {"archive, not unpacked": 3, "compression that is not read": 2}
    with pytest.raises(InputError, match="archive, not unpacked") as caught:
        documents(source(tmp_path / "a.zip"))
    assert "Unpack it" in caught.value.hint


@pytest.mark.skipif(find_spec("pypdfium2") is None, reason="lapis[pdf] is not installed")
def test_a_pdf_that_is_cut_or_made_of_noise_is_counted(tmp_path: Path) -> None:
    whole = pdf(*(f"page {n}" for n in range(20)))
    (tmp_path / "cut.pdf").write_bytes(whole[: len(whole) // 3])
    (tmp_path / "noise.pdf").write_bytes(b"%PDF-1.7\n" + os.urandom(5000))
    assert {reason for reason, _ in skips(source(tmp_path))} <= {"broken PDF", "no text"}
    assert len(documents(source(tmp_path))) + len(skips(source(tmp_path))) == 2
