"""Which builds of the C kernels lie here, and which of them this CPU and a model's shape can use. No torch."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from lapis import clibrary
from lapis.clibrary import REBUILD
from lapis.errors import ConfigError, UnavailableError, nearest

FOLDER = Path(__file__).parent
SOURCES = (
    "cpu.c",
    "cpu_linear.c",
    "cpu_attention.c",
    "cpu_attention_write.c",
    "cpu_attention_backward.c",
    "cpu_rows.c",
    "cpu_replay.c",
    "cpu_train.c",
    "cpu_muon.c",
    "cpu_quantized.c",
    "cpu_experts.c",
    "cpu_fp32.c",
    "cpu_fp32_attention.c",
    "cpu_vector.h",
    "cpu_team.h",
    "cpu_product.h",
    "cpu_amx.h",
    "cpu_transpose.h",
    "cpu_attention.h",
    "cpu_fp32.h",
)
DTYPES = ("bfloat16", "float32")
TRITON = "triton"  # what LAPIS_KERNELS calls the kernels for GPUs
HEAD_SIZES = range(16, 257, 16)
WIDTH_STEP = 16  # lanes of the fp32 vector that the contract is written in
LOST = (
    "training and serving give slightly different bits, an answer depends on what else is in the batch, "
    "and both are slower"
)

_V3 = frozenset({"avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"})
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
# fastest first: name -> CPU flags it needs, as Linux names them
VARIANTS: dict[str, frozenset[str]] = {
    "amx": _V4 | {"avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "amx_int8"},
    "avx512bf16": _V4 | {"avx512_bf16", "avx512_vnni"},
    "avx512": _V4,
    "avx2": _V3,
    "portable": frozenset(),
}


IN_TILES = frozenset({"amx"})  # variants whose linear adds in the contract's second order


@dataclass(frozen=True)
class KernelStatus:
    """What `lapis doctor` tells: which kernels run, which were built, what is missing and what that costs."""

    chosen: str  # "cpu-<variant>", "cuda-triton", "stock", or "none" where what was asked for cannot run
    bit_exact: bool
    built: tuple[str, ...]  # builds that lie in the package
    usable: tuple[str, ...]  # those this CPU can run, fastest first
    compiler: str | None  # path of the C compiler found, if any
    reason: str  # why not the compiled kernels; empty if they run
    lost: str  # what plain torch does not give; empty if nothing is lost
    hint: str  # the command that adds what is missing


def library_path(variant: str) -> Path:
    """Where the build puts a variant's shared library."""
    return FOLDER / f"cpu-{variant}.so"


@functools.cache
def source_digest() -> str:
    """Digest of the C sources, compiled into each library so that a stale build is noticed."""
    return clibrary.source_digest(FOLDER, SOURCES)


