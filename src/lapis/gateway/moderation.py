"""Texts looked at for what should not be said: behind a small protocol, so that a model can take the list's place.

What stands here by itself is a list of phrases. It finds those phrases and nothing else: no meaning, no irony, no
misspelling, no other language than the list's. It says so by its name.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from lapis.errors import ConfigError, nearest
from lapis.hashing import digest_json

CATEGORIES = (  # OpenAI's
    "harassment", "harassment/threatening", "hate", "hate/threatening", "illicit", "illicit/violent", "self-harm",
    "self-harm/intent", "self-harm/instructions", "sexual", "sexual/minors", "violence", "violence/graphic",
)  # fmt: skip
FLAGGED = 0.5  # scores from here on


class Moderator(Protocol):
    """What scores texts. `name` says what it is, also which version of it."""

    name: str

    def scores(self, text: str) -> Mapping[str, float]:
        """From 0 to 1 for each category that it knows; one that is not named is 0. It may be slow: call in a thread."""


class PhraseModerator:
    """A list of patterns for each category: 1 where one of them is found, else 0."""

    def __init__(self, patterns: Mapping[str, Sequence[str]]) -> None:
        """Raises ConfigError for a category that there is not, or a pattern that cannot be read."""
        self.name = (
            f"lapis-phrases-{digest_json({name: list(found) for name, found in patterns.items()})[:8]}"
        )
        self._patterns: dict[str, re.Pattern[str]] = {}
        for category, found in patterns.items():
            if category not in CATEGORIES:
                raise ConfigError(
                    f"There is no category {category!r}. {nearest(category, CATEGORIES)}".rstrip()
                )
            try:
                self._patterns[category] = re.compile("|".join(rf"(?:{one})" for one in found), re.IGNORECASE)
            except re.error as error:
                raise ConfigError(f"A pattern of {category!r} cannot be read: {error}.") from error

    def scores(self, text: str) -> Mapping[str, float]:
        """1 for the categories that have a phrase in the text."""
        return {name: float(pattern.search(text) is not None) for name, pattern in self._patterns.items()}


def read_moderator(path: Path) -> PhraseModerator:
    """The phrases of a TOML file with a list of patterns for each category; without the file, a short English list.

    Raises ConfigError.
    """
    try:
        found = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return PhraseModerator(PHRASES)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path} cannot be read: {error}.", hint='Example line: "hate" = ["some phrase"]'
        ) from error
    for category, patterns in found.items():
        if not isinstance(patterns, list) or not all(isinstance(one, str) and one for one in patterns):
            raise ConfigError(f"{path}: {category!r} must be a list of patterns, none of them empty.")
    return PhraseModerator(found)


# Few and plain on purpose: whoever needs more brings a list, or a model.
_ONE = r"(?:you|him|her|them|everyone|everybody|my \w+)"
_ALL = r"(?:jews?|muslims?|christians?|blacks?|whites?|gays?|immigrants?)"
_WILL = r"\bi(?:'ll| will| am going to|'m going to)"
PHRASES: Mapping[str, Sequence[str]] = {
    "harassment": (
        r"\byou(?:'re| are) (?:an? )?(?:worthless|idiots?|morons?|pathetic|scum)\b",
        r"\bnobody likes you\b",
    ),
    "harassment/threatening": (rf"{_WILL} (?:kill|hurt|stab|shoot|beat) {_ONE}\b",),
    "hate": (rf"\b(?:all|those) {_ALL} are (?:vermin|animals|subhuman|scum)\b",),
    "hate/threatening": (rf"\b(?:kill|gas|exterminate|shoot) (?:all|every) (?:the )?{_ALL}\b",),
    "illicit": (r"\bhow (?:to|do i) (?:shoplift|launder money|forge a|pick a lock|cook meth|steal)\b",),
    "illicit/violent": (r"\bhow (?:to|do i) (?:make|build) (?:an? )?(?:bombs?|pipe bombs?|nerve gas)\b",),
    "self-harm": (
        r"\b(?:kill|cut|hurt|harm|killing|cutting|hurting|harming) (?:myself|yourself)\b",
        r"\bsuicide\b",
    ),
    "self-harm/intent": (
        r"\bi (?:want|am going|'m going|plan) to (?:kill|hurt|cut) myself\b",
        r"\bi want to die\b",
    ),
    "self-harm/instructions": (
        r"\bhow (?:to|do i) (?:kill|cut|hang) (?:myself|yourself)\b",
        r"\bways to commit suicide\b",
    ),
    "sexual": (r"\b(?:porn|blowjob|handjob|hardcore sex)\b",),
    "sexual/minors": (r"\b(?:child (?:porn|pornography|erotica)|csam|underage (?:sex|porn))\b",),
    "violence": (rf"\b(?:kill|murder|stab|shoot|strangle|behead) {_ONE}\b",),
    "violence/graphic": (
        r"\b(?:guts|intestines|brains) (?:spill|splatter|hang)\w*\b",
        r"\bpool of (?:his|her|their|my) (?:own )?blood\b",
    ),
}
