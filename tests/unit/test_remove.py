"""Removed documents are in no new shard; what stays is the same; later datasets leave them out too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lapis.data.document import Document
from lapis.data.remove import Removal, RemovalList, search, without
from lapis.data.shards import Dataset, write_heldout, write_manifest, write_shard
from lapis.data.streams import Piece
from lapis.data.trace import licence_table, parse_range, trace
from lapis.errors import InputError, IntegrityError
from lapis.tokenizer.bpe import Tokenizer
from tests.texts import prose

DOCUMENTS = [
    Document(prose(n, 20 + 7 * n % 40), f"s{n % 3}", f"p{n}", ("MIT", "CC0")[n % 2], "prose", f"{n:032x}")
    for n in range(30)
]
TOKENIZER = Tokenizer.train([document.text for document in DOCUMENTS], 400)
CUTS = [(0, 9), (9, 10), (10, 27)]


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return written(tmp_path / "tokens-base", [DOCUMENTS[low:high] for low, high in CUTS], DOCUMENTS[27:])


def written(folder: Path, shards: list[list[Document]], heldout: list[Document]) -> Dataset:
    folder.mkdir()
    entries = [write_shard(folder, n, documents, TOKENIZER) for n, documents in enumerate(shards)]
    write_manifest(folder, TOKENIZER, entries, write_heldout(folder, heldout))
    (folder / "report.json").write_text("[]")
    return Dataset.open(folder)


def stream(documents: list[Document]) -> list[int]:
    return [id for document in documents for id in (0, *TOKENIZER.encode(document.text))]


@pytest.mark.parametrize(
    "removal",
    [
        Removal(source="s1"),
        Removal(document=DOCUMENTS[4].id),
        Removal(document=DOCUMENTS[9].id),  # all of its shard
        Removal(licence="MIT"),
        Removal(source="s0", licence="CC0"),
        Removal(document=DOCUMENTS[28].id),  # held out
    ],
)
def test_what_is_removed_is_in_no_new_shard_and_all_else_is(removal: Removal, dataset: Dataset) -> None:
    before = {path.name: path.read_bytes() for path in dataset.folder.iterdir()}
    new = without(dataset, search(dataset, [removal]), dataset.folder.parent)
    stay = [document for document in DOCUMENTS if not removal.covers(document)]
    training = [document for document in DOCUMENTS[:27] if document in stay]
    assert new.read(0, new.tokens).tolist() == stream(training)
    assert new.heldout() == [document for document in DOCUMENTS[27:] if document in stay]
    assert [entry.id for n in range(len(new.manifest["shards"])) for entry in new.documents_of(n)] == [
        document.id for document in training
    ]
    gone = [json.loads(line) for line in (new.folder / "removed.jsonl").read_text().splitlines()]
    assert {one["id"] for one in gone} == {one.id for one in DOCUMENTS} - {one.id for one in stay}
    assert new.manifest["parent"] == dataset.digest
    assert new.manifest["removed"]["documents"] == len(gone)
    assert new.digest != dataset.digest
    assert {path.name: path.read_bytes() for path in dataset.folder.iterdir()} == before
    assert sum(row["tokens"] for row in new.manifest["licences"]) == new.tokens


def test_a_shard_without_any_of_it_is_the_same_file(dataset: Dataset) -> None:
    new = without(dataset, search(dataset, [Removal(document=DOCUMENTS[2].id)]), dataset.folder.parent)
    for name in ("shard-00001.tokens", "shard-00002.documents.jsonl"):
        assert (new.folder / name).samefile(dataset.folder / name)
    assert not (new.folder / "shard-00000.tokens").samefile(dataset.folder / "shard-00000.tokens")


def test_the_list_of_the_removed_is_vouched_for(dataset: Dataset) -> None:
    new = without(dataset, search(dataset, [Removal(source="s1")]), dataset.folder.parent)
    (new.folder / "removed.jsonl").write_text("")
    with pytest.raises(IntegrityError, match="removed.jsonl"):
        Dataset.open(new.folder)


def test_removing_one_after_the_other_gives_what_both_give(dataset: Dataset) -> None:
    root = dataset.folder.parent
    first, second = Removal(document=DOCUMENTS[1].id), Removal(source="s1")
    both = without(dataset, search(dataset, [first, second]), root)
    half = without(dataset, search(dataset, [first]), root)
    assert without(half, search(half, [second]), root).digest == both.digest
    other = without(dataset, search(dataset, [second]), root)  # first is one of these already
    assert other.digest == both.digest


def test_nothing_left_is_refused(dataset: Dataset) -> None:
    found = search(dataset, [Removal(source=f"s{n}") for n in range(3)])
    with pytest.raises(InputError, match="Nothing would be left"):
        without(dataset, found, dataset.folder.parent)


def test_the_list_stands_for_datasets_even_when_they_are_deleted(dataset: Dataset) -> None:
    root, name = dataset.folder.parent, dataset.folder.name
    known = RemovalList(root)
    assert known.apply(dataset) is dataset  # nothing is on the list
    known.add([Removal(source="s1")])
    assert known.stands_for(name) is None
    first = known.apply(dataset)
    for path in dataset.folder.iterdir():
        path.unlink()
    dataset.folder.rmdir()
    found = known.stands_for(name)
    assert found is not None
    assert found.digest == first.digest
    known.add([Removal(document=DOCUMENTS[0].id)])
    found = known.stands_for(name)  # from the dataset that is there, not from the deleted one
    assert found is not None
    assert found.manifest["documents"] == 17
    assert known.stands_for(found.folder.name) is not None
    known.add([Removal(source="nowhere")])
    again = known.stands_for(name)
    assert again is not None
    assert again.digest == found.digest  # what is not in there changes nothing
    known.path.write_text("{")
    with pytest.raises(IntegrityError, match=r"removed\.json, is damaged"):
        known.removals()


def test_tokens_lead_to_their_documents_and_licences(dataset: Dataset) -> None:
    pieces = [Piece(5, 300), Piece(dataset.tokens - 7, 7), Piece(5, 2)]
    found = trace(dataset, pieces)
    slow: dict[str, int] = {}
    for start, count in pieces:
        for token in range(start, start + count):
            document = dataset.document_of(token)
            slow[document.id] = slow.get(document.id, 0) + 1
    assert {one.document.id: one.tokens for one in found} == slow
    assert [one.document.start for one in found] == sorted(one.document.start for one in found)
    assert found[0].document == dataset.document_of(5)
    table = licence_table(found)
    assert sum(row.tokens for row in table) == 309
    assert sum(row.documents for row in table) == len(found)
    with pytest.raises(InputError, match="not within"):
        trace(dataset, [Piece(dataset.tokens, 1)])


def test_ranges_are_from_and_to() -> None:
    assert parse_range("1_000:2000") == (1000, 1000)
    assert parse_range("7") == (7, 1)
    for text in ("7:7", "9:3", "a", "-3", "1:2:3", ""):
        with pytest.raises(InputError):
            parse_range(text)
