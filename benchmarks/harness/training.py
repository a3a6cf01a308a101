"""The subjects of the training benchmarks: Lapis and its peers, each a process that takes steps when it is asked.

A subject that is not measured is stopped by a signal, so that the other one has all cores.
"""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.installed import PEERS, stamp
from harness.process import Group

from lapis.model.config import NAMED, ModelConfig

HERE = Path(__file__).parent
# Lapis starts its threads with a short spin, and keeps freed memory; the peer that is given all gets the latter too
SPIN = {"GOMP_SPINCOUNT": "2000"}
KEEP_FREED = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
    "MALLOC_TOP_PAD_": str(64 << 20),
}
COMPILED = {"TORCHINDUCTOR_CACHE_DIR": str(PEERS / "compiled")}


@dataclass(frozen=True)
class Size:
    """What is trained: a named model, windows of `sequence` tokens, `batch` of them in a step."""

    model: str
    sequence: int
    batch: int

    @property
    def config(self) -> ModelConfig:
        """The model's configuration."""
        return NAMED[self.model]

    @property
    def tokens(self) -> int:
        """Tokens in a step."""
        return self.sequence * self.batch

    def shape(self, threads: int) -> dict[str, Any]:
        """What a worker is told."""
        config = self.config
        sizes = {"vocabulary": config.vocab_size, "layers": config.layers, "width": config.width}
        work = {"heads": config.heads, "sequence": self.sequence, "batch": self.batch, "threads": threads}
        return {"model": self.model, **sizes, **work}


SIZES = {
    "laptop": Size("laptop", 256, 8),
    "14m": Size("laptop-gpt2", 256, 8),
    "gpt2-124m": Size("gpt2-124m", 1024, 2),
}


@dataclass(frozen=True)
class Subject:
    """How a subject is run. `peer` names what make bench-peers installs for it."""

    title: str
    worker: str
    environment: dict[str, str] = field(default_factory=dict)
    peer: str | None = None
    own_python: bool = False  # whether the peer's environment runs it
    gpt2_only: bool = False

    def there(self) -> bool:
        """Whether it can be run."""
        return self.peer is None or stamp(self.peer).exists()

    @property
    def python(self) -> str:
        """The interpreter."""
        return str(PEERS / str(self.peer) / "bin" / "python") if self.own_python else sys.executable


SUBJECTS = (
    Subject("Lapis, AdamW", "lapis-adamw", SPIN),
    Subject("Lapis, Muon", "lapis-muon", SPIN),
    Subject("nanoGPT, given bf16 and compile", "nanogpt-given", KEEP_FREED | COMPILED, "nanogpt", gpt2_only=True),
    Subject("litgpt, bf16", "litgpt", COMPILED, "litgpt", own_python=True, gpt2_only=True),
    Subject("transformers loop, bf16", "transformers"),
    Subject("nanoGPT as it ships, fp32", "nanogpt", {}, "nanogpt", gpt2_only=True),
)  # fmt: skip


class Trainee:
    """A subject at work. Raises EngineFailed when its process ends."""

    def __init__(self, subject: Subject, size: Size, threads: int) -> None:
        self.subject, self.size = subject, size
        self.seconds: list[float] = []
        self.peak = 0
        command = [
            subject.python,
            str(HERE / "training_worker.py"),
            subject.worker,
            json.dumps(size.shape(threads)),
        ]
        environment = {"OMP_NUM_THREADS": str(threads), **subject.environment}
        self.group = Group(command, environment, talk=True)
        self._read()

    def warm_up(self, steps: int) -> None:
        """Steps that do not count: the first ones compile and fill caches."""
        self._steps(steps)
        self.group.pause()

    def measure(self, steps: int) -> None:
        """Steps that count, alone on the machine as far as we are concerned."""
        self.group.proceed()
        answer = self._steps(steps)
        self.group.pause()
        self.seconds += answer["seconds"]
        self.peak = answer["peak"]

    @property
    def rate(self) -> float:
        """Tokens a second, of the median step."""
        return self.size.tokens / statistics.median(self.seconds)

    def _steps(self, steps: int) -> dict[str, Any]:
        self.group.input.write(json.dumps({"steps": steps}).encode() + b"\n")
        self.group.input.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        line = self.group.output.readline()
        if not line:
            raise self.group.failure(f"{self.subject.title} ended")
        answer: dict[str, Any] = json.loads(line)
        return answer
