"""From tokens to text that may be sent: whole characters only, and never a part of a stop string."""

from __future__ import annotations

from collections.abc import Sequence


class StopText:
    """Passes text on until a stop string appears, which may be spread over several pieces.

    Text that could be the beginning of a stop string is held back until it is clear that it is not.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stopped = False
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> str:
        """The text that is safe to send after this piece; sets `stopped` when a stop string was found."""
        if not self._stops or self.stopped:
            return "" if self.stopped else text
        self._held += text
        found = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            safe, self._held = self._held[: min(found)], ""
            return safe
        keep = max(_overlap(self._held, stop) for stop in self._stops)
        cut = len(self._held) - keep
        safe, self._held = self._held[:cut], self._held[cut:]
        return safe

    def finish(self) -> str:
        """What is still held back, once no more text can come."""
        rest, self._held = self._held, ""
        return rest


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that is a beginning of `stop`."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
