"""Text statistics: everything the quality rules ask about a document, counted in one pass.

All are whole numbers, so a threshold can be moved without reading the text again and no sum depends on its order.
Words are what white space separates (`SPLITTER`); characters are code points.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lapis.data.characters import classes
from lapis.data.native import address, native
from lapis.errors import UnavailableError

SPLITTER = "white-space-1"  # as str.split, white space of Unicode 14

COLUMNS = (
    "chars", "newlines",
    "words", "plain_words", "plain_word_chars", "longest_word", "lettered_words", "stop_words", "hashes", "ellipses",
    "word_chars", "letters", "digits", "unspaced_chars",
    "lines", "bullet_lines", "ellipsis_lines", "filled_lines", "ended_lines", "short_lines", "longest_line",
    "line_pieces", "duplicate_lines", "duplicate_line_chars", "duplicate_filled_chars",
    "paragraphs", "duplicate_paragraphs", "duplicate_paragraph_chars",
    "top_2gram", "top_3gram", "top_4gram",
    "duplicate_5grams", "duplicate_6grams", "duplicate_7grams", "duplicate_8grams", "duplicate_9grams",
    "duplicate_10grams",
    "c4_long_word", "c4_unended", "c4_few_words", "c4_javascript", "c4_policy", "c4_lorem_ipsum", "c4_curly",
    "c4_lines", "c4_chars", "c4_sentences",
    "c4_any_lorem_ipsum", "c4_any_curly", "c4_any_lines", "c4_any_chars", "c4_any_sentences",
)  # fmt: skip
"""One int32 each, defined by `statistics_plain.statistics_of`. `plain` words are those that are not symbols alone;
`top_Ngram` counts characters; of the `c4` columns the first five count lines that a rule drops."""


def statistics(texts: Sequence[str]) -> NDArray[np.int32]:
    """The statistics of some texts: a row a text, a column for each of COLUMNS."""
    library = native()
    if library is None:
        from lapis.data.statistics_plain import statistics_of

        rows = [statistics_of(text) for text in texts]
        return np.array(rows, dtype=np.int32).reshape(len(texts), len(COLUMNS))
    return compiled_statistics(library, texts)


def compiled_statistics(library: ctypes.CDLL, texts: Sequence[str]) -> NDArray[np.int32]:
    """The same by the compiled code. Raises UnavailableError if the memory for it is not there."""
    assert library.lapis_statistics_columns() == len(COLUMNS)
    encoded = [text.encode() for text in texts]
    first_D1 = np.zeros(len(texts) + 1, dtype=np.int64)
    np.cumsum([len(part) for part in encoded], out=first_D1[1:])
    rows = np.empty((len(texts), len(COLUMNS)), dtype=np.int32)
    joined = b"".join([*encoded, bytes(8)])
    arguments = (joined, address(first_D1), ctypes.c_int32(len(texts)), address(classes()), address(rows))
    if not library.lapis_statistics(*arguments):
        raise UnavailableError(
            f"There is no memory for the statistics of {len(joined):,} bytes of text.",
            hint="Run again with fewer workers (--workers 1).",
        )
    return rows
