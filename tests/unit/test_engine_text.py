"""Text is sent in whole characters and never holds a part of a stop string."""

from __future__ import annotations

from itertools import pairwise

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from lapis.inference.text import StopText


def sent(pieces: list[str], stops: list[str]) -> tuple[str, bool]:
    stop = StopText(stops)
    text = "".join(stop.push(piece) for piece in pieces)
    return text + stop.finish(), stop.stopped


@pytest.mark.parametrize(
    ("pieces", "stops", "expected"),
    [
        (["hello"], [], ("hello", False)),
        (["one EN", "D two"], ["END"], ("one ", True)),
        (["a", "b", "c", "d"], ["bcd"], ("a", True)),
        (["ab", "ax"], ["abc"], ("abax", False)),
        (["aab"], ["ab"], ("a", True)),
        (["xxSTOP", "never"], ["STOP"], ("xx", True)),
        (["one two"], ["two", "one"], ("", True)),
        (["...", "\n"], ["\n\n"], ("...\n", False)),
        (["aaa", "aab"], ["aaaab"], ("a", True)),
    ],
)
def test_stop_strings(pieces: list[str], stops: list[str], expected: tuple[str, bool]) -> None:
    assert sent(pieces, stops) == expected


def test_a_possible_beginning_is_held_back_only_as_long_as_needed() -> None:
    stop = StopText(["\n\nUser:"])
    assert stop.push("yes\n") == "yes"
    assert stop.push("\nUs") == ""
    assert stop.push("ual") == "\n\nUsual"


@settings(max_examples=150)
@given(
    text=st.text("ab\n", max_size=12),
    cuts=st.sets(st.integers(1, 11)),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3),
)
def test_however_the_text_is_cut(text: str, cuts: set[int], stops: list[str]) -> None:
    edges = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    pieces = [text[start:end] for start, end in pairwise(edges)]
    got, stopped = sent(pieces, stops)
    # Judge: the shortest beginning of the text that holds a stop string decides, at its earliest place.
    for end in edges:
        places = [text[:end].find(stop) for stop in stops if stop in text[:end]]
        if places:
            assert (got, stopped) == (text[: min(places)], True)
            return
    assert (got, stopped) == (text, False)
