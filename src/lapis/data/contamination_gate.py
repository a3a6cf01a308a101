"""The gate of decontamination: copies of evaluation items are put into real documents, and have to be found.

What is injected is changed as copies on the web are: wrapped anew, in other case, with other punctuation, in the middle
of other text. Beside them go decoys of the same words in another order, which must not be found.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lapis.data.decontaminate import index_of, items_of, overlap, plain_words
from lapis.data.recipe import DecontaminationConfig
from lapis.errors import InputError

LEAST_RECALL, MOST_FALSE = 0.95, 0.05
ITEMS, HOSTS = 300, 200
HOST_CHARS = 5_000
SEED = 5


@dataclass(frozen=True)
class GateResult:
    """What the gate measured: recall for each kind of change, and the part of decoys that was taken for items."""

    items: int
    unfindable: int
    recall: dict[str, float]
    false_positives: float
    found_before: int
    """Sampled documents that hold an item as they are; nothing was injected into those."""

    @property
    def passed(self) -> bool:
        """Whether every recall is high enough and false positives are rare enough."""
        return min(self.recall.values()) >= LEAST_RECALL and self.false_positives <= MOST_FALSE

    def plain(self) -> dict[str, Any]:
        """The result as JSON-ready values."""
        return {**asdict(self), "passed": self.passed}


def rewrapped(text: str) -> str:
    """Lines of 8 words."""
    words = text.split()
    return "\n".join(" ".join(words[n : n + 8]) for n in range(0, len(words), 8))


def recased(text: str) -> str:
    """Capitals and small letters in turn, word by word."""
    return re.sub(r"\S+", lambda found: found[0].upper() if found.start() % 2 else found[0].lower(), text)


# for decoys: a character of a script without spaces is a word
_WORDS = re.compile(r"[\u0e00-\u0eff\u3000-\ud7ff\U00020000-\U0003ffff]|[^\s\u0e00-\u0eff\u3000-\ud7ff]+")
_TYPOGRAPHIC = str.maketrans({'"': "”", "'": "’", "-": "–", ".": "…", "(": "[", ")": "]", ":": ";"})


def repunctuated(text: str) -> str:
    """Typographic marks for plain ones, commas gone, an exclamation mark after every seventh word."""
    words = text.translate(_TYPOGRAPHIC).replace(",", "").split(" ")
    return " ".join(word + " !" * (n % 7 == 6) for n, word in enumerate(words))


def everything(text: str) -> str:
    """All changes at once."""
    return rewrapped(recased(repunctuated(text)))


def check_gate(config: DecontaminationConfig, documents: Sequence[str]) -> GateResult:
    """Measure on some real documents, with at most 300 items; a pure function of both."""
    chance = random.Random(SEED)
    index = index_of(config)
    every = items_of(config)
    findable = sorted(set(index.item_P.tolist()))
    chosen = [every[number].text for number in chance.sample(findable, min(ITEMS, len(findable)))]
    hosts = [text[:HOST_CHARS] for text in documents[:HOSTS]]
    flagged = _found(hosts, config)
    clean = [text for text, bad in zip(hosts, flagged, strict=True) if not bad] or [""]

    def embedded(text: str) -> str:
        host = chance.choice(clean)
        place = host.find(" ", chance.randrange(len(host) + 1))
        place = len(host) if place < 0 else place
        return f"{host[:place]} {text} {host[place:]}"

    def decoy(text: str) -> str:
        words = _WORDS.findall(text)
        chance.shuffle(words)
        return embedded(" ".join(words))

    changes: dict[str, Callable[[str], str]] = {
        "exact": str,
        "rewrapped": rewrapped,
        "case": recased,
        "punctuation": repunctuated,
        "embedded": embedded,
        "all together": lambda text: embedded(everything(text)),
    }
    recall = {
        kind: float(np.mean(_found([change(text) for text in chosen], config))) if chosen else 0.0
        for kind, change in changes.items()
    }
    long = [text for text in chosen if len(_WORDS.findall(text)) >= 2 * config.ngram] or chosen
    wrong = float(np.mean(_found([decoy(text) for text in long], config))) if long else 0.0
    return GateResult(len(chosen), index.unfindable, recall, wrong, int(np.sum(flagged)))


def refuse_failed(result: GateResult) -> None:
    """Raise InputError if the gate was not passed."""
    if result.passed:
        return
    measured = ", ".join(f"{kind} {value:.3f}" for kind, value in result.recall.items())
    raise InputError(
        f"The decontamination gate failed: of {result.items} injected evaluation items it found {measured}; "
        f"{result.false_positives:.3f} of the decoys were taken for items. "
        f"Recall must be {LEAST_RECALL}, false positives at most {MOST_FALSE}.",
        hint="Lower data.decontamination.item_share or ngram, or name the columns with the items' text.",
    )


def _found(texts: Sequence[str], config: DecontaminationConfig) -> NDArray[np.bool_]:
    if not texts:
        return np.empty(0, dtype=bool)
    result = overlap(plain_words(texts), index_of(config))
    return (result.item_share_D >= np.float32(config.item_share)) | (
        result.document_share_D >= np.float32(config.document_share)
    )
