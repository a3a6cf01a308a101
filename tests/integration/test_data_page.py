"""The page and the card that lie beside a dataset's shards."""

from __future__ import annotations

import hashlib
import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lapis.data.page import bars, length_bars
from lapis.data.pipeline import prepare
from lapis.data.recipe import DataConfig, TokenizerConfig
from lapis.data.remove import Removal, RemovalList
from lapis.data.shards import Dataset
from lapis.home import Home
from tests.texts import changed, prose, write_corpus

VOID = {"meta", "br"}
OFF = {"exact": False, "near": False}


class Page(HTMLParser):
    """Checks that elements are closed in order, and collects what a reader sees and what would be fetched."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.tags: set[str] = set()
        self.seen = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.seen += data


@pytest.fixture
def dataset(tmp_path: Path, home: Home) -> Dataset:
    text = tmp_path / "text"
    write_corpus(text, 60)
    (text / "short.txt").write_text("Three words <script>alert(1)</script> only.")
    (text / "near.txt").write_text(changed(prose(9), 1, 0.06))
    config = {"sources": ({"path": str(text), "licence": "CC-BY-4.0"},), "heldout": {"min_bytes": 2000}}
    return prepare(DataConfig.model_validate(config), TokenizerConfig(vocab_size=400), home, workers=1)


def test_the_page_shows_what_was_kept_and_dropped_and_fetches_nothing(dataset: Dataset) -> None:
    page = Page((dataset.folder / "report.html").read_text(encoding="utf-8"))
    assert page.fetched == [] and "script" not in page.tags
    assert "Three words <script>alert(1)</script> only." in page.seen  # text of a document stays text
    assert dataset.digest in page.seen and "CC-BY-4.0" in page.seen
    for step in dataset.report:
        for reason, count in step.reasons.items():
            assert f"{reason} {count:,}" in page.seen
    assert "1 groups" in page.seen and "near.txt" in page.seen


def test_the_card_names_every_file_with_its_digest(dataset: Dataset) -> None:
    card = json.loads((dataset.folder / "croissant.json").read_text(encoding="utf-8"))
    files = [entry for entry in card["distribution"] if entry["@type"] == "cr:FileObject"]
    assert len(files) == 2 + 3 * len(dataset.manifest["shards"])
    for entry in files:
        content = (dataset.folder / entry["contentUrl"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == entry["sha256"]
    assert card["license"] == ["CC-BY-4.0"]
    fields = {field["name"] for field in card["recordSet"][0]["field"]}
    line = (dataset.folder / "shard-00000.documents.jsonl").read_text(encoding="utf-8").splitlines()[0]
    assert fields <= json.loads(line).keys()


def test_page_and_card_are_no_part_of_the_dataset(dataset: Dataset) -> None:
    (dataset.folder / "report.html").unlink()
    (dataset.folder / "croissant.json").unlink()
    assert Dataset.open(dataset.folder).digest == dataset.digest


def test_charts() -> None:
    import numpy as np

    assert [(bar.name, bar.count) for bar in length_bars(np.array([16, 17, 64, 65]))] == [
        ("≤ 16", 1), ("≤ 32", 1), ("≤ 64", 1), ("≤ 128", 1),
    ]  # fmt: skip
    assert length_bars(np.array([], dtype=int)) == []
    assert [bar.share for bar in bars([("a", 4), ("b", 1)])] == [1.0, 0.25]


def test_a_page_shows_nothing_of_what_was_removed_and_needs_no_duplicates(tmp_path: Path, home: Home) -> None:
    texts = {name: write_corpus(tmp_path / name, 40) for name in ("kept", "gone")}
    for path in texts["gone"].iterdir():
        path.write_text(f"Secret heading\n{path.read_text()} and an end of its own", encoding="utf-8")
    sources = tuple({"path": str(path), "name": name} for name, path in texts.items())
    config = DataConfig.model_validate({"sources": sources, "heldout": {"min_bytes": 2000}, "dedup": OFF})
    RemovalList(home.data).add([Removal(source="gone")])
    dataset = prepare(config, TokenizerConfig(vocab_size=400), home, workers=1)
    assert "removed" in dataset.manifest
    page = Page((dataset.folder / "report.html").read_text(encoding="utf-8"))
    assert "kept: " in page.seen and "Secret heading" not in page.seen and "groups" not in page.seen
