"""Lines that many documents of one source share are taken out, the same ones however the work is cut."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from lapis.data.pipeline import prepare
from lapis.data.recipe import DataConfig, TokenizerConfig
from lapis.data.report import Step
from lapis.data.shards import Dataset
from lapis.home import Home
from tests.texts import prose

NAVIGATION = "Home | Products | Documentation | About us"
NOTICE = "This site uses biscuits to remember what you read."
SMALL = TokenizerConfig(vocab_size=400)


def write_pages(folder: Path, count: int = 40, *, ending: str = ".txt") -> Path:
    """Documents of their own text below a navigation line, every second one above a notice."""
    folder.mkdir(parents=True)
    for n in range(count):
        lines = [NAVIGATION, "", prose(n, 120).strip(), *([NOTICE] if n % 2 else []), "See also", ""]
        (folder / f"{n:03d}{ending}").write_text("\n".join(lines), encoding="utf-8")
    return folder


def made(home: Path, *folders: Path, workers: int = 1, **settings: object) -> Dataset:
    data = {
        "sources": tuple({"path": str(folder)} for folder in folders),
        "heldout": {"min_bytes": 2000},
        "filters": {"enabled": False},
        "boilerplate": {"sources": "all", **settings},
    }
    return prepare(DataConfig.model_validate(data), SMALL, Home(home), workers=workers)


def texts(dataset: Dataset) -> list[str]:
    bounds = [*dataset.document_starts.tolist(), dataset.tokens]
    return [dataset.tokenizer.decode(dataset.read(a, b - a).tolist()) for a, b in pairwise(bounds)]


def step(dataset: Dataset) -> Step:
    return next(row for row in dataset.report if row.step == "boilerplate")


def test_shared_lines_go_and_all_else_stays(tmp_path: Path) -> None:
    dataset = made(tmp_path / "home", write_pages(tmp_path / "pages"))
    found = texts(dataset)
    assert found and not [text for text in found if NAVIGATION in text or NOTICE in text]
    own = {prose(n, 120).strip() for n in range(40)}
    assert all(any(one in text for one in own) for text in found)
    assert all("See also" in text for text in found)  # a short line may well be said often
    row = step(dataset)
    assert row.documents_in == row.documents_out == 40
    assert row.notes["lines taken out"] == 60
    assert row.notes["bytes taken out"] == row.bytes_in - row.bytes_out
    assert row.bytes_in - row.bytes_out == 40 * (len(NAVIGATION) + 1) + 20 * (len(NOTICE) + 1)


@pytest.mark.long
def test_the_same_bytes_for_any_number_of_workers_parts_and_ranges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = write_pages(tmp_path / "pages")
    whole = made(tmp_path / "one", pages)
    monkeypatch.setattr("lapis.data.readers.BATCH_BYTES", 10_000)
    monkeypatch.setattr("lapis.data.boilerplate.RANGE_BYTES", 200)
    cut = made(tmp_path / "many", pages)
    shared = made(tmp_path / "shared", pages, workers=2)
    assert whole.digest == cut.digest == shared.digest


def test_a_line_counts_once_a_document_and_in_its_own_source_only(tmp_path: Path) -> None:
    chorus = "And so say all of us, and so say all of us."
    for name in ("a", "b"):
        folder = tmp_path / name
        folder.mkdir()
        for n in range(20):
            sung = [chorus] * (3 if n < 6 else 0)  # 6 documents of each source, 36 lines in all
            text = "\n".join([prose(n + 100 * (name == "b"), 120), *sung])
            (folder / f"{n}.txt").write_text(text, encoding="utf-8")
    dataset = made(tmp_path / "home", tmp_path / "a", tmp_path / "b")
    assert sum(chorus in text for text in texts(dataset)) > 6
    assert step(dataset).notes == {}
    few = made(tmp_path / "home", tmp_path / "a", tmp_path / "b", min_documents=6)
    assert step(few).notes["lines taken out"] == 36


def test_a_document_of_nothing_else_is_dropped_under_its_reason(tmp_path: Path) -> None:
    pages = write_pages(tmp_path / "pages")
    (pages / "empty.txt").write_text(f"{NAVIGATION}\n{NOTICE}\n", encoding="utf-8")
    row = step(made(tmp_path / "home", pages))
    assert row.reasons == {"nothing but boilerplate": 1}
    assert row.examples["nothing but boilerplate"] == ["pages: empty.txt"]


def test_by_default_only_web_pages_lose_lines(tmp_path: Path) -> None:
    pytest.importorskip("resiliparse")
    plain = made(tmp_path / "home", write_pages(tmp_path / "plain"), sources="html")
    assert not [row for row in plain.report if row.step == "boilerplate"]
    web = tmp_path / "web"
    web.mkdir()
    for n in range(30):
        body = "".join(f"<p>{part}</p>" for part in [prose(n, 150), NOTICE])
        page = f"<html><body><main>{body}</main></body></html>"
        (web / f"{n}.html").write_text(page, encoding="utf-8")
    dataset = made(tmp_path / "home", web, sources="html")
    assert step(dataset).notes["lines taken out"] == 30
    assert not [text for text in texts(dataset) if NOTICE in text]


def test_code_keeps_its_lines(tmp_path: Path) -> None:
    pages = write_pages(tmp_path / "pages", ending=".py")
    row = step(made(tmp_path / "home", pages, min_documents=2))
    assert row.notes == {} and row.documents_in == 40
