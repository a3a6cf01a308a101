"""The text of large pages, found in a process of its own with a limit on its time.

A page is read in time that can grow with the square of its size: tables in tables, links in links. What takes
minutes, or ends the parser, ends that process and loses one page. The limit counts the processor's time, so a busy
machine changes nothing.
"""

from __future__ import annotations

import atexit
import pickle
import signal
import subprocess
import sys
from typing import Any

from lapis.data.extract import Extractor, Unreadable, main_text

LARGE = 64 << 10  # bytes: smaller pages are done in less than seconds, whatever is in them
SECONDS = 20.0  # an ordinary page of 1 MB takes 0.1
TOO_HARD = "HTML that takes its parser too long, or ends it"

_running: subprocess.Popen[bytes] | None = None


def page_text(html: bytes, charset: str = "", extractor: Extractor = "resiliparse") -> str:
    """The main content of a page, as `main_text` gives it. Raises Unreadable."""
    if len(html) < LARGE:
        return main_text(html, charset, extractor)
    answer = _asked((html, charset, extractor, SECONDS))
    if isinstance(answer, Unreadable):
        raise answer
    return str(answer)


def _asked(question: tuple[bytes, str, Extractor, float]) -> Any:
    global _running
    process = _running or subprocess.Popen(
        [sys.executable, "-m", "lapis.data.extract_apart"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None and process.stdout is not None
    _running = process
    try:
        pickle.dump(question, process.stdin)
        process.stdin.flush()
        return pickle.load(process.stdout)
    except (EOFError, OSError, pickle.UnpicklingError):
        process.kill()
        process.communicate()
        _running = None
        return Unreadable(TOO_HARD)


@atexit.register
def _end() -> None:
    """There are no more questions."""
    if _running is not None:
        _running.communicate()


def main() -> None:
    """Answer one question after the other until there are no more; SIGPROF ends what takes too long."""
    while True:
        try:
            html, charset, extractor, seconds = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            answer: str | Unreadable = main_text(html, charset, extractor)
        except Unreadable as error:
            answer = error
        signal.setitimer(signal.ITIMER_PROF, 0)
        pickle.dump(answer, sys.stdout.buffer)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
