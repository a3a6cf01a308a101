"""What is guessed, and how often."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from lapis.inference.speculation import LONGEST, MOST_PATIENCE, SHORTEST, Pace, propose


@pytest.mark.parametrize(
    ("ids", "drafts"),
    [
        ([1, 2, 3, 4, 9, 1, 2], (3, 4, 9)),
        ([1, 2, 3, 1, 2, 4, 1, 2], (4, 1, 2)),  # the latest place counts
        ([5, 1, 2, 3, 4, 6, 1, 2, 7, 5, 1, 2], (3, 4, 6)),  # unless more tokens agree elsewhere
        ([7, 7, 7], (7, 7, 7)),
        ([9, 1, 2, 1, 2], (1, 2, 1)),  # a repetition goes on
        ([1, 2, 3], ()),
        ([1], ()),
        ([256, 1, 65536, 1, 256, 1], (65536, 1, 256)),
    ],
)
def test_what_followed_before_is_proposed(ids: list[int], drafts: tuple[int, ...]) -> None:
    assert propose(ids, 3) == drafts


def plainly(ids: list[int], most: int) -> tuple[int, ...]:
    for length in range(min(LONGEST, len(ids) - 1), SHORTEST - 1, -1):
        for start in range(len(ids) - length - 1, -1, -1):
            if ids[start : start + length] == ids[len(ids) - length :]:
                text = list(ids)
                while len(text) < len(ids) + most:
                    text.append(text[start + length + len(text) - len(ids)])
                return tuple(text[len(ids) :])
    return ()


@given(st.lists(st.sampled_from([0, 1, 256, 65536, 2**24]), min_size=1, max_size=40), st.integers(0, 5))
def test_it_finds_what_a_plain_search_finds(ids: list[int], most: int) -> None:
    assert propose(ids, most) == (plainly(ids, most) if most else ())


def test_drafts_that_fail_become_rare_and_come_back_when_they_are_right() -> None:
    pace = Pace()
    proposals = 0
    for _ in range(1000):
        if count := pace.ready(8):
            proposals += 1
            pace.learn(count, 0, 8)
    assert proposals < 10 + 1000 / MOST_PATIENCE
    while not (count := pace.ready(8)):
        pass
    pace.learn(count, count, 8)
    assert pace.ready(8) == 2 * count
