"""The quality rules of a recipe: which sets of published thresholds are used, and each threshold by itself.

A set fills in the thresholds it knows; what the recipe says itself goes before it; what neither says is off.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from lapis.config import Section

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Limit = Annotated[float, Field(ge=0)]
RuleSet = Literal["lapis", "gopher-quality", "gopher-repetition", "c4", "fineweb"]

_QUALITY: dict[str, Any] = {
    "min_words": 50,
    "mean_word": (3.0, 10.0),
    "max_symbols": 0.1,
    "max_bullets": 0.9,
    "max_ellipses": 0.3,
    "min_alphabetic": 0.8,
}
_REPETITION: dict[str, Any] = {
    "max_duplicate_lines": 0.3,
    "max_duplicate_line_chars": 0.2,
    "max_duplicate_paragraphs": 0.3,
    "max_duplicate_paragraph_chars": 0.2,
    "max_top_ngram": (0.20, 0.18, 0.16),
    "max_duplicate_ngram": (0.15, 0.14, 0.13, 0.12, 0.11, 0.10),
}
RULE_SETS: dict[RuleSet, dict[str, Any]] = {
    "lapis": {**_QUALITY, "max_word": 1000, **_REPETITION},
    "gopher-quality": {**_QUALITY, "max_words": 100_000, "min_stop_words": 2},
    "gopher-repetition": _REPETITION,
    "c4": {
        "c4_line_end": True,
        "min_sentences": 5,
        "cut_lines": True,
        "lorem_ipsum": False,
        "curly_brackets": False,
    },
    "fineweb": {
        "min_ended_lines": 0.12,
        "max_short_lines": 0.67,
        "max_repeated_line_chars": 0.1,
        "max_newlines": 0.3,
    },
}


class ProseRules(Section):
    """Limits for prose; words are what white space separates. A limit that is unset is no rule.

    Gopher: arXiv 2112.11446, appendix A1.1 and table A1. C4: arXiv 1910.10683, section 2.2, and its code. FineWeb:
    arXiv 2406.17557, section 3.6.
    """

    min_words: Count | None = 50
    """Fewest words that are not symbols alone (Gopher)."""
    max_words: Positive | None = None
    """Most words that are not symbols alone (Gopher: 100,000)."""
    mean_word: tuple[float, float] | None = (3.0, 10.0)
    """Smallest and largest mean length of those words, in characters (Gopher)."""
    max_symbols: Limit | None = 0.1
    """Most hash signs per word, and most ellipses per word (Gopher)."""
    max_bullets: Limit | None = 0.9
    """Most lines that start with a bullet, as a fraction (Gopher)."""
    max_ellipses: Limit | None = 0.3
    """Most lines that end in an ellipsis, as a fraction (Gopher)."""
    min_alphabetic: Limit | None = 0.8
    """Fewest words with at least one letter, as a fraction (Gopher)."""
    min_stop_words: Count | None = None
    """Fewest different words of {the, be, to, of, and, that, have, with} (Gopher: 2); drops other languages."""
    max_word: Positive | None = 1000
    """Longest word, in characters."""
    max_duplicate_lines: Limit | None = 0.3
    """Most lines that repeat an earlier one, as a fraction (Gopher)."""
    max_duplicate_line_chars: Limit | None = 0.2
    """Most characters in lines that repeat an earlier one, as a fraction (Gopher)."""
    max_duplicate_paragraphs: Limit | None = 0.3
    """Most paragraphs that repeat an earlier one, as a fraction (Gopher)."""
    max_duplicate_paragraph_chars: Limit | None = 0.2
    """Most characters in paragraphs that repeat an earlier one, as a fraction (Gopher)."""
    max_top_ngram: tuple[float, ...] | None = (0.20, 0.18, 0.16)
    """Most characters in the commonest 2-gram, 3-gram and 4-gram, as fractions (Gopher)."""
    max_duplicate_ngram: tuple[float, ...] | None = (0.15, 0.14, 0.13, 0.12, 0.11, 0.10)
    """Most characters in repeated 5-grams to 10-grams, as fractions (Gopher)."""
    min_sentences: Count | None = None
    """Fewest sentences in lines that C4's line rules keep (C4: 5)."""
    c4_line_end: bool = False
    """Whether those lines must end in . ? ! or a quotation mark (C4: true; FineWeb's use of C4: false)."""
    cut_lines: bool = False
    """Whether the lines that C4's line rules drop are taken out of the texts that are kept (C4: true)."""
    lorem_ipsum: bool = True
    """Whether texts with "lorem ipsum" are kept (C4: false)."""
    curly_brackets: bool = True
    """Whether texts with an opening curly bracket are kept (C4: false)."""
    min_ended_lines: Limit | None = None
    """Fewest lines that end in a mark that ends sentences, as a fraction (FineWeb: 0.12)."""
    max_short_lines: Limit | None = None
    """Most lines of up to 30 characters, as a fraction (FineWeb: 0.67)."""
    max_repeated_line_chars: Limit | None = None
    """Most characters in lines that repeat an earlier one, line ends not counted (FineWeb's paper: 0.1)."""
    max_newlines: Limit | None = None
    """Most line ends per word (FineWeb: 0.3)."""

    @model_validator(mode="after")
    def _texts_remain(self) -> ProseRules:
        if self.cut_lines and not self.min_sentences:
            raise ValueError("cut_lines may leave nothing of a text: set min_sentences too")
        return self


class CodeRules(Section):
    """Limits for code, after Codex (arXiv 2107.03374, section 3.1) and StarCoder (arXiv 2305.06161)."""

    min_chars: Count = 64
    """Fewest characters of a document."""
    max_mean_line: Limit = 100.0
    """Longest mean line, in characters: longer ones are minified or data."""
    max_line: Positive = 1000
    """Longest line, in characters."""
    min_alphanumeric: Limit = 0.25
    """Fewest letters and digits, as a fraction of all characters."""
    max_digits: Limit = 0.5
    """Most digits, as a fraction of what is no white space: more of them is a table of numbers."""
    generated: bool = False
    """Whether files that say they are generated are kept."""


class FilterConfig(Section):
    """The quality rules."""

    enabled: bool = True
    """Whether documents that break a rule are dropped."""
    rules: tuple[RuleSet, ...] = ("lapis",)
    """Sets of thresholds for prose, each filled in where the table prose says nothing."""
    prose: ProseRules = ProseRules()
    """Limits for prose."""
    code: CodeRules = CodeRules()
    """Limits for code."""

    @model_validator(mode="before")
    @classmethod
    def _filled_in(cls, values: Any) -> Any:
        """The table prose with every threshold that the sets name."""
        if not isinstance(values, dict) or isinstance(values.get("prose"), ProseRules):
            return values
        named, prose = values.get("rules", ("lapis",)), values.get("prose", {})
        if not isinstance(prose, dict) or not all(name in RULE_SETS for name in named):
            return values  # the fields say what is wrong
        limits: dict[str, Any] = {
            name: None for name, field in ProseRules.model_fields.items() if field.annotation is not bool
        }
        for name in named:
            limits |= RULE_SETS[name]
        return {**values, "prose": limits | prose}
