"""Speculation by prompt lookup: what followed the last few tokens before is proposed to follow them again.

Nothing is learnt and nothing is lost: a draft is taken only where it equals the token that sampling picks
there anyway (prompt lookup decoding, A. Saxena 2023; verification as in arXiv 2211.17192, here with equal
random numbers instead of equal distributions, so that the text itself does not change).
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice

LONGEST, SHORTEST = 4, 2  # tokens that must repeat; a longer repetition is believed first
MOST_PATIENCE = 64  # steps that a sequence pauses at most when its drafts keep failing


def propose(ids: Sequence[int], most: int) -> tuple[int, ...]:
    """`most` tokens as they followed the latest earlier place where the last 4, 3 or 2 tokens stood, or none.

    Where the text ends before that many, what followed is repeated, as in a copy that overlaps itself.
    """
    if most <= 0:
        return ()
    text = array("i", ids)
    size, data = text.itemsize, text.tobytes()
    for length in range(min(LONGEST, len(ids) - 1), SHORTEST - 1, -1):
        tail = data[len(data) - length * size :]
        end = len(data) - size  # so that the tail does not find itself
        while (place := data.rfind(tail, 0, end)) >= 0 and place % size:
            end = place + len(tail) - 1  # bytes that lie across two tokens
        if place >= 0:
            start = place // size + length
            return tuple(islice(cycle(text[start:]), most))
    return ()


@dataclass
class Pace:
    """How much is proposed for one sequence: more while drafts are taken, pauses while they fail."""

    most: int = 2  # drafts of the next proposal
    pause: int = 0  # steps until it
    patience: int = 1  # length of the next pause

    def ready(self, limit: int) -> int:
        """How many drafts to propose in this step, at most `limit`."""
        if self.pause > 0:
            self.pause -= 1
            return 0
        return min(self.most, limit)

    def learn(self, proposed: int, taken: int, limit: int) -> None:
        """Note that so many of the proposed drafts were taken."""
        if proposed == 0:
            return
        if taken == proposed:
            self.most = min(2 * self.most, limit)
        elif taken < proposed // 2:
            self.most = max(1, self.most // 2)
        if taken == 0:
            self.pause = self.patience
            self.patience = min(2 * self.patience, MOST_PATIENCE)
        else:
            self.patience = 1
