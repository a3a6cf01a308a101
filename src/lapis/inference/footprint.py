"""How much memory an engine takes, told from a model's shape before anything is loaded. No torch here."""

from __future__ import annotations

from typing import Literal

from lapis.inference.kv_cache import PAGE, pages_for
from lapis.model.config import ModelConfig

DEFAULT_CACHE_BYTES = 2 << 30
DEFAULT_SEQUENCES = 16
LEAST_KEPT_BYTES = 64 << 20
# A value's bytes with its share of the scales (and minimums) of its group, see kernels/quantized.py.
VALUE_BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 1 + 2 / 64, "int4": 1 / 2 + 4 / 32}

Dtype = Literal["fp32", "bf16", "int8"]


def page_bytes(config: ModelConfig, dtype: Dtype) -> int:
    """Bytes of one page of keys and values, all layers."""
    size = PAGE * config.kv_bytes_per_token
    if dtype == "int8":  # a byte a value, and a scale in fp32 for each token, head, and of keys and values
        return size // 2 + PAGE * 2 * 4 * config.layers * config.kv_heads
    return 2 * size if dtype == "fp32" else size


def cache_pages(config: ModelConfig, dtype: Dtype, cache_bytes: int | None = None) -> int:
    """Pages of a cache of so many bytes (default: 16 full contexts, at most 2 GiB): one full context at least."""
    context, size = pages_for(config.context), page_bytes(config, dtype)
    if cache_bytes is None:
        cache_bytes = min(DEFAULT_CACHE_BYTES, DEFAULT_SEQUENCES * context * size)
    return max(context, cache_bytes // size)


def engine_bytes(config: ModelConfig, weights: str, cache_dtype: str = "bf16") -> int:
    """Bytes of weights, as they are kept for serving, and of a full cache. Cached is what is computed, or int8."""
    dtype = _cache_dtype(weights, cache_dtype)
    return _weight_bytes(config, weights) + cache_pages(config, dtype) * page_bytes(config, dtype)


def kept_pages(config: ModelConfig, weights: str, cache_dtype: str = "bf16") -> int:
    """Pages that cached prefixes may take of a cache of default size: a third of what weights take, 64 MiB at least."""
    kept = max(LEAST_KEPT_BYTES, _weight_bytes(config, weights) // 3)
    return kept // page_bytes(config, _cache_dtype(weights, cache_dtype))


def _cache_dtype(weights: str, cache_dtype: str) -> Dtype:
    return "int8" if cache_dtype == "int8" else "fp32" if weights == "fp32" else "bf16"


def _weight_bytes(config: ModelConfig, weights: str) -> int:
    table = config.vocab_size * config.width
    if weights in ("bf16", "fp32"):  # a tied table is kept as rows and as the head's matrix
        return int((config.parameters + table * config.tied) * VALUE_BYTES[weights])
    routers = config.experts * config.width * sum(map(config.is_mixture, range(config.layers)))
    few = sum(map(config.layer_parameters, range(config.layers))) - routers
    rest = config.parameters - few - (0 if config.tied else table)
    return int(few * VALUE_BYTES[weights] + table * VALUE_BYTES["int8"] + rest * VALUE_BYTES["bf16"])
