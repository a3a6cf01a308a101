"""The engines of the table: how each is started, asked and ended. Each runs in a process of its own.

An engine that is not measured is stopped by a signal, so that the other one has all cores.
"""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from harness import client
from harness.burst import Burst
from harness.process import EngineFailed, Group

HERE = Path(__file__).parent
START_SECONDS = 300.0


class Engine(Protocol):
    """Something that continues prompts. `start` raises EngineFailed, `run` too."""

    version: str
    start_seconds: float

    def start(self) -> None:
        """Start it and wait until it answers."""

    def run(self, prompts: list[list[int]], tokens: int) -> Burst:
        """All prompts at once, greedy, exactly `tokens` new tokens each."""

    def pause(self) -> None:
        """Take the cores away from it."""

    def proceed(self) -> None:
        """Give them back."""

    def resident(self) -> int:
        """Bytes of memory that it holds."""

    def end(self) -> None:
        """End it and all its processes."""


class _Started:
    """What engines with processes have in common."""

    version = ""
    start_seconds = 0.0
    group: Group

    def pause(self) -> None:
        self.group.pause()

    def proceed(self) -> None:
        self.group.proceed()

    def resident(self) -> int:
        return self.group.resident()

    def end(self) -> None:
        self.group.end()


class Worker(_Started):
    """An engine as a library, in a small program of harness/ that reads prompts and writes times."""

    def __init__(
        self, python: str, program: str, *arguments: str, environment: Mapping[str, str] | None = None
    ) -> None:
        self.command = [python, str(HERE / program), *arguments]
        self.environment = environment or {}

    def start(self) -> None:
        """Start it and wait until the model is loaded."""
        begin = time.perf_counter()
        self.group = Group(self.command, self.environment, talk=True)
        try:
            self.version = self._read()["version"]
        except EngineFailed:
            self.end()
            raise
        self.start_seconds = time.perf_counter() - begin

    def run(self, prompts: list[list[int]], tokens: int) -> Burst:
        """All prompts at once, in process."""
        self.group.input.write(json.dumps({"prompts": prompts, "tokens": tokens}).encode() + b"\n")
        self.group.input.flush()
        answer = self._read()
        return Burst(answer["seconds"], answer["tokens"], answer["times"])

    def _read(self) -> dict[str, Any]:
        line = self.group.output.readline()
        if not line:
            raise self.group.failure(f"{Path(self.command[1]).stem} ended")
        answer: dict[str, Any] = json.loads(line)
        return answer


class Server(_Started):
    """An engine behind HTTP. `extra` are the fields that make it ignore end tokens and keep no prefixes."""

    def __init__(
        self,
        command: Sequence[str],
        model: str,
        extra: Mapping[str, Any],
        environment: Mapping[str, str],
        version: str,
    ) -> None:
        self.command, self.model, self.extra, self.environment = command, model, extra, environment
        self.version = version
        self.port = 0

    def start(self) -> None:
        """Start it and wait for its first token: `start_seconds` is the time from nothing to that."""
        self.port = _free_port()
        command = [part.replace("{port}", str(self.port)) for part in self.command]
        begin = time.perf_counter()
        self.group = Group(command, self.environment, talk=False)
        try:
            self._wait(begin + START_SECONDS)
        except EngineFailed:
            self.end()
            raise
        self.start_seconds = time.perf_counter() - begin

    def _wait(self, until: float) -> None:
        while time.perf_counter() < until:
            if self.group.process.poll() is not None:
                raise self.group.failure(f"{Path(self.command[0]).name} ended")
            try:
                self.run([[1, 2, 3, 4, 5, 6, 7, 8]], 1)
            except (OSError, client.RequestFailed):  # not listening yet, or loading
                time.sleep(0.01)
            else:
                return
        raise self.group.failure(f"{Path(self.command[0]).name} did not answer in {START_SECONDS:.0f} s")

    def run(self, prompts: list[list[int]], tokens: int) -> Burst:
        """All prompts at once, each a streaming request of its own."""
        fixed = {"model": self.model, "max_tokens": tokens, "temperature": 0, **self.extra}
        burst = client.burst(self.port, [{**fixed, "prompt": prompt} for prompt in prompts])
        if burst.tokens != tokens * len(prompts):
            raise EngineFailed(f"{burst.tokens} tokens instead of {tokens * len(prompts)}")
        return burst


class LlamaBench:
    """llama.cpp's own benchmark of one sequence, without HTTP: decoding after a prompt of the same length."""

    start_seconds = 0.0

    def __init__(self, program: Path, model: Path, threads: int, version: str) -> None:
        self.program, self.model, self.threads, self.version = program, model, threads, version

    def start(self) -> None:
        """Nothing stays running between two measurements."""

    def run(self, prompts: list[list[int]], tokens: int) -> Burst:
        """Times of decoding `tokens` tokens at the depth of the prompt; the prompt's own time is not in it."""
        assert len(prompts) == 1
        rate = self._rate(tokens, len(prompts[0]))
        return Burst(tokens / rate, tokens, [[(n + 1) / rate for n in range(tokens)]])

    def _rate(self, tokens: int, depth: int) -> float:
        options = {"-m": self.model, "-t": self.threads, "-p": 0, "-n": tokens, "-d": depth}
        command = [str(self.program), *(str(part) for pair in options.items() for part in pair)]
        done = subprocess.run(
            [*command, "-r", "1", "-o", "json"], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise EngineFailed(f"llama-bench: {done.stderr[-300:]}")
        return float(json.loads(done.stdout)[0]["avg_ts"])

    def pause(self) -> None:
        """Nothing runs between two measurements."""

    def proceed(self) -> None:
        """Nothing runs between two measurements."""

    def resident(self) -> int:
        """Nothing stays in memory."""
        return 0

    def end(self) -> None:
        """Nothing runs between two measurements."""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
