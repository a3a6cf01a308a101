"""A preview predicts what the full run makes, from a small part of real text."""

from __future__ import annotations

import sysconfig
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lapis.data import preview as module
from lapis.data.pipeline import prepare
from lapis.data.preview import dropped_shares, preview
from lapis.data.recipe import DataConfig, TokenizerConfig
from lapis.home import Home

CORPUS = Path(__file__).parents[3] / "shared" / "data" / "corpus.parquet"


def check(data: DataConfig, tokenizer: TokenizerConfig, home: Home, sampled: float, within: float) -> None:
    """The preview of a recipe measures a part of its input only and comes close to the full run."""
    found = preview(data, tokenizer, home, workers=1)
    assert found == preview_again(found, data, tokenizer, home)
    assert found.sample_bytes < sampled * found.bytes
    dataset = prepare(data, tokenizer, home, workers=1)
    heldout = dataset.manifest["heldout"]
    disk = sum(path.stat().st_size for path in home.data.rglob("*") if path.is_file())
    predicted = (found.tokens, found.kept_documents, found.kept_bytes, found.total_disk)
    made = (
        *(dataset.tokens, dataset.manifest["documents"] + heldout["documents"]),
        *(dataset.manifest["bytes"] + heldout["bytes"], disk),
    )
    assert predicted == pytest.approx(made, rel=within)


def preview_again(
    found: module.Preview, data: DataConfig, tokenizer: TokenizerConfig, home: Home
) -> module.Preview:
    """A second preview with the first one's times, which are all that may differ."""
    again = preview(data, tokenizer, home, workers=1)
    return replace(again, seconds=found.seconds, disk=found.disk)


def test_a_tenth_of_the_standard_library_predicts_the_rest(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WHOLE_BYTES", 300_000)
    monkeypatch.setattr(module, "SKETCHED_BYTES", 1_500_000)
    root = Path(sysconfig.get_path("stdlib"))
    folder = tmp_path / "library"
    folder.mkdir()
    for n, path in enumerate(sorted(root.glob("[a-p]*.py"))):
        text = path.read_text(encoding="utf-8", errors="replace")
        (folder / path.name).write_text(text, encoding="utf-8")
        if n % 3 == 0:  # duplicates
            (folder / f"copy_{path.name}").write_text(text + "# a copy\n", encoding="utf-8")
    sources = {"sources": ({"path": str(folder)},), "document_chars": 4000}
    data = DataConfig.model_validate(sources)
    check(data, TokenizerConfig(vocab_size=400, sample_bytes=200_000), home, 0.15, 0.15)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_the_real_corpus_is_predicted_within_15_percent(home: Home) -> None:
    if not CORPUS.exists():
        pytest.skip(f"{CORPUS} is not there")
    source = {"path": str(CORPUS), "licence_column": "license", "kind_column": "kind"}
    check(DataConfig.model_validate({"sources": (source,)}), TokenizerConfig(), home, 0.04, 0.15)


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.5, 0.8])
def test_duplicates_are_extrapolated_from_a_sample(rate: float) -> None:
    chance = np.random.default_rng(1)
    members = chance.choice([1, 1, 1, 1, 2, 2, 3], size=40_000)
    clusters = np.repeat(np.arange(len(members)), members)
    sample = clusters[chance.random(len(clusters)) < rate]
    _, first, inverse = np.unique(sample, return_index=True, return_inverse=True)
    found = dropped_shares(first[inverse], np.full(len(sample), 1000), rate)
    truth = 1 - len(members) / len(clusters)
    assert found.documents == pytest.approx(truth, abs=0.02 if rate >= 0.5 else 0.07)
    assert found.bytes == pytest.approx(found.documents)


def test_nothing_is_extrapolated_from_no_documents() -> None:
    empty = np.empty(0, dtype=np.int64)
    assert dropped_shares(empty, empty, 0.5) == module.Shares(0.0, 0.0)
