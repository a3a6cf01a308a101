"""How fast the compiled kernels are beside plain torch and beside what this machine can do at all.

One row per weight shape: the linear at M = 1 in GB/s of weights (decode), at M = 1024 in GFLOP/s (prefill,
training), each beside torch's F.linear in bf16, taken in turn; then attention forward and gradient beside
torch's. Above them the machine's limits: read bandwidth and a large bf16 product.

    python benchmarks/kernels.py [--threads 2] [--repeat 15] [--cpu-time]

--cpu-time counts the CPU time of one thread instead of wall time: for a machine that others use too.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from harness.limits import Limits
from torch import Tensor

from lapis.kernels.batch import packed
from lapis.kernels.ops import Ops, Rope, select

SHAPES = {  # (columns, inner) of every weight
    "laptop": [(1152, 384), (384, 384), (2048, 384), (384, 1024), (8192, 384)],
    "smollm2-135m": [(960, 576), (576, 576), (3072, 576), (576, 1536), (49152, 576)],
}
CACHE = 64 << 20  # bytes that push a weight out of the caches between two reads
Timer = Callable[[], float]


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape).bfloat16()


def in_turn(candidates: dict[str, Callable[[], object]], repeat: int, clock: Timer) -> dict[str, float]:
    """Median seconds of each candidate, one call of each per round."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for round_ in range(repeat + 2):
        for name, call in candidates.items():
            start = clock()
            call()
            if round_ >= 2:
                times[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def linears(ops: Ops, model: str, tokens: int, repeat: int, clock: Timer) -> None:
    """Every weight of a model at one number of rows, ours and torch's in turn."""
    unit = "GB/s" if tokens == 1 else "GFLOP/s"
    for columns, inner in SHAPES[model]:
        # enough copies that a decode step finds none of them in the caches, as in a whole model
        copies = max(1, CACHE // (columns * inner * 2)) if tokens == 1 else 1
        work = copies * columns * inner * 2 * tokens / 1e9
        took = linear(ops, [rows(columns, inner) for _ in range(copies)], rows(tokens, inner), repeat, clock)
        ours, theirs = work / took["lapis"], work / took["torch"]
        print(f"{model:13} linear {inner:5} -> {columns:5}  M {tokens:4}  ", end="")
        print(f"{ours:6.0f}  torch {theirs:6.0f} {unit:8}{ours / theirs:5.2f}x")


def linear(ops: Ops, weights: list[Tensor], x: Tensor, repeat: int, clock: Timer) -> dict[str, float]:
    """Seconds of ours and of torch's over all the weights."""

    def lapis() -> None:
        for w in weights:
            ops.linear(x, w)

    def stock() -> None:
        for w in weights:
            F.linear(x, w)

    with torch.no_grad():
        return in_turn({"lapis": lapis, "torch": stock}, repeat, clock)


def attentions(ops: Ops, lengths: list[int], repeat: int, clock: Timer) -> None:
    """Forward and gradient of 6 heads x 64 over packed sequences of equal length."""
    rope, batch, n = Rope.make(64, 1e4, 4096), packed(lengths), lengths[0]
    qkv, g = rows(sum(lengths), 18 * 64).requires_grad_(), rows(sum(lengths), 6 * 64)
    q = rows(len(lengths), 6, n, 64).requires_grad_()
    ours, theirs = (
        ops.attention(qkv, batch, 0, 6, 6, 64, rope),
        F.scaled_dot_product_attention(q, q, q, is_causal=True),
    )
    like = torch.ones_like(theirs)

    def forward() -> object:
        with torch.no_grad():
            return ops.attention(qkv, batch, 0, 6, 6, 64, rope)

    def stock_forward() -> object:
        with torch.no_grad():
            return F.scaled_dot_product_attention(q, q, q, is_causal=True)

    took = in_turn(
        {
            "forward": forward,
            "torch forward": stock_forward,
            "gradient": lambda: torch.autograd.grad(ours, qkv, g, retain_graph=True),
            "torch gradient": lambda: torch.autograd.grad(theirs, q, like, retain_graph=True),
        },
        repeat,
        clock,
    )
    for part in ("forward", "gradient"):
        mine, other = took[part] * 1e3, took[f"torch {part}"] * 1e3
        print(
            f"attention {part:8} {len(lengths)} x {n:4}  {mine:6.2f}  torch {other:6.2f} ms {other / mine:5.2f}x"
        )


def main() -> None:
    """Print one line per measurement; medians of calls taken in turn."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--cpu-time", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1 if options.cpu_time else options.threads)
    clock: Timer = time.thread_time if options.cpu_time else time.perf_counter
    ops = select(64)
    print(f"kernels {ops.name}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    limits = Limits.measure()
    print(
        f"read bandwidth {limits.bandwidth / 1e9:.1f} GB/s, bf16 product {limits.product / 1e9:.0f} GFLOP/s"
    )
    for model in SHAPES:
        for tokens in (1, 16, 1024):
            linears(ops, model, tokens, options.repeat, clock)
    attentions(ops, [256] * 8, options.repeat, clock)
    attentions(ops, [2048], options.repeat, clock)


if __name__ == "__main__":
    main()
