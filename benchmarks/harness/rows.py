"""The table: what is compared with what, on which work, which figure is read and how good it must be."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

from harness.burst import Burst
from harness.limits import Limits, Shape


@dataclass
class Side:
    """What was measured of one engine in a duel."""

    engine: str
    bursts: list[Burst] = field(default_factory=list)
    starts: list[float] = field(default_factory=list)  # seconds from nothing to the first token
    resident: int = 0


Figure = Callable[[Side, Shape], float]
Bound = Callable[[Limits, Shape], float]


@dataclass(frozen=True)
class Duel:
    """Work that two engines do in turn; `fresh` starts ours anew in every round."""

    ours: str
    theirs: str | None
    count: int
    prompt: int
    new: int
    fresh: bool = False


@dataclass(frozen=True)
class Target:
    """What a row must reach: of the ratio to the peer, of our own figure, or of our share of the limit."""

    of: str  # "ratio", "figure" or "share"
    bound: float
    at_most: bool = False

    def met(self, ratio: float | None, figure: float, share: float | None) -> bool | None:
        """Whether it is; None if it cannot be said, because the peer or the limit is missing."""
        value = {"ratio": ratio, "figure": figure, "share": share}[self.of]
        if value is None:
            return None
        return value <= self.bound if self.at_most else value >= self.bound

    def __str__(self) -> str:
        sign = "≤" if self.at_most else "≥"
        if self.of == "share":
            return f"{sign} {self.bound:.0%} of limit"
        return f"{sign} {self.bound:g}{'x' if self.of == 'ratio' else ''}"


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    key: str
    title: str
    unit: str
    duel: Duel
    figure: Figure
    target: Target | None = None
    limit: Bound | None = None
    theirs: Figure | None = None  # the peer's figure, where it is not read as ours


def _median(read: Callable[[Burst], float]) -> Figure:
    return lambda side, shape: statistics.median(read(burst) for burst in side.bursts)


def _prefill(side: Side, shape: Shape) -> float:
    return statistics.median(burst.prefill(LONG) for burst in side.bursts)


def _best_throughput(side: Side, shape: Shape) -> float:
    return max(burst.throughput() for burst in side.bursts)


def _start(side: Side, shape: Shape) -> float:
    return statistics.median(side.starts)


def _memory(side: Side, shape: Shape) -> float:
    return side.resident / shape.weight_bytes


def _alone(limits: Limits, shape: Shape) -> float:
    return limits.decode(shape, 1, PROMPT + NEW // 2)


def _together(limits: Limits, shape: Shape) -> float:
    return limits.decode(shape, TOGETHER, PROMPT + NEW // 2)


def _together_long(limits: Limits, shape: Shape) -> float:
    return limits.decode(shape, TOGETHER, LONG + NEW // 2)


def _burst(limits: Limits, shape: Shape) -> float:
    return limits.burst(shape, TOGETHER, PROMPT, NEW)


def _prompt(limits: Limits, shape: Shape) -> float:
    return LONG / limits.prompts(shape, LONG)


PROMPT, NEW, LONG, TOGETHER = 128, 128, 1024, 16


def _one(ours: str, theirs: str) -> Duel:
    return Duel(ours, theirs, 1, PROMPT, NEW)


def _many(ours: str, theirs: str | None, prompt: int = PROMPT) -> Duel:
    return Duel(ours, theirs, TOGETHER, prompt, NEW)


DECODE, THROUGHPUT = _median(Burst.decode), _median(Burst.throughput)
FIRST_P50, FIRST_P99 = _median(lambda burst: burst.first(0.5)), _median(lambda burst: burst.first(0.99))
LOOKUP = _one("lapis lookup bf16", "llama.cpp bf16")
LLAMA_BF16 = _one("lapis bf16", "llama.cpp bf16")
VLLM = _many("lapis http bf16", "vllm http bf16")
START = Duel("lapis http bf16", "vllm http bf16", 1, 8, 1, fresh=True)
LONG_KV = _many("lapis int8-kv bf16", "openvino fp16", LONG)
INT8 = _many("lapis http int8", "openvino int8")
SIXTEEN_INT8 = _many("lapis int8", "openvino int8")
SIXTEEN_BF16 = _many("lapis bf16", "openvino fp16")
LONG_BF16 = Duel("lapis bf16", "openvino fp16", 1, LONG, 1)
LONG_INT8 = Duel("lapis int8", "openvino int8", 1, LONG, 1)

ROWS = (
    Row("decode-bf16", "decode, 1 stream, bf16", "tok/s", LLAMA_BF16, DECODE, Target("ratio", 1.45), _alone),
    Row("bound", "  share of the memory bound", "tok/s", LLAMA_BF16, DECODE, Target("share", 0.85), _alone),
    Row("decode-lookup", "  with prompt lookup, as by default", "tok/s", LOOKUP, DECODE),
    Row(
        "decode-4bit", "decode, 1 stream, 4-bit", "tok/s", _one("lapis int4", "llama.cpp q4_1"),
        DECODE, Target("ratio", 2), _alone,
    ),
    Row(
        "decode-int8", "decode, 1 stream, int8", "tok/s", _one("lapis int8", "openvino int8"),
        DECODE, Target("ratio", 2.2), _alone,
    ),
    Row("prefill-int8", "prefill 1,024, int8", "tok/s", LONG_INT8, _prefill),
    Row(
        "burst-int8", "16 at once, int8, HTTP; peer in process, its best", "tok/s", INT8,
        THROUGHPUT, Target("ratio", 1.4), theirs=_best_throughput,
    ),
    Row("prefill-bf16", "prefill 1,024, bf16", "tok/s", LONG_BF16, _prefill, Target("ratio", 1), _prompt),
    Row("step-int8", "decode, 16 streams, int8", "tok/s", SIXTEEN_INT8, DECODE, None, _together),
    Row("step-bf16", "decode, 16 streams, bf16", "tok/s", SIXTEEN_BF16, DECODE, None, _together),
    Row(
        "step-prototype", "  a step alone, beside the kernels' prototype", "tok/s",
        _many("lapis step bf16", "prototype step bf16"), DECODE, Target("ratio", 0.95), _together,
    ),
    Row(
        "context-1024", "decode, 16 streams of 1,024, bf16", "tok/s", _many("lapis bf16", "openvino fp16", LONG),
        DECODE, Target("figure", 600), _together_long,
    ),
    Row(
        "context-1024-int8-kv", "  with int8 keys and values", "tok/s", LONG_KV,
        DECODE,
    ),
    Row(
        "burst-transformers", "16 at once, bf16, HTTP; peer in process", "tok/s",
        _many("lapis http bf16", "transformers bf16"), THROUGHPUT, Target("ratio", 3.8), _burst,
    ),
    Row(
        "http", "16 at once, bf16, HTTP; ourselves in process", "tok/s", _many("lapis http bf16", "lapis bf16"),
        THROUGHPUT, Target("ratio", 0.95), _burst,
    ),
    Row(
        "burst-llama.cpp", "16 at once, bf16, both HTTP", "tok/s",
        _many("lapis http bf16", "llama.cpp http bf16"), THROUGHPUT, None, _burst,
    ),
    Row("burst-bf16", "16 at once, bf16, both HTTP", "tok/s", VLLM, THROUGHPUT, Target("ratio", 1.3), _burst),
    Row("first-p50", "  first token of 16, p50", "s", VLLM, FIRST_P50, Target("ratio", 0.7, at_most=True)),
    Row("first-p99", "  first token of 16, p99", "s", VLLM, FIRST_P99, Target("ratio", 1.1, at_most=True)),
    Row("memory", "  resident memory over weight bytes", "x", VLLM, _memory, Target("figure", 3, at_most=True)),
    Row("start", "start of the server to first token", "s", START, _start, Target("figure", 2, at_most=True)),
)  # fmt: skip
