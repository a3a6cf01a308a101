"""Decontamination: what is found of evaluation items in documents, and the gate that measures it."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from lapis.data.annotate import Chunk
from lapis.data.contamination_gate import check_gate, recased, refuse_failed, repunctuated, rewrapped
from lapis.data.decontaminate import OverlapAnnotator, build_index, overlap, overlap_rules, plain_words
from lapis.data.document import Document
from lapis.data.evaluation_sets import EvaluationItem, read_items
from lapis.data.recipe import DecontaminationConfig, EvaluationSet
from lapis.data.words import split_words
from lapis.errors import InputError

VOCABULARY = [
    f"{a}{b}{c}" for a in ("ba", "ke", "lo", "mi", "ru") for b in ("d", "n", "st") for c in ("ar", "el", "y")
]


def prose(seed: int, words: int) -> str:
    chance = random.Random(seed)
    marks = ["", "", "", ",", ".", "?", "'s", "-like", ' "']
    return " ".join(chance.choice(VOCABULARY) + chance.choice(marks) for _ in range(words))


def questions(count: int, words: int = 40) -> list[EvaluationItem]:
    return [EvaluationItem(f"q#{n}", (prose(n, words), prose(1000 + n, 6))) for n in range(count)]


def write_set(folder: Path, items: list[EvaluationItem]) -> DecontaminationConfig:
    path = folder / "questions.jsonl"
    rows = [{"question": item.columns[0], "choices": list(item.columns[1:])} for item in items]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DecontaminationConfig(sets=(EvaluationSet(path=str(path), columns=("question", "choices")),))


def share(text: str, items: list[EvaluationItem]) -> tuple[int, float, float]:
    found = overlap(plain_words([text]), build_index(items, 13, 6))
    return int(found.item_D[0]), float(found.item_share_D[0]), float(found.document_share_D[0])


def judged(text: str, passages: list[str], n: int = 13) -> tuple[float, float]:
    """The same from lists of words, slowly: the largest part of a passage, the part of the document."""
    split = lambda one: re.findall(r"[a-z0-9_]+", one.lower())  # noqa: E731
    words = split(text)
    best, inside = 0.0, set[int]()
    for passage in map(split, passages):
        size = min(n, len(passage))
        covered = set[int]()
        for at in range(len(passage) - size + 1):
            for place in range(len(words) - size + 1):
                if words[place : place + size] == passage[at : at + size]:
                    covered |= set(range(at, at + size))
                    inside |= set(range(place, place + size))
        best = max(best, len(covered) / len(passage))
    return best, len(inside) / max(1, len(words))


@pytest.mark.parametrize(
    "change", [str, rewrapped, recased, repunctuated, lambda text: rewrapped(recased(text))]
)
def test_changed_copies_are_found_whole(change: object) -> None:
    items = questions(5)
    assert callable(change)
    for number, item in enumerate(items):
        text = f"{prose(77, 50)} {change(item.text)} {prose(78, 50)}"
        which, part, _ = share(text, items)
        assert (which, part) == (number, 1.0)


def test_shares_are_those_that_lists_of_words_give() -> None:
    items = questions(6, 30)
    chance = random.Random(3)
    passages = [text for item in items for text in (item.text, item.columns[0])]
    for seed in range(40):
        item = chance.choice(items).text.split()
        low = chance.randrange(len(item))
        part = item[low : low + chance.randrange(1, len(item))]
        text = f"{prose(seed + 500, chance.randrange(30))} {' '.join(part)} {prose(seed + 600, chance.randrange(30))}"
        _, of_item, of_document = share(text, items)
        assert (of_item, of_document) == pytest.approx(judged(text, passages), abs=1e-6)


def test_neighbours_and_their_borders_do_not_matter() -> None:
    items = questions(3)
    words = items[1].text.split()
    halves = [" ".join(words[:20]), " ".join(words[20:]), prose(1, 400), items[2].text, ""]
    index = build_index(items, 13, 6)
    together = overlap(plain_words(halves), index)
    for place, text in enumerate(halves):
        alone = overlap(plain_words([text]), index)
        assert [float(column[0]) for column in alone] == [float(column[place]) for column in together]


def test_a_short_item_has_to_be_there_whole_and_a_very_short_one_is_not_looked_for() -> None:
    items = [
        EvaluationItem("a", ("Which planet has the most moons?", "Saturn")),
        EvaluationItem("b", ("What is 2+2?", "4")),
    ]
    index = build_index(items, 13, 6)
    assert index.unfindable == 1
    assert share("They asked: which planet has\nthe most moons — SATURN, he said.", items)[:2] == (0, 1.0)
    assert share("Which planet has the most moons? Nobody knew.", items)[1] == 1.0  # the question alone
    assert share("Which planet has the most rings? Saturn", items)[1] == 0.0
    assert share("What is 2+2? 4", items)[1] == 0.0


def test_typographic_marks_and_blanks_to_fill_in_make_no_difference() -> None:
    text = 'The author\'s "first" novel - written in 1912 - was sold to ____ for a very small sum, of course.'
    copy = (
        "The author’s “first” novel – written in 1912 – was sold to _______ for a very small sum‚ of course…"
    )
    assert share(copy, [EvaluationItem("a", (text,))])[1] == 1.0


def test_what_many_items_have_in_common_says_nothing_of_any() -> None:
    head = "The following is a question with four choices of which exactly one is right, so choose it: "
    items = [EvaluationItem(f"q#{n}", (head + prose(n, 30),)) for n in range(150)]
    assert share(head + prose(9_999, 30), items)[1] < 0.3  # the head and a word more are not common
    assert share(items[7].text, items)[:2] == (7, 1.0)


def test_the_annotator_and_its_rules(tmp_path: Path) -> None:
    from lapis.data.columns import Columns, part_file, part_writer

    items = questions(4)
    config = write_set(tmp_path, items)
    annotator = OverlapAnnotator(config)
    assert annotator.facts() == OverlapAnnotator(config).facts()
    texts = [
        prose(50, 200),
        f"{prose(51, 300)} {items[2].text}",
        prose(52, 60) + " " + items[0].columns[0][:100],
    ]
    with part_writer(part_file(tmp_path, 0), annotator.schema) as writer:
        writer.write(annotator.annotate(Chunk([Document(text, "s", "p") for text in texts])))
    attributes = {"overlap": Columns(tmp_path, annotator.schema)}
    assert attributes["overlap"].numbers("item").tolist()[:2] == [-1, 2]
    first, second = overlap_rules(config)
    assert first.hit(attributes).tolist() == [False, True, False]
    assert second.hit(attributes).tolist() == [False, False, False]
    assert overlap_rules(DecontaminationConfig()) == []


def test_the_gate_measures_every_kind_of_change_and_passes(tmp_path: Path) -> None:
    hosts = [prose(2_000 + n, 300) for n in range(40)]
    result = check_gate(write_set(tmp_path, questions(60)), hosts)
    assert set(result.recall) == {"exact", "rewrapped", "case", "punctuation", "embedded", "all together"}
    assert min(result.recall.values()) >= 0.95
    assert result.false_positives <= 0.05
    assert result.found_before == 0
    assert result == check_gate(write_set(tmp_path, questions(60)), hosts)
    refuse_failed(result)


def test_the_gate_fails_where_no_item_can_be_found(tmp_path: Path) -> None:
    config = write_set(tmp_path, questions(40, 30)).model_copy(update={"ngram": 50, "short": 60})
    result = check_gate(config, [prose(1, 300)])
    assert result.unfindable == 40
    with pytest.raises(InputError, match="gate failed"):
        refuse_failed(result)


def test_the_gate_notices_a_comparison_that_punctuation_disturbs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lapis.data.contamination_gate.plain_words", split_words)
    result = check_gate(write_set(tmp_path, questions(40)), [prose(1, 300)])
    assert result.recall["exact"] == 1.0
    assert result.recall["punctuation"] < 0.95
    assert not result.passed


def test_documents_that_are_contaminated_before_do_not_count_as_hosts(tmp_path: Path) -> None:
    items = questions(30)
    hosts = [items[0].text, *(prose(3_000 + n, 200) for n in range(10))]
    assert check_gate(write_set(tmp_path, items), hosts).found_before == 1


def test_sets_are_read_from_jsonl_parquet_and_text(tmp_path: Path) -> None:
    rows = [
        {"question": "one", "choices": ["a", "b"], "answer": 1},
        {"question": "two", "choices": [], "answer": 0},
    ]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    (tmp_path / "x.txt").write_text("one\ntwo\n\nthree\n\n\n")
    columns = ("question", "choices")
    for ending in ("jsonl", "parquet"):
        items = read_items(EvaluationSet(path=str(tmp_path / f"x.{ending}"), columns=columns))
        assert [item.columns for item in items] == [("one", "a\nb"), ("two",)]
    assert [item.text for item in read_items(EvaluationSet(path=str(tmp_path / "x.txt")))] == [
        "one\ntwo",
        "three",
    ]


@pytest.mark.parametrize(
    ("name", "columns", "message"),
    [
        ("x.jsonl", ("question", "missing"), "Line 1 of .* cannot be used"),
        ("x.jsonl", (), "Which columns"),
        ("bad.jsonl", ("question",), "Line 2 of .* cannot be used"),
        ("x.csv", ("question",), "its ending is .csv"),
        ("empty.txt", (), "no item with text"),
        ("x.parquet", ("missing",), "cannot be read"),
    ],
)
def test_a_set_that_cannot_be_used_is_refused(
    tmp_path: Path, name: str, columns: tuple[str, ...], message: str
) -> None:
    (tmp_path / "x.jsonl").write_text('{"question": "q"}\n')
    (tmp_path / "bad.jsonl").write_text('{"question": "q"}\nnot json\n')
    (tmp_path / "x.csv").write_text("question\nq\n")
    (tmp_path / "empty.txt").write_text("\n\n")
    parquet.write_table(pa.Table.from_pylist([{"question": "q"}]), tmp_path / "x.parquet")
    with pytest.raises(InputError, match=message):
        read_items(EvaluationSet(path=str(tmp_path / name), columns=columns))


def test_a_missing_set_is_named(tmp_path: Path) -> None:
    config = DecontaminationConfig(sets=(EvaluationSet(path=str(tmp_path / "no.jsonl"), columns=("q",)),))
    with pytest.raises(InputError, match="no file"):
        OverlapAnnotator(config).facts()
