"""Licence policy as code: what a licence's text means, and whether a document under it may be trained on.

An expression is SPDX (`MIT OR (Apache-2.0 AND BSD-3-Clause)`, `GPL-2.0-only WITH Classpath-exception-2.0`), or what
stands in packages' metadata: old classifiers and common names are read as SPDX ids where it is clear what they mean. A
family can be named in a policy instead of an id. What nobody knows is "unknown", which the policy decides on too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Literal

import numpy as np

from lapis.data.columns import Mask
from lapis.data.decide import Attributes, Rule
from lapis.data.licence_names import FAMILY_OF, IDS, NAMES
from lapis.data.recipe import LicencesConfig

Verdict = Literal["allow", "unknown", "deny"]
_ORDER: tuple[Verdict, ...] = ("deny", "unknown", "allow")  # AND takes the first of both, OR the last


@dataclass(frozen=True)
class Licence:
    """One licence, with the exception that is granted to it, if any."""

    id: str
    exception: str = ""


@dataclass(frozen=True)
class Both:
    """All of these licences hold: `AND`."""

    parts: tuple[Expression, ...]


@dataclass(frozen=True)
class Either:
    """One of these licences can be chosen: `OR`."""

    parts: tuple[Expression, ...]


Expression = Licence | Both | Either


class _Unreadable(Exception):
    """The text is no expression."""


@lru_cache(maxsize=4096)
def parse(text: str) -> Expression:
    """The expression that a text says; a text that is none is one licence of that name."""
    clean = " ".join(text.split())
    known = _known(clean)
    if known:
        return known
    try:
        return _Parser(_tokens(clean)).whole()
    except _Unreadable:
        return Licence(clean)


def family(licence: Licence) -> str:
    """permissive, copyleft, non-commercial, public-domain or unknown."""
    return FAMILY_OF.get(licence.id.lower(), "unknown")


def verdict(text: str, policy: LicencesConfig) -> Verdict:
    """What a policy says of a document with this licence text."""
    return _judge(parse(text), policy) if text.strip() else "unknown"


def families(text: str) -> str:
    """The families in an expression, for reports: "permissive", "copyleft or permissive"."""
    expression = parse(text) if text.strip() else Licence("")
    return _families(expression)


def licence_rules(policy: LicencesConfig) -> list[Rule]:
    """Documents whose licence the policy denies, and those whose licence is unknown if they are dropped."""
    rules = [Rule("licences", "licence not allowed", partial(_has, "deny", policy))]
    if policy.unknown == "drop":
        rules.append(Rule("licences", "licence unknown", partial(_has, "unknown", policy)))
    return rules if policy.allow or policy.deny or policy.unknown == "drop" else []


def _has(wanted: Verdict, policy: LicencesConfig, attributes: Attributes) -> Mask:
    import pyarrow.compute as compute

    column = compute.dictionary_encode(attributes["documents"].column("licence")).combine_chunks()
    hit = np.array([verdict(text, policy) == wanted for text in column.dictionary.to_pylist()], dtype=bool)
    found: Mask = hit[column.indices.to_numpy()]
    return found


def _judge(expression: Expression, policy: LicencesConfig) -> Verdict:
    if isinstance(expression, Licence):
        return _judge_one(expression, policy)
    verdicts = [_ORDER.index(_judge(part, policy)) for part in expression.parts]
    return _ORDER[min(verdicts) if isinstance(expression, Both) else max(verdicts)]


def _judge_one(licence: Licence, policy: LicencesConfig) -> Verdict:
    """The most exact entry decides: licence with exception, licence, family; deny before allow."""
    kind = family(licence)
    names = [licence.id, kind]
    if licence.exception:
        names.insert(0, f"{licence.id} WITH {licence.exception}")
    allow, deny = _lowered(policy.allow), _lowered(policy.deny)
    for name in map(str.lower, names):
        if name in deny:
            return "deny"
        if name in allow:
            return "allow"
    if kind == "unknown":
        return "unknown"
    return "deny" if policy.allow else "allow"


@lru_cache(maxsize=64)
def _lowered(names: tuple[str, ...]) -> frozenset[str]:
    """A policy's entries as they are compared: deprecated ids as the ones that took their place."""
    return frozenset(
        name if isinstance(found, Both | Either) else _name(found) for name, found in _parsed(names)
    )


def _parsed(names: Sequence[str]) -> list[tuple[str, Expression]]:
    return [(name.lower(), parse(name)) for name in names]


def _name(licence: Licence) -> str:
    return (f"{licence.id} WITH {licence.exception}" if licence.exception else licence.id).lower()


def _families(expression: Expression) -> str:
    if isinstance(expression, Licence):
        return family(expression)
    parts = sorted({_families(part) for part in expression.parts})
    return (" and " if isinstance(expression, Both) else " or ").join(parts)


def _known(name: str) -> Expression | None:
    """A single licence by its id or a common name."""
    lowered = name.lower()
    if lowered in NAMES:
        return Licence(NAMES[lowered])
    if lowered in IDS:
        return Licence(IDS[lowered])
    if lowered.endswith("+") and f"{lowered[:-1]}-or-later" in IDS:
        return Licence(IDS[f"{lowered[:-1]}-or-later"])
    if re.fullmatch(r"licenseref-[a-z0-9.-]+", lowered):
        return Licence(name)
    return None


_LONG_NAMES = re.compile(
    "|".join(
        sorted((re.escape(name) for name in NAMES if re.search(r"[\s()/]", name)), key=len, reverse=True)
    ),
    re.IGNORECASE,
)


def _tokens(text: str) -> list[str]:
    """Operators, brackets and names. A slash between names leaves open which holds, so all of them do."""
    text = _LONG_NAMES.sub(lambda found: NAMES[found[0].lower()], text)
    text = re.sub(r"\s*/\s*|\s*;\s*|\s*,\s*", " AND ", text)
    parts = [
        part
        for piece in re.split(r"([()])", text)
        for part in re.split(r"(?:^|\s)(AND|OR|WITH)(?=\s|$)", piece, flags=re.IGNORECASE)
    ]
    return [part.strip() for part in parts if part.strip()]


class _Parser:
    """Reads tokens: AND binds more than OR, WITH more than both."""

    def __init__(self, tokens: Sequence[str]) -> None:
        self._tokens = list(tokens)
        self._at = 0

    def whole(self) -> Expression:
        found = self._either()
        if self._at < len(self._tokens):
            raise _Unreadable
        return found

    def _either(self) -> Expression:
        parts = [self._both()]
        while self._take("OR"):
            parts.append(self._both())
        return parts[0] if len(parts) == 1 else Either(tuple(parts))

    def _both(self) -> Expression:
        parts = [self._single()]
        while self._take("AND"):
            parts.append(self._single())
        return parts[0] if len(parts) == 1 else Both(tuple(parts))

    def _single(self) -> Expression:
        if self._take("("):
            inner = self._either()
            if not self._take(")"):
                raise _Unreadable
            return inner
        name = self._name()
        licence = _known(name) or Licence(name)
        if self._take("WITH"):
            if not isinstance(licence, Licence):
                raise _Unreadable
            return Licence(licence.id, self._name())
        return licence

    def _name(self) -> str:
        if self._at >= len(self._tokens) or self._tokens[self._at].upper() in ("(", ")", "AND", "OR", "WITH"):
            raise _Unreadable
        self._at += 1
        return self._tokens[self._at - 1]

    def _take(self, token: str) -> bool:
        if self._at < len(self._tokens) and self._tokens[self._at].upper() == token:
            self._at += 1
            return True
        return False
