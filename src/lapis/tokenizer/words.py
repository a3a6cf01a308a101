"""Encoding by remembered words: the ids of Hugging Face `tokenizers`, several times faster on ASCII text.

Most words of a corpus repeat, so the ids of each word are asked for once. ASCII text is cut into words by
Python's `re`; text beyond ASCII, where two regular-expression engines may know different versions of Unicode,
goes to `tokenizers`, line by line. The cut between lines is exact: no word of the split pattern reaches from
a line end to a following character that is no white space.
"""

from __future__ import annotations

import json
import re
from itertools import chain, groupby

from tokenizers import Tokenizer as HFTokenizer

LARGEST = 1 << 20  # words remembered at most

_LINES = re.compile(r"(?<=\n)(?=[!-~])")
_WORDS = re.compile(
    r"'(?:[sdmtSDMT]|[lL][lL]|[vV][eE]|[rR][eE])|[^\r\na-zA-Z0-9]?[a-zA-Z]+|[0-9]{1,3}"
    r"| ?[^\sa-zA-Z0-9]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    re.ASCII,
)


class WordEncoder(dict[str, list[int]]):
    """Ids of words, each computed when it is first asked for."""

    def __init__(self, inner: HFTokenizer) -> None:
        super().__init__()
        self._inner = inner

    @staticmethod
    def fits(inner: HFTokenizer, split: str) -> bool:
        """Whether a tokenizer cuts text by this split pattern and nothing else, so that words can be cached."""
        facts = json.loads(inner.to_str())
        steps = (facts["pre_tokenizer"] or {}).get("pretokenizers", [])
        return (
            [step["type"] for step in steps] == ["Split", "ByteLevel"]
            and steps[0]["pattern"] == {"Regex": split}
            and steps[0]["behavior"] == "Isolated"
            and not steps[0]["invert"]
            and not steps[1]["add_prefix_space"]
            and not steps[1]["use_regex"]
            and facts["normalizer"] is None
            and all(token["special"] for token in facts["added_tokens"])
        )

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        if text.isascii():
            return self._ascii(text)
        ids: list[int] = []
        for ascii_only, lines in groupby(_LINES.split(text), str.isascii):
            part = "".join(lines)
            ids += self._ascii(part) if ascii_only else self._inner.encode(part, add_special_tokens=False).ids
        return ids

    def _ascii(self, text: str) -> list[int]:
        if len(self) > LARGEST:
            self.clear()
        return list(chain.from_iterable(map(self.__getitem__, _WORDS.findall(text))))

    def __missing__(self, word: str) -> list[int]:
        ids: list[int] = self._inner.encode(word, add_special_tokens=False).ids
        self[word] = ids
        return ids
