"""This machine: the rate of its matrix products, against which MFU is counted, its memory, what decides its bits."""

from __future__ import annotations

import platform
import resource
import time

import torch

from lapis.hashing import digest_json
from lapis.kernels.variants import cpu_flags
from lapis.model.families import Decoder

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


def peak_memory(device: torch.device) -> int:
    """Most bytes that this process ever held: of main memory, or of the GPU's if it computes there."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def setup(model: Decoder) -> str:
    """What decides the bits of a step beside recipe, data and weights, in a few words."""
    device = model.ops.device
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    else:
        machine = f"{platform.machine()} {digest_json(sorted(cpu_flags()))[:8]}"
    return f"{model.ops.name}, torch {torch.__version__}, {torch.get_num_threads()} threads, {machine}"
