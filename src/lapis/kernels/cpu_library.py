"""The C functions of one build, with their types. Every call releases the GIL."""

from __future__ import annotations

import ctypes
from ctypes import Structure, c_double, c_float, c_int, c_int64, c_void_p
from types import SimpleNamespace
from typing import Any

SUM_ROWS, NORM_STEP, COLUMNS, PANEL_ROWS = 64, 4096, 32, 12  # as in the C sources: they size work buffers

_P, _I = c_void_p, c_int64
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "pack": (None, [_P, _P, _I, _I]),
    "linear": (None, [_P, _I, _I, _P, _I, _P, _P, _P, c_int]),
    "linear_quantized": (None, [_P, _I, _I, _P, _P, _P, _I, _P, _P, _P, c_int, _P]),
    "linear_quantized_stack": (None, [_P, _I, _I, _I, _P, _I, _P, _P, _P, _I, _P, c_int, _P]),
    "linear_grouped": (None, [_P, _I, _I, _I, _P, _P, _I, _I, _P, _P, c_int, _P]),
    "route": (None, [_P, _I, _I, _I, c_int, _P, _P]),
    "weighted_sum": (None, [_P, _P, _P, _P, _I, _I, _I]),
    "rms_norm": (None, [_P, _P, _P, _I, _I, c_float]),
    "silu_mul": (None, [_P, _P, _I, _I]),
    "layer_norm": (None, [_P, _P, _P, _P, _I, _I, c_float]),
    "gelu": (None, [_P, _P, _I, _I]),
    "head_norm": (None, [_P, _P, _P, _P, _I, _I, _I, _I, _I, _I, c_float]),
    "gather": (None, [_P, _I, _P, _P, _I, _I]),
    "gather_add": (None, [_P, _I, _P, _P, _I, _P, _P, _I, _I]),
    "logprobs": (None, [_P, _I, _I, _P, _P]),
    "argmax": (None, [_P, _I, _I, _I, _P]),
    "attention": (None, [_P, _P, _I, _I, _I, _I, _P, _P, _P, _P, c_int, _P, _P, _P, _P]),
    "pack_rows": (None, [_P, _P, _I, _I]),
    "linear_weight_gradient": (None, [_P, _P, _P, _P, _I, _I, _I]),
    "linear_bias_gradient": (None, [_P, _P, _I, _I]),
    "rms_norm_backward": (None, [_P, _P, _P, _P, _P, _P, _I, _I, c_float]),
    "silu_mul_backward": (None, [_P, _P, _P, _I, _I]),
    "layer_norm_backward": (None, [_P, _P, _P, _P, _P, _P, _P, _I, _I, c_float]),
    "gelu_backward": (None, [_P, _P, _P, _I, _I]),
    "head_norm_backward": (None, [_P, _P, _P, _P, _P, _P, _P, _P, _I, _I, _I, _I, _I, _I, c_float]),
    "embedding_backward": (None, [_P, _P, _P, _P, _I, _I]),
    "cross_entropy": (None, [_P, _I, _I, _P, _P, _P, _P]),
    "attention_backward": (None, [_P, _I, _P, _P, _P, _P, _P, _P, _P, _P, _P, _P, _I, _I, _I, _I]),
    "adamw": (None, [_P, _P, _P, _P, _P, _I, _P]),
    "muon": (c_int, [_P, _P, _P, _P, _P, _I, _P]),
    "squared_norm": (c_double, [_P, _I, _P]),
    "pack_fp32": (None, [_P, _P, _I, _I]),
    "linear_fp32": (None, [_P, _I, _I, _P, _I, _P, _P, _P]),
    "rms_norm_fp32": (None, [_P, _P, _P, _I, _I, c_float]),
    "layer_norm_fp32": (None, [_P, _P, _P, _P, _I, _I, c_float]),
    "head_norm_fp32": (None, [_P, _P, _P, _P, _I, _I, _I, _I, _I, _I, c_float]),
    "silu_mul_fp32": (None, [_P, _P, _I, _I]),
    "gelu_fp32": (None, [_P, _P, _I, _I]),
    "weighted_sum_fp32": (None, [_P, _P, _P, _P, _I, _I, _I]),
    "gather_add_fp32": (None, [_P, _I, _P, _P, _I, _P, _P, _I, _I]),
    "attention_fp32": (None, [_P, _P, _I, _I, _I, _I, _P, _P, _P, _P, _P, _P, _P, _P]),
    "replay": (None, [_P, _I]),
    "replayable": (c_int, []),
}


class CBatch(Structure):
    """`struct batch` of cpu.c: pointers to the int32 tensors of a Batch."""

    _fields_ = (
        ("sequence", c_void_p),
        ("position", c_void_p),
        ("page_table", c_void_p),
        ("tokens", c_int64),
        ("columns", c_int64),
    )


class CAdamW(Structure):
    """`struct adamw` of cpu_train.c: the numbers of one optimizer step."""

    _fields_ = (
        ("lr", c_float),
        ("beta1", c_float),
        ("beta2", c_float),
        ("eps", c_float),
        ("weight_decay", c_float),
        ("correction1", c_float),
        ("correction2", c_float),
        ("clip", c_float),
    )


class CMuon(Structure):
    """`struct muon` of cpu_muon.c: the numbers of one optimizer step."""

    _fields_ = (
        ("lr", c_float),
        ("beta", c_float),
        ("weight_decay", c_float),
        ("a", c_float),
        ("b", c_float),
        ("c", c_float),
        ("iterations", c_int64),
    )


def bind(library: ctypes.CDLL) -> SimpleNamespace:
    """The library's functions under their short names."""
    functions = SimpleNamespace(library=library)
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, f"lapis_{name}")
        function.restype, function.argtypes = result, arguments
        setattr(functions, name, function)
    return functions
