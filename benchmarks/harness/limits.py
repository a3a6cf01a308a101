"""What this machine can do at all: reading memory, multiplying matrices. No engine can be faster."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch

READ = 256 << 20  # bytes, far more than the caches
MODEL_SHAPES = ((1024, 576, 3072), (1024, 1536, 576), (1024, 1536, 1536))  # rows, inner, columns


def read_bandwidth(repeat: int = 10) -> float:
    """Bytes a second of reading memory with all threads, the best of some readings."""
    big = torch.ones(READ // 4)
    best = float("inf")
    for _ in range(repeat):
        start = time.perf_counter()
        big.sum()
        best = min(best, time.perf_counter() - start)
    return READ / best


def product_rate(repeat: int = 10) -> float:
    """FLOP a second of torch's best bf16 product over a few shapes, the median of each shape's calls."""
    rates = []
    for rows, inner, columns in MODEL_SHAPES:
        a, b = torch.randn(rows, inner).bfloat16(), torch.randn(columns, inner).bfloat16()
        times = []
        for _ in range(repeat + 2):
            start = time.perf_counter()
            torch.nn.functional.linear(a, b)
            times.append(time.perf_counter() - start)
        rates.append(2 * rows * inner * columns / statistics.median(times[2:]))
    return max(rates)


@dataclass(frozen=True)
class Shape:
    """What a model costs: bytes of its weights as stored, weights per token, key/value bytes per token."""

    weight_bytes: int
    parameters: int
    head: int  # parameters of the head, which a prompt needs once only
    kv_bytes: int
    bf16: bool  # the product rate is that of bf16; integer weights multiply faster


@dataclass(frozen=True)
class Limits:
    """Rates of this machine, in bytes and FLOP a second, and what follows for a model."""

    bandwidth: float
    product: float

    @staticmethod
    def measure() -> Limits:
        """Both rates, now."""
        return Limits(read_bandwidth(), product_rate())

    def step(self, shape: Shape, count: int, context: int) -> float:
        """Least seconds of one decode step of `count` sequences with `context` tokens each."""
        reading = (shape.weight_bytes + count * context * shape.kv_bytes) / self.bandwidth
        return max(reading, 2 * shape.parameters * count / self.product) if shape.bf16 else reading

    def prompts(self, shape: Shape, tokens: int) -> float:
        """Least seconds of computing prompts of `tokens` tokens together, in bf16."""
        return 2 * (shape.parameters - shape.head) * tokens / self.product

    def decode(self, shape: Shape, count: int, context: int) -> float:
        """Most tokens a second of decoding."""
        return count / self.step(shape, count, context)

    def burst(self, shape: Shape, count: int, prompt: int, new: int) -> float:
        """Most new tokens a second of a burst, prompts included."""
        least = self.prompts(shape, count * prompt) + new * self.step(shape, count, prompt + new // 2)
        return count * new / least

    def best(self, other: Limits) -> Limits:
        """The higher of each rate."""
        return Limits(max(self.bandwidth, other.bandwidth), max(self.product, other.product))
