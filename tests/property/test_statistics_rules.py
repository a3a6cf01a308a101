"""Text statistics and words: the compiled code finds what plain Python and numpy find, in any text."""

from __future__ import annotations

import ctypes
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lapis.data.characters import LETTER, PLAIN, SPACE, TERMINAL, UNICODE, classes
from lapis.data.native import native
from lapis.data.statistics import COLUMNS, compiled_statistics, statistics
from lapis.data.statistics_plain import statistics_of
from lapis.data.words import compiled_words, numpy_words

ANY = st.text(st.characters(exclude_categories=("Cs",)), max_size=400)
PIECES = (
    "a", "b", "ab ", " ", "\n", "\n\n", "  \n", ".", "...", "…", "• x", "- y", "#", "{", "!", "?", '"', "'", ")", "]",
    "[12]", "[edit]", "[citation needed]", "the ", "of ", "Use ", "terms ", "cookies ", "uses ", "privacy ", "policy",
    "cookie ", "Lorem ", "ipsum", "javaScript", "。", "東京", "ไทย ", "กx", "𠀀a", "é", "\u3000", "\u00a0", "\u2003",
    "7", "x" * 1001, "a longer line of seven words here", "0123456789",
)  # fmt: skip
LINES = st.lists(st.sampled_from(PIECES), max_size=60).map("".join)
FEW_WORDS = st.lists(st.sampled_from(["a", "b", "cc", "ddddddddd"]), max_size=80).map(" ".join)


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    found = native()
    if found is None:
        pytest.skip("the compiled part was not built here")
    return found


@settings(max_examples=60)
@given(texts=st.lists(ANY | LINES | FEW_WORDS, max_size=5))
def test_compiled_statistics_are_those_of_plain_python(library: ctypes.CDLL, texts: list[str]) -> None:
    found = compiled_statistics(library, texts)
    for text, row in zip(texts, found.tolist(), strict=True):
        assert dict(zip(COLUMNS, row, strict=True)) == dict(zip(COLUMNS, statistics_of(text), strict=True))


@given(texts=st.lists(ANY | LINES, max_size=5))
def test_compiled_words_are_those_of_numpy(library: ctypes.CDLL, texts: list[str]) -> None:
    chunk = np.frombuffer("\n".join([*texts, ""]).lower().encode(), dtype=np.uint8)
    for fast, slow in zip(compiled_words(library, chunk), numpy_words(chunk), strict=True):
        assert (fast.dtype, fast.tolist()) == (slow.dtype, slow.tolist())


def test_they_are_the_same_on_real_files(library: ctypes.CDLL) -> None:
    texts = [
        path.read_text(encoding="utf-8")
        for path in sorted(Path(unicodedata.__file__ or "").parent.glob("*.py"))
    ]
    texts += [path.read_text(encoding="utf-8") for path in sorted(Path(pytest.__file__).parent.glob("*.py"))]
    texts += [(Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")]
    assert compiled_statistics(library, texts).tolist() == [statistics_of(text) for text in texts]


def test_without_the_library_the_numbers_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["One. Two. Three… 東京は。", "", "a b a b a b\n\na b a b a b\n"]
    before = statistics(texts).tolist()
    native.cache_clear()
    monkeypatch.setenv("LAPIS_NO_KERNELS", "1")
    assert native() is None
    assert statistics(texts).tolist() == before
    native.cache_clear()


@pytest.mark.skipif(
    unicodedata.unidata_version != UNICODE, reason="this Python has another version of Unicode"
)
def test_character_classes_are_those_of_unicode() -> None:
    table = classes()
    for point in range(0, sys.maxunicode + 1, 7):
        character = chr(point)
        assert bool(table[point] & LETTER) == character.isalpha()
        assert bool(table[point] & PLAIN) == (unicodedata.category(character)[0] in "LMN")
        assert bool(table[point] & SPACE) == character.isspace()
    assert all(table[ord(mark)] & TERMINAL for mark in ".!?。！؟।")
    assert not any(table[ord(mark)] & TERMINAL for mark in ",;:-…")


def test_each_statistic_counts_what_its_name_says() -> None:
    text = "- The end of it...\n\n  #1 Go on. Read (more).\nThe end\nThe end\n"
    found = dict(zip(COLUMNS, statistics([text])[0].tolist(), strict=True))
    assert found["words"] == len(text.split())
    assert (found["plain_words"], found["stop_words"], found["hashes"], found["ellipses"]) == (13, 1, 1, 1)
    assert (found["lines"], found["bullet_lines"], found["ellipsis_lines"], found["ended_lines"]) == (
        5,
        1,
        1,
        2,
    )
    assert (found["duplicate_lines"], found["duplicate_line_chars"]) == (1, len("The end"))
    assert found["top_2gram"] == 3 * len("The end") and found["top_4gram"] == 0
    assert (found["c4_lines"], found["c4_sentences"], found["c4_any_lines"]) == (1, 2, 2)
