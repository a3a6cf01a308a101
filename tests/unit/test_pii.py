"""Personal data and secrets: how well they are found, and what stands in their place."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
from data_pii import labelled, scores

from lapis.data.annotate import Chunk
from lapis.data.document import Document
from lapis.data.identifiers import is_card, is_iban
from lapis.data.masking import PiiAnnotator, pii_rules
from lapis.data.phones import is_american, is_international
from lapis.data.pii import find, find_all, masked
from lapis.data.recipe import PII_KINDS, PiiConfig
from lapis.data.training_texts import TrainingTexts

EVERY = frozenset(PII_KINDS)
# Labels at least, recall and precision at least. What has check digits has to be found nearly always.
WANTED = {
    "email": (80, 0.97, 0.97),
    "phone": (140, 0.95, 0.97),
    "ipv4": (80, 0.95, 0.95),
    "ipv6": (80, 0.97, 0.97),
    "iban": (80, 0.99, 0.99),
    "card": (80, 0.98, 0.98),
    "national_id": (140, 0.97, 0.98),
    "secret": (150, 0.95, 0.97),
}


def test_precision_and_recall_on_the_labelled_file() -> None:
    rows = labelled()
    assert sum(not spans for _, spans in rows) >= 200, "texts with nothing in them"
    found = scores(rows)
    assert set(found) == set(WANTED)
    for kind, (there, right, wrong) in found.items():
        least, recall, precision = WANTED[kind]
        assert there >= least, kind
        assert right / there >= recall, kind
        assert right / (right + wrong) >= precision, kind


def test_the_fast_form_finds_what_the_slow_one_does() -> None:
    texts = [text for text, _ in labelled()]
    long = ["\n".join(texts[n : n + 40]) for n in range(0, len(texts), 40)]
    accented = ["é" * 30 + text + "語\U0001f600 " + text for text in texts[:200]]
    every = [*texts, *long, *accented, "", "\n", "é"]
    assert find_all(every) == [find(text) for text in every]


def test_the_neighbours_in_a_chunk_do_not_matter() -> None:
    texts = [text for text, _ in labelled()][:300]
    assert find_all(texts) == [find_all([text])[0] for text in texts]


def test_the_same_value_has_the_same_placeholder_within_a_document_whatever_came_before() -> None:
    text = "Ann: ann@nordwind.de, ANN@nordwind.de; Bob: bob@nordwind.de. Call +49 30 901820 or +493090 1820."
    assert masked(text, find(text), EVERY) == (
        "Ann: <EMAIL_1>, <EMAIL_1>; Bob: <EMAIL_2>. Call <PHONE_1> or <PHONE_1>."
    )
    assert masked("bob@nordwind.de", find("bob@nordwind.de"), EVERY) == "<EMAIL_1>"


def test_what_is_masked_holds_nothing_more_to_find() -> None:
    for text, _ in labelled():
        assert find(masked(text, find(text), EVERY)) == []


def test_only_the_chosen_kinds_are_masked() -> None:
    text = "ann@nordwind.de from 84.21.3.99"
    assert masked(text, find(text), frozenset({"ip"})) == "ann@nordwind.de from <IP_1>"


@pytest.mark.parametrize(
    ("check", "right", "wrong"),
    [
        (is_iban, "GB82WEST12345698765432", "GB82WEST12345698765431"),
        (is_iban, "DE89370400440532013000", "DE8937040044053201300"),
        (is_card, "4539578763621486", "4539578763621487"),
        (is_card, "371144371144376", "4242424242424242"),
        (is_american, "2125551234", "2125550123"),
        (is_american, "4152671234", "4112671234"),
        (is_international, "493012345678", "4930"),
        (is_international, "358401234567", "210401234567"),
    ],
)
def test_numbers_are_checked(check: object, right: str, wrong: str) -> None:
    assert callable(check)
    assert check(right)
    assert not check(wrong)


def test_training_texts_are_masked_and_the_documents_are_not(tmp_path: Path) -> None:
    from lapis.data.columns import part_file, part_writer
    from lapis.data.documents import SCHEMA

    texts = ["Ünïcode first, then ann@nordwind.de\n", "nothing"]
    for folder in ("documents", "pii"):
        (tmp_path / folder).mkdir()
    rows = [
        {
            "text": text, "source": "s", "path": "p", "licence": "", "kind": "prose", "priority": 0, "raw_end": 0,
            "normal": b"0" * 16, "digest": b"0" * 16,
        }
        for text in texts
    ]  # fmt: skip
    with part_writer(part_file(tmp_path / "documents", 0), SCHEMA) as writer:
        writer.write(pa.RecordBatch.from_pylist(rows, schema=SCHEMA))
    annotator = PiiAnnotator()
    with part_writer(part_file(tmp_path / "pii", 0), annotator.schema) as writer:
        writer.write(annotator.annotate(Chunk([Document(text, "s", "p") for text in texts])))
    plain = TrainingTexts(tmp_path / "documents")
    safe = TrainingTexts(tmp_path / "documents", tmp_path / "pii", ("email",))
    assert [plain.document(row).text for row in (0, 1)] == texts
    assert [safe.document(row).text for row in (0, 1)] == ["Ünïcode first, then <EMAIL_1>\n", "nothing"]
    assert safe.document(0).id == plain.document(0).id


def test_documents_are_dropped_for_a_kind_or_for_too_many_finds(tmp_path: Path) -> None:
    from lapis.data.columns import Columns, part_file, part_writer

    annotator = PiiAnnotator()
    texts = [
        "nothing",
        "ann@nordwind.de",
        "ann@nordwind.de bob@nordwind.de eve@nordwind.de",
        "token = 'q8Zt4Lw0Xe7Rb2Vn5Ks9'",
    ]
    with part_writer(part_file(tmp_path, 0), annotator.schema) as writer:
        writer.write(annotator.annotate(Chunk([Document(text, "s", "p") for text in texts])))
    attributes = {"pii": Columns(tmp_path, annotator.schema)}

    def dropped(**settings: object) -> dict[str, list[bool]]:
        rules = pii_rules(PiiConfig.model_validate(settings))
        return {rule.reason: rule.hit(attributes).tolist() for rule in rules}

    assert dropped(max_hits=2) == {"too much personal data": [False, False, True, False]}
    assert dropped(max_hits=0, secret="drop") == {"holds secret": [False, False, False, True]}
    assert dropped(max_hits=2, email="keep") == {"too much personal data": [False] * 4}
    assert dropped(enabled=False) == {}
