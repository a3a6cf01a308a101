"""Where in a text personal data can stand at all: lines with an @, with many digits together, with a long token.

Nine tenths of all text has none of it, and numpy says so many times faster than patterns do. What a hint asks for is
part of every find of its detectors, so nothing is missed: `pii.find` is the judge.

Letters: N characters of a chunk, one byte each (what is not ASCII becomes `?`), P places.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

import numpy as np
from numpy.typing import NDArray


class Hint(Enum):
    """What a line must have for a detector to look at it."""

    AT = "@"
    DIGITS = "7 digits within 16 characters"
    IPV4 = "3 dots between digits within 8 characters"
    IPV6 = "a colon after four characters that begin with 2 or 3"
    PRIVATE_KEY = "the middle of the word PRIVATE: the whole text is looked at"
    TOKEN = "16 characters of tokens in one, a digit beside a letter among them; or a prefix of tokens without digits"


Bytes = NDArray[np.uint8]
Places = NDArray[np.int64]
Lines = list[dict[Hint, list[tuple[int, int]]]]

# What a number can have before its first 7 digits that are close together, and from there on, with room to spare.
_BEFORE, _AFTER = 48, 96
_PAD = 24  # more than any hint looks ahead or back
_TOKEN = bytes((chr(byte).isalnum() and byte < 128) or byte in b"_-+/=.~!@#$%^&*:" for byte in range(256))
_TOKEN_LENGTH = 16  # at least 15, so that there are 8 whole ones at a multiple of 8 among them
_FULL = np.uint64(0x0101010101010101)


def hinted_lines(texts: Sequence[str]) -> Lines:
    """For each text and hint, the stretches (start, end) in which a find can be: whole lines, or parts of long ones."""
    chunk, begin_D1 = _joined(texts)
    chunk_N = np.frombuffer(chunk, dtype=np.uint8)
    lines: Lines = [{} for _ in texts]
    newline_P = None
    for hint, place_P in _places(chunk).items():
        if not len(place_P):
            continue
        if newline_P is None:
            newline_P = np.flatnonzero(chunk_N == 10)
        place_P = place_P[np.r_[True, np.diff(place_P) > 1]]  # neighbours are in one line
        after_P = np.searchsorted(newline_P, place_P)
        start_P, end_P = newline_P[after_P - 1] + 1, newline_P[after_P]
        document_P = np.searchsorted(begin_D1, start_P, side="right") - 1
        if hint is Hint.DIGITS:
            start_P, end_P = np.maximum(start_P, place_P - _BEFORE), np.minimum(end_P, place_P + _AFTER)
        # stretches that overlap or follow each other in one text are one
        apart_P = (start_P[1:] > end_P[:-1] + 1) | (np.diff(document_P) > 0)
        first_P, last_P = np.r_[True, apart_P], np.r_[apart_P, True]
        documents = document_P[first_P]
        low_P, high_P = start_P[first_P] - begin_D1[documents], end_P[last_P] - begin_D1[documents]
        for document, low, high in zip(documents.tolist(), low_P.tolist(), high_P.tolist(), strict=True):
            lines[document].setdefault(hint, []).append((low, high))
    return lines


def _joined(texts: Sequence[str]) -> tuple[bytes, Places]:
    """The texts with line ends around, a byte a character; where each begins."""
    edge = b"\n" * _PAD
    parts = [edge, *(part for text in texts for part in (text.encode("ascii", "replace"), b"\n")), edge]
    begin_D1 = np.full(len(texts) + 1, _PAD, dtype=np.int64)
    begin_D1[1:] += np.cumsum([len(text) + 1 for text in texts])
    return b"".join(parts), begin_D1


def _one_byte(text: str) -> bytes:
    if text.isascii():
        return text.encode()
    return (
        np.minimum(np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32), 255).astype(np.uint8).tobytes()
    )


def _places(chunk: bytes) -> dict[Hint, Places]:
    chunk_N = np.frombuffer(chunk, dtype=np.uint8)
    digit_P = np.flatnonzero(_digit(chunk_N))
    dot_P = digit_P[chunk_N[digit_P + 1] == ord(".")]
    dot_P = dot_P[_digit(chunk_N[dot_P + 2])]
    i_P = np.flatnonzero(chunk_N == ord("I"))
    colon_P = np.flatnonzero(chunk_N == ord(":"))
    first_P = chunk_N[colon_P - 4]
    return {
        Hint.AT: np.flatnonzero(chunk_N == ord("@")),
        Hint.DIGITS: digit_P[:-6][digit_P[6:] - digit_P[:-6] < 16],
        Hint.PRIVATE_KEY: _private(chunk_N, i_P),
        Hint.IPV4: dot_P[:-2][dot_P[2:] - dot_P[:-2] <= 8],
        Hint.IPV6: colon_P[(first_P == ord("2")) | (first_P == ord("3"))],
        Hint.TOKEN: _tokens(chunk, digit_P, i_P),
    }


def _private(chunk_N: Bytes, i_P: Places) -> Places:
    """Where `RIV` stands."""
    found_P: Places = i_P[(chunk_N[i_P - 1] == ord("R")) & (chunk_N[i_P + 1] == ord("V"))]
    return found_P


def _tokens(chunk: bytes, digit_P: Places, i_P: Places) -> Places:
    """Digits beside a letter, in a run of 16 characters of tokens."""
    chunk_N = np.frombuffer(chunk, dtype=np.uint8)
    token_N = np.frombuffer(chunk.translate(_TOKEN), dtype=np.uint8)
    full_B = np.r_[False, token_N[: len(token_N) // 8 * 8].view(np.uint64) == _FULL, False, False]
    block_P = digit_P >> 3
    place_P = digit_P[full_B[block_P] | full_B[block_P + 1] | full_B[block_P + 2]]
    place_P = place_P[_letter(chunk_N[place_P - 1]) | _letter(chunk_N[place_P + 1])]
    token_PX = token_N[place_P[:, None] + np.arange(1 - _TOKEN_LENGTH, _TOKEN_LENGTH)]
    before_P = np.cumprod(token_PX[:, _TOKEN_LENGTH - 2 :: -1], axis=1, dtype=np.uint8).sum(axis=1)
    after_P = np.cumprod(token_PX[:, _TOKEN_LENGTH:], axis=1, dtype=np.uint8).sum(axis=1)
    found_P = place_P[before_P + 1 + after_P >= _TOKEN_LENGTH]
    every_P: Places = np.sort(np.r_[found_P, _without_digits(chunk_N, i_P)])
    return every_P


def _without_digits(chunk_N: Bytes, i_P: Places) -> Places:
    """Where `hf_`, `AKIA` or `ASIA` stands: the tokens after them can do without digits."""
    line_P = np.flatnonzero(chunk_N == ord("_"))
    line_P = line_P[(chunk_N[line_P - 1] == ord("f")) & (chunk_N[line_P - 2] == ord("h"))]
    i_P = i_P[(chunk_N[i_P + 1] == ord("A")) & (chunk_N[i_P - 2] == ord("A"))]
    i_P = i_P[(chunk_N[i_P - 1] == ord("K")) | (chunk_N[i_P - 1] == ord("S"))]
    return np.concatenate([line_P, i_P])


def _digit(values: Bytes) -> NDArray[np.bool_]:
    return (values - np.uint8(ord("0"))) < 10


def _letter(values: Bytes) -> NDArray[np.bool_]:
    return ((values | 0x20) - np.uint8(ord("a"))) < 26
