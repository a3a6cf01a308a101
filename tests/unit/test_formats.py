"""Formats: every record once however a file is cut, and what is in it besides documents is counted."""

from __future__ import annotations

import gzip
import json
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import zstandard

from lapis.data.formats.part import Note
from lapis.data.input import Reader
from lapis.data.readers import FORMATS, plan_parts
from lapis.data.recipe import DataConfig, Format
from lapis.data.sources import list_inputs
from lapis.errors import InputError
from tests.sources import documents, pdf, read, skips, source, warc_record
from tests.texts import prose

needs_html = pytest.mark.skipif(find_spec("fastwarc") is None, reason="lapis[html] is not installed")
needs_pdf = pytest.mark.skipif(find_spec("pypdfium2") is None, reason="lapis[pdf] is not installed")
PAGES = Path(__file__).parents[2] / ".." / "shared" / "data" / "pages.warc.gz"


def parts_of(path: Path) -> int:
    return len(plan_parts(list_inputs(DataConfig(sources=(source(path),))).inputs))


def test_a_recipe_can_name_every_format_there_is() -> None:
    assert set(get_args(Format)) == {"auto", *FORMATS} == {"auto", *get_args(Reader)}


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_each_line_of_a_cut_file_is_read_once(
    ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lapis.data.formats.jsonl.UNPACKED", 5000)
    texts = [prose(n, 40 + 700 * (n % 3)) for n in range(60)]
    plain = b"\n".join(json.dumps({"text": text}).encode() for text in texts)
    pack = {".gz": gzip.compress, ".zst": zstandard.compress}.get(Path(ending).suffix, bytes)
    path = tmp_path / f"rows{ending}"
    path.write_bytes(pack(plain))
    whole = documents(source(path))
    assert [one.text for one in whole] == texts
    for size in (path.stat().st_size // 9, 7000, 40_000):
        monkeypatch.setattr("lapis.data.formats.part.SPAN_BYTES", size)
        assert parts_of(path) > 1
        assert documents(source(path)) == whole


def save_dataset(folder: Path, texts: list[str], shards: int = 2) -> None:
    """What `Dataset.save_to_disk` writes: streams of Arrow batches, and two files that name them."""
    folder.mkdir(parents=True)
    names = [f"data-{n:05d}-of-{shards:05d}.arrow" for n in range(shards)]
    for n, name in enumerate(names):
        rows = pa.table({"text": texts[n::shards], "lic": ["MIT"] * len(texts[n::shards])})
        with pa.ipc.new_stream(str(folder / name), rows.schema) as writer:
            writer.write_table(rows, max_chunksize=3)
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "0", "_split": "train"}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text(json.dumps({"features": {"text": {"dtype": "string"}}}))


def test_a_saved_dataset_gives_its_rows_and_nothing_of_its_metadata(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [prose(n) for n in range(20)]
    save_dataset(tmp_path / "set", texts)
    (tmp_path / "set" / "cache-1234.arrow").write_bytes(b"left by a map")
    whole = documents(source(tmp_path / "set", licence_column="lic"))
    assert sorted(one.text for one in whole) == sorted(texts)
    assert {one.licence for one in whole} == {"MIT"}
    listing = list_inputs(DataConfig(sources=(source(tmp_path / "set"),)))
    assert listing.step.reasons == {"not among the dataset's files": 1}
    assert listing.step.notes == {"files about a dataset, not read": 2}
    monkeypatch.setattr("lapis.data.formats.part.SPAN_BYTES", 3000)
    assert parts_of(tmp_path / "set") > 3
    assert documents(source(tmp_path / "set", licence_column="lic")) == whole


def test_a_saved_dataset_that_lacks_a_file_is_refused(tmp_path: Path) -> None:
    save_dataset(tmp_path / "set", ["a", "b"])
    (tmp_path / "set" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(InputError, match="lacks data-00001-of-00002.arrow"):
        documents(source(tmp_path / "set"))


def test_of_a_dataset_with_splits_only_train_is_read_and_the_rest_is_counted(tmp_path: Path) -> None:
    for split in ("train", "test"):
        save_dataset(tmp_path / "sets" / split, [f"a text of {split}"], shards=1)
    (tmp_path / "sets" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert [one.text for one in documents(source(tmp_path / "sets"))] == ["a text of train"]
    listing = list_inputs(DataConfig(sources=(source(tmp_path / "sets"),)))
    assert listing.step.reasons == {"split test, not train": 1}
    assert [one.text for one in documents(source(tmp_path / "sets" / "test"))] == ["a text of test"]
    (tmp_path / "sets" / "dataset_dict.json").write_text('{"splits": ["dev", "test"]}')
    with pytest.raises(InputError, match="splits dev, test"):
        documents(source(tmp_path / "sets"))


def test_an_arrow_file_with_an_index_is_read_too(tmp_path: Path) -> None:
    rows = pa.table({"text": ["one", "two"]})
    with pa.ipc.new_file(str(tmp_path / "a.arrow"), rows.schema) as writer:
        writer.write_table(rows)
    assert [one.path for one in documents(source(tmp_path))] == ["a.arrow#0", "a.arrow#1"]


@needs_html
def test_every_record_of_a_web_archive_is_a_document_or_counted(tmp_path: Path) -> None:
    page = f"<html><body><p>{prose(1)}</p></body></html>".encode()
    missing = gzip.decompress(warc_record(page, "http://b")).replace(b"200 OK", b"404 NO")
    records = [
        warc_record(b"software: x", kind="warcinfo", http="application/warc-fields"),
        warc_record(page),
        warc_record(b"\x89PNG", "http://p", http="image/png"),
        gzip.compress(missing),
        warc_record(prose(2).encode(), "http://c", kind="conversion", http="text/plain"),
        warc_record(b"<html></html>", "http://d"),
    ]
    (tmp_path / "a.warc.gz").write_bytes(b"".join(records))
    first, second = documents(source(tmp_path))
    assert first.text.split() == prose(1).split()
    assert second.text == prose(2)
    assert second.path == f"a.warc.gz#{sum(map(len, records[:4]))}:http://c"
    assert [reason for reason, _ in skips(source(tmp_path))] == [
        "not HTML", "HTTP status that is no success", "no text",
    ]  # fmt: skip
    notes = [one for one in read(DataConfig(sources=(source(tmp_path),))) if isinstance(one, Note)]
    assert notes == [Note("WARC records without a page")]


@needs_html
@pytest.mark.parametrize("ending", [".warc.gz", ".warc", ".warc.zst"])
def test_a_web_archive_is_the_same_however_it_is_packed_and_cut(
    ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = {"kind": "conversion", "http": "text/plain"}
    records = [warc_record(prose(n, 300).encode(), f"http://{n}", **kind) for n in range(30)]
    plain = b"".join(gzip.decompress(record) for record in records)
    path = tmp_path / f"a{ending}"
    packed = {".warc.gz": b"".join(records), ".warc": plain, ".warc.zst": zstandard.compress(plain)}[ending]
    path.write_bytes(packed)
    texts = [prose(n, 300) for n in range(30)]
    assert [one.text for one in documents(source(path))] == texts
    for size in (1000, 3000, 20_000):
        monkeypatch.setattr("lapis.data.formats.part.SPAN_BYTES", size)
        assert (parts_of(path) > 1) is (ending == ".warc.gz")
        assert [one.text for one in documents(source(path))] == texts


@needs_html
@pytest.mark.skipif(not PAGES.exists(), reason="the shared sample of web pages is not there")
def test_real_pages_are_the_same_in_one_part_and_in_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lapis.data.formats.warc.page_text", lambda html, charset, extractor: html.decode())
    whole = documents(source(PAGES))
    monkeypatch.setattr("lapis.data.formats.part.SPAN_BYTES", 300_000)
    assert parts_of(PAGES) > 30
    assert documents(source(PAGES)) == whole
    assert len(whole) >= 588


@needs_html
def test_the_encoding_of_a_page_is_that_of_http_or_its_own(tmp_path: Path) -> None:
    text = "Grüße aus Köln und Füssen, über Öl und Übermut. " * 5
    page = f"<html><body><p>{text}</p></body></html>"
    kind = "text/html; charset=iso-8859-1"
    (tmp_path / "a.warc.gz").write_bytes(warc_record(page.encode("latin-1"), http=kind))
    (tmp_path / "b.html").write_bytes(
        page.replace("<body>", '<meta charset="latin1"><body>').encode("latin-1")
    )
    (tmp_path / "c.html").write_bytes(page.encode("utf-16"))
    assert [one.text.strip() for one in documents(source(tmp_path))] == [text.strip()] * 3


@needs_html
@pytest.mark.skipif(find_spec("trafilatura") is None, reason="lapis[trafilatura] is not installed")
def test_the_other_extractor_finds_the_article_and_names_other_inputs(tmp_path: Path) -> None:
    article = "".join(f"<p>{prose(n, 60)}</p>" for n in range(4))
    page = f"<html><body><nav><a href=x>Menu</a></nav><article>{article}</article></body></html>"
    (tmp_path / "a.html").write_text(page)
    (one,) = documents(source(tmp_path, extractor="trafilatura"))
    assert one.text.split() == " ".join(prose(n, 60) for n in range(4)).split()
    names = [
        list_inputs(DataConfig(sources=(source(tmp_path, extractor=name),))).inputs[0].identity
        for name in ("resiliparse", "trafilatura")
    ]
    assert names[0] != names[1]


@needs_pdf
def test_the_pages_of_a_pdf_are_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_bytes(pdf("The first page of it", "and the second"))
    (one,) = documents(source(tmp_path, licence="CC0-1.0"))
    assert (one.text, one.licence) == ("The first page of it\n\nand the second", "CC0-1.0")
    (tmp_path / "b.pdf").write_bytes(pdf(""))
    (tmp_path / "c.pdf").write_bytes(b"%PDF-1.4\nnothing of the kind")
    assert sorted(skips(source(tmp_path))) == [("broken PDF", "c.pdf"), ("no text", "b.pdf")]


def test_files_of_one_source_may_have_other_columns(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"text": ["fine"], "id": [1]}), tmp_path / "a.parquet")
    parquet.write_table(
        pa.table({"id": ["x"], "text": pa.array(["large"], pa.large_string())}), tmp_path / "b.parquet"
    )
    parquet.write_table(pa.table({"content": ["other"]}), tmp_path / "c.parquet")
    parquet.write_table(pa.table({"text": [7, 8]}), tmp_path / "d.parquet")
    words = pa.array(["dict"]).dictionary_encode()
    parquet.write_table(pa.table({"text": words}), tmp_path / "e.parquet")
    rows = [{"text": "a"}, {"content": "b"}, {"text": ["c"]}, "text", {"text": "d", "more": {"x": 1}}]
    (tmp_path / "f.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert sorted(one.text for one in documents(source(tmp_path))) == ["a", "d", "dict", "fine", "large"]
    assert sorted(reason for reason, _ in skips(source(tmp_path))) == [
        "broken record", "no column 'text'", *["no text in 'text'"] * 4,
    ]  # fmt: skip


def test_rows_that_share_an_id_are_all_read(tmp_path: Path) -> None:
    rows = [{"id": 1, "text": f"number {n}"} for n in range(3)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = documents(source(tmp_path))
    assert [one.text for one in found] == ["number 0", "number 1", "number 2"]
    assert len({one.path for one in found}) == 3
