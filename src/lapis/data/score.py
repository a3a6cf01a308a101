"""Model-based quality score: a linear classifier over hashed words and pairs of words, trained from examples.

Weights are whole numbers of 16 bits, so a text's sum is exact in any order; what follows it is a few additions,
multiplications and divisions. The same text has the same score, bit for bit, on every machine.

Letters: W words or pairs of a chunk, D documents.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lapis.data.annotate import Chunk
from lapis.data.columns import Mask
from lapis.data.decide import Attributes, Rule
from lapis.data.recipe import ScoreConfig
from lapis.data.words import SPLITTER, Words, ngrams
from lapis.errors import InputError
from lapis.hashing import digest_file

FORMAT = "lapis-classifier-1"


@dataclass(frozen=True)
class Classifier:
    """Weights by hash, and what makes a probability of their mean: mean * scale + bias is the log of the odds."""

    weights: NDArray[np.int16]
    scale: float
    bias: float

    def features(self, words: Words) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Where the weights of all words and pairs of words lie, document by document; D + 1 borders."""
        first_D1 = words.first_D1 - words.first_D1[0]
        shift = np.uint64(64 - (len(self.weights) - 1).bit_length())
        both = np.zeros(2 * len(words.hash_W), dtype=np.int64)
        both[::2] = (words.hash_W >> shift).astype(np.int64)
        both[1:-1:2] = (ngrams(words.hash_W, 2) >> shift).astype(np.int64)
        within = np.ones(len(both), dtype=bool)
        last_D = first_D1[1:][np.diff(first_D1) > 0] - 1
        within[2 * last_D + 1] = False  # a pair does not reach into the next document
        pairs_D = np.maximum(2 * np.diff(first_D1) - 1, 0)
        return both[within], np.concatenate([[0], np.cumsum(pairs_D)])

    def score(self, words: Words) -> NDArray[np.float32]:
        """The probability of each document to be one of the good ones; of a text without words that of none."""
        place_W, border_D1 = self.features(words)
        sums = np.concatenate([[0], np.cumsum(self.weights[place_W], dtype=np.int64)])
        count_D = np.diff(border_D1)
        total_D = sums[border_D1[1:]] - sums[border_D1[:-1]]
        return probability(total_D / np.maximum(count_D, 1) * self.scale + self.bias).astype(np.float32)

    def save(self, path: Path) -> None:
        """Write the model as one safetensors file."""
        from safetensors.numpy import save_file

        facts = {"format": FORMAT, "splitter": SPLITTER, "scale": repr(self.scale), "bias": repr(self.bias)}
        save_file({"weights": self.weights}, path, metadata=facts)

    @staticmethod
    def load(path: Path) -> Classifier:
        """Read what `save` wrote. Raises InputError for anything else."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="numpy") as file:
                facts = file.metadata() or {}
                if (facts.get("format"), facts.get("splitter")) == (FORMAT, SPLITTER):
                    weights = file.get_tensor("weights")
                    return Classifier(weights, float(facts["scale"]), float(facts["bias"]))
        except (OSError, SafetensorError) as error:
            raise InputError(f"The classifier {path} cannot be read: {error}.", hint=_HINT) from error
        raise InputError(f"{path} is no classifier that this version can use.", hint=_HINT)


_HINT = "lapis data classifier train --good FILES --bad FILES --out MODEL"


def probability(logit: NDArray[np.float64]) -> NDArray[np.float64]:
    """The logistic function by additions, multiplications and divisions alone."""
    x = np.clip(logit, -40.0, 40.0)
    twos = np.floor(np.abs(x) * 1.4426950408889634 + 0.5)
    rest = -np.abs(x) + twos * 0.6931471803691238 + twos * 1.9082149292705877e-10
    power = np.ones_like(x)
    for n in range(14, 0, -1):
        power = 1 + power * rest / n
    small = np.ldexp(power, -twos.astype(np.int32))  # e to the power of -|x|
    result: NDArray[np.float64] = np.where(x < 0, small, 1.0) / (1 + small)
    return result


@dataclass(frozen=True)
class ScoreAnnotator:
    """Writes `score`, the probability that a user's classifier gives each document."""

    path: str
    model: str  # the digest of the file
    name: str = "score"
    version: int = 1

    @staticmethod
    def of(config: ScoreConfig) -> ScoreAnnotator:
        """The annotator of a recipe. Raises InputError if the model cannot be used."""
        path = Path(config.model).expanduser()
        Classifier.load(path)
        return ScoreAnnotator(str(path), digest_file(path))

    @property
    def schema(self) -> pa.Schema:
        """One number."""
        return pa.schema([("score", pa.float32())])

    def facts(self) -> dict[str, Any]:
        """The model and the splitter."""
        return {"model": self.model, "splitter": SPLITTER}

    def annotate(self, chunk: Chunk) -> pa.RecordBatch:
        """The scores of a chunk."""
        return pa.RecordBatch.from_arrays(
            [pa.array(_loaded(self.path).score(chunk.words))], schema=self.schema
        )


@lru_cache(maxsize=1)
def _loaded(path: str) -> Classifier:
    return Classifier.load(Path(path))


