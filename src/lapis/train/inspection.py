"""What a step trains on, as text: every text in pieces, told apart by whether they are trained on. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from lapis.data.loader import TokenBatch
from lapis.tokenizer.bpe import Tokenizer


@dataclass(frozen=True)
class Piece:
    """Adjacent tokens that are all trained on, or all not."""

    text: str
    tokens: int
    trained: bool


@dataclass(frozen=True)
class ShownText:
    """One text between two borders: what lies in it never sees another one."""

    pieces: tuple[Piece, ...]

    @property
    def tokens(self) -> int:
        """All of its tokens."""
        return sum(piece.tokens for piece in self.pieces)

    @property
    def trained(self) -> int:
        """Those that are trained on."""
        return sum(piece.tokens for piece in self.pieces if piece.trained)


def shown_texts(micros: Sequence[TokenBatch], tokenizer: Tokenizer) -> Iterator[ShownText]:
    """The texts of a step, decoded with special tokens: every input, and the last token that is predicted."""
    for micro in micros:
        start = 0
        for length in micro.lengths:
            part = slice(start, start + length)
            ids = [*micro.ids_T[part].tolist(), *micro.targets_T[part][-1:].tolist()]
            counts = [True] * length if micro.weights_T is None else (micro.weights_T[part] > 0).tolist()
            yield ShownText(tuple(_pieces(ids, [False, *counts], tokenizer)))
            start += length


def _pieces(ids: Sequence[int], trained: Sequence[bool], tokenizer: Tokenizer) -> Iterator[Piece]:
    """The first token is not trained on: nothing stands before it that could predict it."""
    for flag, group in groupby(zip(ids, trained, strict=True), key=lambda pair: pair[1]):
        run = [id for id, _ in group]
        yield Piece(tokenizer.decode(run, special=True), len(run), flag)
