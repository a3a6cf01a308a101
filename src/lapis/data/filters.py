"""The quality rules: statistics of every document as attributes, and predicates that compare them with thresholds.

The annotator knows no threshold, so moving one reads no text again. Rules on words do not apply to scripts that
write no spaces; C4's rules are for lines of words and leave those scripts alone too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lapis.data.annotate import Chunk
from lapis.data.characters import UNICODE
from lapis.data.columns import Columns, Mask
from lapis.data.decide import Attributes, Rule
from lapis.data.document import Document
from lapis.data.statistics import COLUMNS, SPLITTER, statistics
from lapis.data.thresholds import CodeRules, FilterConfig, ProseRules

GENERATED = re.compile(
    r"@generated|auto(?:matically|-|\s)?\s?generated|machine.generated|do not (?:edit|modify)"
    r"|\b(?:file|code|module|codec)\b.{0,20}\bgenerated (?:by|from|with)\b",
    re.IGNORECASE,
)

MOSTLY_UNSPACED = 0.2  # of the characters: then the text's words are not what white space separates

_Predicate = Callable[[Columns], Mask]


@dataclass(frozen=True)
class QualityAnnotator:
    """Writes the statistics of each document, and whether a file of code says that it is generated."""

    name: str = "quality"
    version: int = 2

    @property
    def schema(self) -> pa.Schema:
        """Whole numbers, and one truth value."""
        return pa.schema([*((name, pa.int32()) for name in COLUMNS), ("generated", pa.bool_())])

    def facts(self) -> dict[str, Any]:
        """The splitter and the version of Unicode; no threshold."""
        return {"splitter": SPLITTER, "unicode": UNICODE, "generated": GENERATED.pattern}

    def annotate(self, chunk: Chunk) -> pa.RecordBatch:
        """The statistics of a chunk."""
        rows = statistics(chunk.texts)
        columns = [pa.array(np.ascontiguousarray(column)) for column in rows.T]
        generated = pa.array([_says_generated(document) for document in chunk.documents], type=pa.bool_())
        return pa.RecordBatch.from_arrays([*columns, generated], schema=self.schema)


def _says_generated(document: Document) -> bool:
    if document.kind != "code":
        return False
    return GENERATED.search("\n".join(document.text.split("\n", 10)[:10])) is not None


def quality_rules(config: FilterConfig) -> list[Rule]:
    """The rules that a recipe's thresholds turn on."""
    if not config.enabled:
        return []
    code = [Rule("quality", reason, partial(_of_kind, "code", hit)) for reason, hit in _for_code(config.code)]
    prose = [
        Rule("quality", reason, partial(_of_kind, "prose", hit)) for reason, hit in _for_prose(config.prose)
    ]
    return code + prose


def _of_kind(kind: str, hit: _Predicate, attributes: Attributes) -> Mask:
    return attributes["documents"].equal("kind", kind) & hit(attributes["quality"])


def _for_code(rules: CodeRules) -> Iterator[tuple[str, _Predicate]]:
    yield "too short", partial(_less, "chars", rules.min_chars)
    yield "a line too long", partial(_more, "longest_line", rules.max_line)
    yield "lines too long", lambda at: _share(at, "chars", at.numbers("newlines") + 1) > rules.max_mean_line
    if not rules.generated:
        yield "generated", lambda at: at.numbers("generated")
    yield "too few letters", lambda at: _alphanumeric(at) < rules.min_alphanumeric
    yield "mostly numbers", partial(_more_of, "digits", "word_chars", rules.max_digits)


def _for_prose(rules: ProseRules) -> Iterator[tuple[str, _Predicate]]:
    yield from _on_words(rules)
    yield from _on_lines(rules)
    yield from _on_repetition(rules)
    yield from _of_c4(rules)
    yield from _of_fineweb(rules)


def _on_words(rules: ProseRules) -> Iterator[tuple[str, _Predicate]]:
    if rules.min_words is not None:
        yield "too few words", _spaced(partial(_less, "plain_words", rules.min_words))
    if rules.max_words is not None:
        yield "too many words", _spaced(partial(_more, "plain_words", rules.max_words))
    if rules.mean_word is not None:
        yield (
            "mean word length",
            _spaced(partial(_outside, "plain_word_chars", "plain_words", rules.mean_word)),
        )
    if rules.max_word is not None:
        yield "a word too long", _spaced(partial(_more, "longest_word", rules.max_word))
    if rules.max_symbols is not None:
        yield "too many hash signs", _spaced(partial(_more_of, "hashes", "words", rules.max_symbols))
        yield "too many ellipses", _spaced(partial(_more_of, "ellipses", "words", rules.max_symbols))
    if rules.min_alphabetic is not None:
        yield (
            "too few words with letters",
            _spaced(partial(_less_of, "lettered_words", "words", rules.min_alphabetic)),
        )
    if rules.min_stop_words is not None:
        yield "too few stop words", _spaced(partial(_less, "stop_words", rules.min_stop_words))