@functools.cache
def cpu_flags() -> frozenset[str]:
    """Instruction sets of this CPU by their Linux names; empty where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return frozenset()
    flags = next((line for line in lines if line.startswith("flags")), "")
    return frozenset(flags.partition(":")[2].split())


@functools.cache
def library(variant: str) -> ctypes.CDLL:
    """A variant's library, checked: current sources, and a dot product that keeps the contract.

    Raises UnavailableError that says why the library cannot be used.
    """
    missing = VARIANTS[variant] - cpu_flags()
    path, what = library_path(variant), f"the {variant} kernels"
    if path.exists() and missing:
        raise UnavailableError(f"this CPU cannot run {what}: no {', '.join(sorted(missing))}")
    found = clibrary.open_library(path, what, "lapis_source", source_digest())
    if found.lapis_check() != 0:
        raise UnavailableError(f"this CPU does not add as the contract says, or gives no leave for {variant}")
    return found


def choose(head_size: int, widths: Sequence[int], dtype: str) -> tuple[str | None, str]:
    """The variant to use (None: plain torch) and the reason if it is not a compiled one.

    Raises ConfigError or UnavailableError if LAPIS_KERNELS asks for what is not there.
    """
    asked = os.environ.get("LAPIS_KERNELS", "")
    if asked in ("stock", TRITON):
        return None, f"LAPIS_KERNELS={asked}"
    if asked and asked not in VARIANTS:
        known = ("stock", TRITON, *VARIANTS)
        raise ConfigError(f"LAPIS_KERNELS={asked!r} is not a kernel variant", hint=nearest(asked, known))
    misfit = _misfit(head_size, widths, dtype)
    if asked:
        if misfit:
            raise UnavailableError(f"LAPIS_KERNELS={asked}: {misfit}", hint="Unset it, or set it to 'stock'.")
        library(asked)
        return asked, ""
    if misfit:
        return None, misfit
    refused: dict[str, list[str]] = {}  # why -> variants: mostly all for the same reason
    for variant in VARIANTS:
        if not library_path(variant).exists() or not VARIANTS[variant] <= cpu_flags():
            continue
        try:
            library(variant)
            return variant, ""
        except UnavailableError as error:
            why = error.message.replace(f"the {variant} kernels", "the {} kernels", 1)
            refused.setdefault(why, []).append(variant)
    reasons = [why.replace("{}", ", ".join(names)) for why, names in refused.items()]
    return None, "; ".join(reasons) or "no compiled kernels for this CPU are installed"


def wants_triton(head_size: int, dtype: str, has_gpu: Callable[[], bool]) -> bool:
    """Whether the Triton kernels are to run: asked for by LAPIS_KERNELS, or there is a GPU and the shape fits.

    Raises UnavailableError if they are asked for and cannot run.
    """
    asked, installed = os.environ.get("LAPIS_KERNELS", ""), find_spec("triton") is not None
    misfit = "" if installed else "the package triton is not installed"
    if dtype != "bfloat16":
        misfit = f"the Triton kernels store bf16, not {dtype}"
    elif head_size not in HEAD_SIZES:
        misfit = f"the Triton kernels have head sizes of multiples of 16 up to 256, not {head_size}"
    if asked == TRITON and misfit:
        hint = "Unset it, or set it to 'stock'." if installed else "pip install 'lapis[gpu]'"
        raise UnavailableError(f"LAPIS_KERNELS={asked}: {misfit}", hint=hint)
    return asked == TRITON or (not asked and not misfit and has_gpu())


def status() -> KernelStatus:
    """What runs here for a model that fits, what is built and what is missing. Torch is loaded only to ask a GPU."""
    built = tuple(variant for variant in VARIANTS if library_path(variant).exists())
    usable = tuple(variant for variant in built if VARIANTS[variant] <= cpu_flags())
    compiler = next((path for path in map(shutil.which, ("cc", "gcc", "clang")) if path), None)
    if os.environ.get("LAPIS_KERNELS") == TRITON:
        return _triton_status(built, usable, compiler)
    variant, reason = choose(HEAD_SIZES[1], (), "bfloat16")
    if variant is not None:
        return KernelStatus(f"cpu-{variant}", True, built, usable, compiler, "", "", "")
    hint = "unset LAPIS_KERNELS" if reason == "LAPIS_KERNELS=stock" else REBUILD
    if compiler is None and not usable:
        hint = f"install a C compiler (Debian: apt install gcc), then {REBUILD}"
    return KernelStatus("stock", False, built, usable, compiler, reason, LOST, hint)


def _triton_status(built: tuple[str, ...], usable: tuple[str, ...], compiler: str | None) -> KernelStatus:
    """Of the Triton kernels, which were asked for by name: the GPU, if there is one, tells."""
    try:
        wants_triton(HEAD_SIZES[1], "bfloat16", lambda: True)
        from lapis.kernels.triton import load

        ops = load()
    except UnavailableError as error:
        lost = "no model can be loaded"
        return KernelStatus("none", False, built, usable, compiler, error.message, lost, error.hint)
    lost = "" if ops.bit_exact else "an answer depends on what else is in the batch"
    return KernelStatus(ops.name, ops.bit_exact, built, usable, compiler, ops.reason, lost, "")


def _misfit(head_size: int, widths: Sequence[int], dtype: str) -> str:
    """What of a model's shape the compiled kernels do not offer; empty if all fits."""
    if dtype not in DTYPES:
        return f"the compiled kernels store bf16 or fp32, not {dtype}"
    if head_size not in HEAD_SIZES:
        return f"the compiled kernels have head sizes of multiples of 16 up to 256, not {head_size}"
    odd = [width for width in widths if width % WIDTH_STEP]
    return f"width {odd[0]} is not a multiple of {WIDTH_STEP}" if odd else ""
