"""The machine's own limit, measured: the rate of a large matrix product, against which MFU is counted."""

from __future__ import annotations

import time

import torch

SIZE = 1536


def gemm_flops(repeats: int = 5) -> float:
    """FLOP/s of a bf16 product of two 1536 × 1536 matrices, the best of a few tries (about 0.1 s)."""
    left, right = (torch.randn(SIZE, SIZE, dtype=torch.bfloat16) for _ in range(2))
    torch.mm(left, right)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        torch.mm(left, right)
        best = min(best, time.perf_counter() - start)
    return 2 * SIZE**3 / best
