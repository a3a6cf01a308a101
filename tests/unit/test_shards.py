"""Token shards and the loader: the stream is the documents, whole, traceable, and verified."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lapis.data.document import Document
from lapis.data.loader import TokenLoader
from lapis.data.pipeline import shard_cuts
from lapis.data.shards import Dataset, write_heldout, write_manifest, write_shard
from lapis.errors import InputError, IntegrityError
from lapis.tokenizer.bpe import Tokenizer
from tests.texts import prose

DOCUMENTS = [
    Document(prose(n, 20 + 7 * n % 40), f"s{n % 2}", f"p{n}", "MIT" if n % 3 else "", "prose", f"{n:032x}")
    for n in range(20)
]
TOKENIZER = Tokenizer.train([document.text for document in DOCUMENTS], 400)


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    write_dataset(tmp_path)
    return Dataset.open(tmp_path)


def write_dataset(folder: Path) -> None:
    cuts = [(0, 6), (6, 7), (7, 17)]
    shards = [write_shard(folder, n, DOCUMENTS[low:high], TOKENIZER) for n, (low, high) in enumerate(cuts)]
    write_manifest(folder, TOKENIZER, shards, write_heldout(folder, DOCUMENTS[17:]))
    (folder / "report.json").write_text("[]")


def expected_stream() -> list[int]:
    return [id for document in DOCUMENTS[:17] for id in (0, *TOKENIZER.encode(document.text))]


def test_the_stream_is_each_document_after_an_end_token(dataset: Dataset) -> None:
    stream = expected_stream()
    assert dataset.tokens == len(stream)
    assert dataset.read(0, dataset.tokens).tolist() == stream
    assert dataset.document_starts.tolist() == [n for n, id in enumerate(stream) if id == 0]
    for start, count in [(0, 0), (3, 500), (len(stream) - 1, 1), (len(stream), 0)]:
        assert dataset.read(start, count).tolist() == stream[start : start + count]
    with pytest.raises(InputError, match="not within"):
        dataset.read(len(stream) - 1, 2)


def test_each_token_leads_to_its_document_and_licence(dataset: Dataset) -> None:
    starts = dataset.document_starts
    for token in range(0, dataset.tokens, 13):
        n = int(np.searchsorted(starts, token, side="right")) - 1
        entry = dataset.document_of(token)
        assert (entry.id, entry.source, entry.path) == (DOCUMENTS[n].id, DOCUMENTS[n].source, f"p{n}")
        assert (entry.licence, entry.start) == (DOCUMENTS[n].licence, starts[n])
        assert dataset.tokenizer.decode(dataset.read(entry.start, entry.tokens).tolist()) == DOCUMENTS[n].text


def test_the_manifest_counts_documents_bytes_and_tokens_by_licence(dataset: Dataset) -> None:
    table = {(row["source"], row["licence"]): row for row in dataset.manifest["licences"]}
    assert table["s0", ""]["documents"] == len([n for n in range(17) if n % 6 == 0])
    assert sum(row["tokens"] for row in table.values()) == dataset.tokens
    assert sum(row["bytes"] for row in table.values()) == sum(
        len(one.text.encode()) for one in DOCUMENTS[:17]
    )


def test_held_out_documents_come_back_whole(dataset: Dataset) -> None:
    assert dataset.heldout() == DOCUMENTS[17:]


def test_equal_documents_give_equal_bytes_and_digest(dataset: Dataset, tmp_path: Path) -> None:
    write_dataset(tmp_path / "again")
    again = Dataset.open(tmp_path / "again")
    assert again.digest == dataset.digest
    for name in ("shard-00002.tokens", "shard-00002.documents.jsonl", "manifest.json", "tokenizer.json"):
        assert (again.folder / name).read_bytes() == (dataset.folder / name).read_bytes()


@pytest.mark.parametrize(
    "name",
    [
        "shard-00001.tokens",
        "shard-00000.starts",
        "shard-00002.documents.jsonl",
        "heldout.jsonl",
        "tokenizer.json",
    ],
)
def test_a_flipped_bit_or_a_missing_file_is_refused_by_name(name: str, dataset: Dataset) -> None:
    path = dataset.folder / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(IntegrityError, match=name):
        Dataset.open(dataset.folder)
    path.unlink()
    with pytest.raises(IntegrityError, match=f"{name} is missing"):
        Dataset.open(dataset.folder)


def test_a_changed_manifest_is_refused(dataset: Dataset) -> None:
    path = dataset.folder / "manifest.json"
    text = path.read_text()
    path.write_text(text.replace('"licence": "MIT"', '"licence": "CC0"', 1))
    assert path.read_text() != text
    with pytest.raises(IntegrityError, match=r"manifest\.json does not match its own digest"):
        Dataset.open(dataset.folder)


def test_what_is_no_dataset_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no prepared dataset"):
        Dataset.open(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(IntegrityError, match="damaged"):
        Dataset.open(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(InputError, match="format 99"):
        Dataset.open(tmp_path)


def test_a_large_vocabulary_takes_wider_tokens(tmp_path: Path) -> None:
    assert write_shard(tmp_path, 0, DOCUMENTS[:1], TOKENIZER)["tokens"] * 2 == (
        (tmp_path / "shard-00000.tokens").stat().st_size
    )
    from lapis.data.shards import token_type

    assert [token_type(size) for size in (65_536, 65_537)] == ["uint16", "uint32"]


def test_an_epoch_of_windows_is_the_stream(dataset: Dataset) -> None:
    loader = TokenLoader(dataset, sequence=16, batch=1, seed=5)
    stream = expected_stream()
    windows = {}
    for step in range(loader.samples):
        batch = loader.at(step)
        assert batch.ids_T[1:].tolist() == batch.targets_T[:-1].tolist()
        windows[tuple(batch.ids_T)] = batch
    whole = [windows[tuple(stream[n : n + 16])] for n in range(0, loader.samples * 16, 16)]
    assert [id for batch in whole for id in batch.ids_T.tolist()] == stream[: loader.samples * 16]
    assert [int(batch.targets_T[-1]) for batch in whole] == stream[16 : loader.samples * 16 + 1 : 16]


def test_a_batch_is_a_function_of_its_step_alone(dataset: Dataset) -> None:
    loader = TokenLoader(dataset, sequence=24, batch=3, seed=9)
    forward = [loader.at(step) for step in range(12)]
    again = TokenLoader(Dataset.open(dataset.folder), sequence=24, batch=3, seed=9)
    for step in (11, 3, 0, 7):
        batch = again.at(step)
        assert np.array_equal(batch.ids_T, forward[step].ids_T)
        assert np.array_equal(batch.targets_T, forward[step].targets_T)
        assert batch.lengths == forward[step].lengths
    other = TokenLoader(dataset, sequence=24, batch=3, seed=10)
    assert not np.array_equal(other.at(0).ids_T, forward[0].ids_T)


def test_spans_end_where_documents_begin(dataset: Dataset) -> None:
    loader = TokenLoader(dataset, sequence=40, batch=4, seed=1)
    for step in range(loader.samples // 4):
        batch = loader.at(step)
        assert sum(batch.lengths) == 160
        assert min(batch.lengths) > 0
        edges = np.cumsum((0, *batch.lengths[:-1])).tolist()
        inner = [edge for edge in edges if edge % 40]
        assert set(inner) == {n for n, id in enumerate(batch.ids_T.tolist()) if id == 0 and n % 40}


def test_less_text_than_one_window_is_an_error(dataset: Dataset) -> None:
    with pytest.raises(InputError, match="less than a sequence"):
        TokenLoader(dataset, sequence=dataset.tokens, batch=1, seed=0)


def test_shards_have_about_one_size_and_hold_every_document_once() -> None:
    sizes = np.random.default_rng(1).integers(1, 60_000, 3000)
    cuts = shard_cuts(sizes)
    assert [low for low, _ in cuts[1:]] == [high for _, high in cuts[:-1]]
    assert (cuts[0][0], cuts[-1][1]) == (0, 3000)
    totals = [int(sizes[low:high].sum()) for low, high in cuts[:-1]]
    assert max(totals) < 1.1 * min(totals)
    assert shard_cuts(np.array([10])) == [(0, 1)]
