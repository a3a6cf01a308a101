"""The process that runs graders written in Python: one JSON request a line, one JSON answer a line.

It runs none of their source itself: each request is answered by a child of its own, which is limited in memory, CPU
time and output, has neither files nor environment, and gives up nearly all system calls (seccomp.py) before it reads
the source. What the child may import is loaded before: the modules below, which are Python's own, and numpy.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import json
import os
import resource
import select
import signal
import sys
import time
from typing import Any, NoReturn

from lapis.evaluate.graders import seccomp

MEMORY_LIMIT = 512 << 20  # bytes of address space beyond what is there at the start
ANSWER_LIMIT = 64 << 10  # bytes
DETAILS = 2000  # characters of an error that are told
NUMPY = "numpy"
MODULES = (
    "abc", "base64", "bisect", "calendar", "cmath", "collections", "collections.abc", "contextlib", "copy", "csv",
    "dataclasses", "datetime", "decimal", "difflib", "enum", "fractions", "functools", "hashlib", "heapq", "html",
    "html.parser", "io", "itertools", "json", "math", "numbers", "operator", "pprint", "random", "re", "statistics",
    "string", "textwrap", "time", "traceback", "types", "typing", "unicodedata", "urllib.parse", "uuid",
    "xml.etree.ElementTree",
)  # fmt: skip


def main() -> None:
    """Answer requests from standard input until it closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    for name in MODULES:
        importlib.import_module(name)
    for line in sys.stdin.buffer:
        sys.stdout.buffer.write(_answer(json.loads(line)) + b"\n")
        sys.stdout.buffer.flush()


def _answer(request: dict[str, Any]) -> bytes:
    """What a child says to a request, or why it said nothing."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        _child(request, writing)
    os.close(writing)
    said, late = _read(reading, time.monotonic() + request["seconds"])
    os.close(reading)
    long = len(said) > ANSWER_LIMIT
    if late or long:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if late or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU):
        return _error("time", f"It took longer than {request['seconds']:g} s.")
    if long:
        return _error("runtime", f"It wrote more than {ANSWER_LIMIT >> 10} KiB.")
    try:
        answer = json.loads(said)
    except ValueError:
        how = f"by signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else "without an answer"
        return _error("runtime", f"Its process ended {how}.")
    return json.dumps(answer).encode()


def _read(pipe: int, until: float) -> tuple[bytes, bool]:
    """What comes from a pipe up to its end, the limit or a time, and whether the time was over."""
    parts: list[bytes] = []
    size = 0
    while size <= ANSWER_LIMIT:
        ready, _, _ = select.select([pipe], [], [], max(0.0, until - time.monotonic()))
        if not ready:
            return b"".join(parts), True
        part = os.read(pipe, ANSWER_LIMIT + 1)
        if not part:
            break
        parts.append(part)
        size += len(part)
    return b"".join(parts), False


def _child(request: dict[str, Any], out: int) -> NoReturn:
    """Lock this process, grade, write the answer, end."""
    try:
        seccomp.end_with_parent(signal.SIGKILL)
        _let_go(out)
        if NUMPY in request["source"]:
            with contextlib.suppress(ImportError):
                importlib.import_module(NUMPY)
        _limit(request["seconds"])
        seccomp.lock()
    except OSError as error:
        os.write(out, _error("server", f"{type(error).__name__}: {error}"))
        os._exit(1)
    os.write(out, _graded(request))
    os._exit(0)


def _let_go(out: int) -> None:
    """Keep no file open but the pipe; what is printed goes nowhere."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nothing, number)
    os.closerange(3, out)
    os.closerange(out + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[0])


def _limit(seconds: float) -> None:
    with open("/proc/self/statm", "rb") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    cpu = int(seconds) + 1
    limits = {
        resource.RLIMIT_AS: mapped + MEMORY_LIMIT,
        resource.RLIMIT_CPU: cpu,
        resource.RLIMIT_FSIZE: ANSWER_LIMIT + 1,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NPROC: 0,
    }
    for kind, most in limits.items():
        resource.setrlimit(kind, (most, most))


def _graded(request: dict[str, Any]) -> bytes:
    """The answer to a request: a number, or an error and where in the source it was raised."""
    names: dict[str, Any] = {"__name__": "grader"}
    try:
        tree = ast.parse(request["source"], "grader.py")
        exec(compile(tree, "grader.py", "exec"), names)
        grade = names.get("grade")
        if not callable(grade):
            return _error("runtime", "The source defines no function grade(sample, item).")
        if request["check"]:
            return json.dumps({"value": 0.0}).encode()
        value = grade(request["sample"], request["item"])
        return json.dumps({"value": float(value)}).encode()
    except MemoryError:
        return _error("runtime", f"MemoryError: it needs more than {MEMORY_LIMIT >> 20} MiB")
    except BaseException as error:  # noqa: BLE001 (a stranger's program; what it raised is reported)
        return _error("runtime", _told(error))


def _told(error: BaseException) -> str:
    lines = [f"line {error.lineno}"] if isinstance(error, SyntaxError) and error.lineno else []
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "grader.py":
            lines.append(f"line {trace.tb_lineno}")
        trace = trace.tb_next
    try:
        text = str(error)
    except Exception:  # noqa: BLE001 (as above)
        text = "?"
    where = f" ({lines[-1]})" if lines else ""
    return f"{type(error).__name__}: {text[:DETAILS]}{where}"


def _error(kind: str, details: str) -> bytes:
    return json.dumps({"error": kind, "details": details}).encode()


if __name__ == "__main__":
    main()
