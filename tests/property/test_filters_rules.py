"""Text repair and cutting: nothing is lost, nothing broken comes out."""

from __future__ import annotations

import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from lapis.data.document import Document
from lapis.data.filters import QualityAnnotator, quality_rules
from lapis.data.formats.part import cut
from lapis.data.repair import repair
from lapis.data.thresholds import RULE_SETS, FilterConfig
from tests.attributes import reasons

ANY = st.text(st.characters(exclude_categories=("Cs",)), max_size=300)
LINES = st.text("ab #.\n\r\t…é東- 12", max_size=300)


@given(ANY | LINES)
def test_repair_is_idempotent_and_gives_nfc_without_control_characters(text: str) -> None:
    fixed = repair(text)
    assert repair(fixed) == fixed
    assert unicodedata.is_normalized("NFC", fixed)
    assert not set(fixed) & {"\r", "\0", "\x07", "\x7f", "\u2028"}


@given(ANY | LINES, st.integers(2, 50))
def test_the_pieces_of_a_text_make_up_the_text(text: str, limit: int) -> None:
    pieces = list(cut(text, limit))
    assert "".join(pieces) == text
    assert all(len(piece) <= limit for piece in pieces)


@given(ANY | LINES, st.sampled_from(["prose", "code"]))
def test_every_text_gets_a_verdict(text: str, kind: str) -> None:
    document = Document(repair(text), "s", "p", "", "code" if kind == "code" else "prose")
    every = quality_rules(FilterConfig(rules=tuple(RULE_SETS)))
    assert isinstance(reasons([document], QualityAnnotator(), every)[0], str)