def score_rules(config: ScoreConfig) -> list[Rule]:
    """The rules on the score of prose."""
    rules = []
    if config.model and config.min_score:
        rules.append(Rule("score", "low score", partial(_below, config.min_score)))
    if config.model and config.keep < 1:
        rules.append(Rule("score", "not among the best", partial(_not_among, config.keep)))
    return rules


def _below(least: float, attributes: Attributes) -> Mask:
    low: Mask = attributes["score"].numbers("score") < least
    return low & attributes["documents"].equal("kind", "prose")


def _not_among(share: float, attributes: Attributes) -> Mask:
    """All but the best share of all documents of prose; equal scores stay together."""
    prose = attributes["documents"].equal("kind", "prose")
    score = attributes["score"].numbers("score")
    kept = math.ceil(share * int(prose.sum()))
    if not kept:
        return prose
    least = np.sort(score[prose])[-kept]
    low: Mask = score < least
    return low & prose


@dataclass(frozen=True)
class Example:
    """One text to learn from: its features and how often each occurs, as parts of 1."""

    place: NDArray[np.int64]
    part: NDArray[np.float64]
    square: float  # the sum of the parts' squares
    good: bool

    @staticmethod
    def of(place: NDArray[np.int64], good: bool) -> Example:
        """The example that some features make."""
        places, counts = np.unique(place, return_counts=True)
        part = counts / len(place)
        return Example(places, part, _in_order(part * part), good)


@dataclass(frozen=True)
class Trained:
    """A classifier, and how it does on texts it has not seen."""

    classifier: Classifier
    trained: int
    heldout: int
    auc: float
    accuracy: float


def train(
    good: Sequence[Words],
    bad: Sequence[Words],
    *,
    bits: int = 18,
    epochs: int = 5,
    rate: float = 0.5,
    seed: int = 0,
) -> Trained:
    """Learn to tell good documents from bad ones; every tenth of both is held out to measure on.

    Each step moves one text's log odds by `rate` times its error, less and less to the end. Both sides weigh the
    same, however many texts they have. Raises InputError for fewer than 20 texts of a side.
    """
    empty = Classifier(np.zeros(1 << bits, dtype=np.int16), 1.0, 0.0)
    examples = [
        [Example.of(place, side == 0) for words in texts for place in _documents(empty, words)]
        for side, texts in enumerate((good, bad))
    ]
    for name, found in zip(("good", "bad"), examples, strict=True):
        if len(found) < 20:
            raise InputError(f"There are {len(found)} {name} texts to learn from; at least 20 are needed.")
    learned = [one for side in examples for n, one in enumerate(side) if n % 10]
    held = [one for side in examples for one in side[::10]]
    classifier = _descend(learned, 1 << bits, epochs, rate, seed)
    odds = np.array([_odds(classifier, one) for one in held])
    truth = np.array([one.good for one in held])
    right = float(np.mean((odds > 0) == truth))
    return Trained(classifier, len(learned), len(held), area_under_curve(odds, truth), right)


def _documents(classifier: Classifier, words: Words) -> Iterator[NDArray[np.int64]]:
    place_W, border_D1 = classifier.features(words)
    for start, end in zip(border_D1[:-1].tolist(), border_D1[1:].tolist(), strict=True):
        if end > start:
            yield place_W[start:end]


def _descend(examples: Sequence[Example], size: int, epochs: int, rate: float, seed: int) -> Classifier:
    weights = np.zeros(size)
    bias, step = 0.0, 0
    sides = [np.flatnonzero([one.good == side for one in examples]) for side in (True, False)]
    longer = max(map(len, sides))
    order = np.concatenate([np.resize(side, longer) for side in sides])  # the shorter side comes more often
    chance = np.random.Generator(np.random.PCG64(seed))
    for _ in range(epochs):
        for n in chance.permutation(order).tolist():
            one = examples[n]
            odds = bias + _in_order(weights[one.place] * one.part)
            error = float(one.good) - float(probability(np.array([odds]))[0])
            move = rate * (1 - step / (epochs * len(order))) * error
            weights[one.place] += move / one.square * one.part
            bias += 0.01 * move
            step += 1
    largest = float(np.abs(weights).max()) or 1.0
    scale = largest / 32767
    return Classifier(np.rint(weights / scale).astype(np.int16), scale, bias)


def _odds(classifier: Classifier, one: Example) -> float:
    return classifier.bias + classifier.scale * _in_order(classifier.weights[one.place] * one.part)


def _in_order(numbers: NDArray[np.float64]) -> float:
    """The sum, added one after the other: cumsum has no other order on any machine."""
    return float(np.cumsum(numbers)[-1])


def area_under_curve(odds: NDArray[np.float64], truth: NDArray[np.bool_]) -> float:
    """The chance that a good text has a higher score than a bad one; half of it for equal ones."""
    good, bad = np.sort(odds[truth]), np.sort(odds[~truth])
    below = np.searchsorted(bad, good, side="left").sum()
    equal = np.searchsorted(bad, good, side="right").sum() - below
    return float((below + 0.5 * equal) / (len(good) * len(bad)))
