"""Runs graders written in Python, away from everything else; sandbox.py is the process that does it."""

from __future__ import annotations

import json
import math
import selectors
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from lapis.errors import UnavailableError
from lapis.evaluate.graders import seccomp

SECONDS = 30.0  # of one grading
SPARE_SECONDS = 10.0  # for the sandbox itself to start and to say that the time is over
SOURCE_LIMIT = 256 << 10  # characters
PROGRAMS = 4  # that run at a time for one process of ours, so that their memory is bounded together
ROOT = Path(seccomp.__file__).parents[3]  # where this very package lies: -I looks at no PYTHONPATH
PROGRAM = (
    "import sys; sys.path.insert(0, sys.argv[1]); from lapis.evaluate.graders import sandbox; sandbox.main()"
)
Failure = Literal["runtime", "time", "server"]

_places = threading.BoundedSemaphore(PROGRAMS)


@dataclass(frozen=True)
class PythonResult:
    """What `grade` gave, or how it failed and the words for it."""

    value: float = 0.0
    failure: Failure | None = None
    details: str = ""


class PythonSandbox:
    """One process that grades for one project, one sample at a time; started at the first use. Close it."""

    def __init__(self, seconds: float = SECONDS) -> None:
        self._seconds = seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._ending: weakref.finalize[Any, Any] | None = None

    def grade(self, source: str, sample: Mapping[str, Any], item: Any) -> PythonResult:
        """The number that the source's `grade(sample, item)` returns. Raises UnavailableError (no such sandbox)."""
        return self._run({"source": source, "sample": sample, "item": item, "check": False})

    def check(self, source: str) -> PythonResult:
        """Whether the source loads and defines `grade`. Raises UnavailableError."""
        return self._run({"source": source, "check": True})

    def close(self) -> None:
        """End the process."""
        if self._ending is not None:
            self._ending()
        self._process = self._ending = None

    def __enter__(self) -> PythonSandbox:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _run(self, request: dict[str, Any]) -> PythonResult:
        with self._lock, _places:
            line = self._ask(json.dumps({**request, "seconds": self._seconds}).encode() + b"\n")
        if not line.endswith(b"\n"):
            return PythonResult(failure="server", details="The sandbox ended without an answer.")
        return _read(json.loads(line))

    def _ask(self, request: bytes) -> bytes:
        process = self._start()
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(request)
            process.stdin.flush()
            line = _read_line(process, time.monotonic() + self._seconds + SPARE_SECONDS)
        except BrokenPipeError:
            line = b""
        if not line.endswith(b"\n"):
            self.close()
        return line

    def _start(self) -> subprocess.Popen[bytes]:
        if not seccomp.can_lock():
            raise UnavailableError(
                "Graders written in Python need Linux on x86-64 or ARM64, whose kernel can lock them in.",
                hint="Use a string_check, text_similarity or score_model grader here.",
            )
        if self._process is not None and self._process.poll() is None:
            return self._process
        self.close()
        command = [sys.executable, "-I", "-c", PROGRAM, str(ROOT)]
        pipe = subprocess.PIPE
        environment = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, env=environment, cwd="/", close_fds=True
        )
        self._ending = weakref.finalize(self, _end, self._process)
        return self._process


def _read(answer: Any) -> PythonResult:
    """An answer line; its form is not to be trusted, the source may have written it."""
    told = answer if isinstance(answer, dict) else {}
    if told.get("error") in get_args(Failure):
        return PythonResult(failure=told["error"], details=str(told.get("details", "")))
    value = told.get("value")
    if not isinstance(value, int | float):
        return PythonResult(failure="runtime", details="The source wrote an answer of its own.")
    if not math.isfinite(value):
        return PythonResult(failure="runtime", details=f"grade returned {value}, which is no finite number.")
    return PythonResult(float(value))


def _read_line(process: subprocess.Popen[bytes], until: float) -> bytes:
    """A line of its output; without its end if that did not come in time."""
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        ready = selector.select(max(0.0, until - time.monotonic()))
    return process.stdout.readline() if ready else b""


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            try:
                stream.close()
            except BrokenPipeError:
                continue  # it died with our request unread
    process.wait()
