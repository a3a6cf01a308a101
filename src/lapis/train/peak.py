"""This machine: the rate of its matrix products, against which MFU is counted, its memory, what decides its bits."""

from __future__ import annotations

import platform
import resource
import time

import torch

from lapis.hashing import digest_json
from lapis.kernels.variants import cpu_flags
from lapis.model.families import Decoder

SIZE, PROBE, GRAIN = 1536, 384, 128  # at 128 × 128 a product's start hides which type is quicker
TRY_S = 0.02  # what one try may take; a slow machine multiplies smaller matrices
TYPES = (
    torch.bfloat16,
    torch.float32,
)  # a CPU without instructions for bf16 is quicker in fp32, a hundredfold


def gemm_flops(repeats: int = 5) -> float:
    """FLOP/s of a product of two matrices in bf16 or fp32, whichever this machine multiplies faster.

    The best of a few tries at up to 1536 × 1536 (about 0.1 s).
    """
    rates = {dtype: _rate(PROBE, dtype, repeats=2) for dtype in TYPES}
    dtype = max(TYPES, key=lambda dtype: rates[dtype])
    fitting = int((rates[dtype] * TRY_S / 2) ** (1 / 3)) // GRAIN * GRAIN
    return _rate(max(GRAIN, min(SIZE, fitting)), dtype, repeats)


def _rate(size: int, dtype: torch.dtype, repeats: int) -> float:
    left, right = (torch.randn(size, size, dtype=dtype) for _ in range(2))
    torch.mm(left, right)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        torch.mm(left, right)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


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