def _on_lines(rules: ProseRules) -> Iterator[tuple[str, _Predicate]]:
    if rules.max_bullets is not None:
        yield "too many bullets", partial(_more_of, "bullet_lines", "lines", rules.max_bullets)
    if rules.max_ellipses is not None:
        yield (
            "too many lines end in an ellipsis",
            partial(_more_of, "ellipsis_lines", "lines", rules.max_ellipses),
        )


def _on_repetition(rules: ProseRules) -> Iterator[tuple[str, _Predicate]]:
    for reason, column, of, limit in (
        ("repeated paragraphs", "duplicate_paragraphs", "paragraphs", rules.max_duplicate_paragraphs),
        (
            "text in repeated paragraphs",
            "duplicate_paragraph_chars",
            "chars",
            rules.max_duplicate_paragraph_chars,
        ),
        ("repeated lines", "duplicate_lines", "line_pieces", rules.max_duplicate_lines),
        ("text in repeated lines", "duplicate_line_chars", "chars", rules.max_duplicate_line_chars),
    ):
        if limit is not None:
            yield reason, partial(_more_of, column, of, limit)
    if rules.max_top_ngram:
        tops = tuple(f"top_{n}gram" for n in range(2, 5))
        yield "one phrase again and again", _spaced(partial(_any_more_of, tops, rules.max_top_ngram))
    if rules.max_duplicate_ngram:
        columns = tuple(f"duplicate_{n}grams" for n in range(5, 11))
        yield "repeated phrases", _spaced(partial(_any_more_of, columns, rules.max_duplicate_ngram))


def _of_c4(rules: ProseRules) -> Iterator[tuple[str, _Predicate]]:
    kept = "c4" if rules.c4_line_end else "c4_any"
    if not rules.lorem_ipsum:
        yield "lorem ipsum", _spaced(partial(_more, f"{kept}_lorem_ipsum", 0))
    if not rules.curly_brackets:
        yield "curly brackets", _spaced(partial(_more, f"{kept}_curly", 0))
    if rules.min_sentences is not None:
        yield "too few sentences", _spaced(partial(_less, f"{kept}_sentences", rules.min_sentences))


def _of_fineweb(rules: ProseRules) -> Iterator[tuple[str, _Predicate]]:
    if rules.min_ended_lines is not None:
        yield (
            "too few lines end in a mark",
            partial(_less_of, "ended_lines", "filled_lines", rules.min_ended_lines),
        )
    if rules.max_short_lines is not None:
        yield "too many short lines", partial(_more_of, "short_lines", "filled_lines", rules.max_short_lines)
    if rules.max_repeated_line_chars is not None:
        limit = rules.max_repeated_line_chars
        yield (
            "text in repeated lines, without line ends",
            lambda at: (
                _share(at, "duplicate_filled_chars", at.numbers("chars") - at.numbers("newlines")) > limit
            ),
        )
    if rules.max_newlines is not None:
        yield "too many line ends", _spaced(partial(_more_of, "newlines", "words", rules.max_newlines))


def _spaced(hit: _Predicate) -> _Predicate:
    return lambda at: hit(at) & (_share(at, "unspaced_chars", at.numbers("chars")) < MOSTLY_UNSPACED)


def _share(at: Columns, column: str, whole: NDArray[np.int32]) -> NDArray[np.float64]:
    """A column as a share of another number; of nothing, 0."""
    part: NDArray[np.float64] = at.numbers(column) / np.maximum(whole, 1)
    return part


def _alphanumeric(at: Columns) -> NDArray[np.float64]:
    both: NDArray[np.float64] = (at.numbers("letters") + at.numbers("digits")) / np.maximum(
        at.numbers("chars"), 1
    )
    return both


def _less(column: str, limit: float, at: Columns) -> Mask:
    found: Mask = at.numbers(column) < limit
    return found


def _more(column: str, limit: float, at: Columns) -> Mask:
    found: Mask = at.numbers(column) > limit
    return found


def _less_of(column: str, of: str, limit: float, at: Columns) -> Mask:
    found: Mask = _share(at, column, at.numbers(of)) < limit
    return found


def _more_of(column: str, of: str, limit: float, at: Columns) -> Mask:
    found: Mask = _share(at, column, at.numbers(of)) > limit
    return found


def _outside(column: str, of: str, limits: tuple[float, float], at: Columns) -> Mask:
    return _less_of(column, of, limits[0], at) | _more_of(column, of, limits[1], at)


def _any_more_of(columns: tuple[str, ...], limits: tuple[float, ...], at: Columns) -> Mask:
    hits = [_more_of(column, "chars", limit, at) for column, limit in zip(columns, limits, strict=False)]
    found: Mask = np.logical_or.reduce(hits)
    return found
