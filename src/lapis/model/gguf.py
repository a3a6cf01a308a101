"""A GGUF file in: its weights dequantised to bfloat16, its tokenizer rebuilt.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Architectures: see gguf_config.py.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from torch import Tensor

from lapis.errors import InputError
from lapis.log import Progress, silent
from lapis.model.config import ModelConfig
from lapis.model.gguf_config import TABLES, Metadata, read_config
from lapis.model.gguf_names import hf_name
from lapis.model.gguf_tokenizer import build_tokenizer
from lapis.model.hf_state import from_hf_state
from lapis.model.weights import ImportedModel

READABLE = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")
ROWS_AT_ONCE = 4096  # rows dequantised together: bounds the float32 copy


def read_gguf(path: Path, progress: Progress = silent) -> ImportedModel:
    """Convert a GGUF file.

    Raises InputError for a damaged file or an unknown tokenizer, ConfigError for another architecture.
    """
    reader = _open(path)
    facts = Metadata(path, reader)
    config = read_config(facts, {tensor.name: tensor for tensor in reader.tensors})
    woven = facts.values["general.architecture"] == "llama"
    tensors: dict[str, Tensor] = {}
    for done, tensor in enumerate(reader.tensors):
        progress(done, len(reader.tensors), f"converting {tensor.name}")
        if tensor.name in TABLES:
            continue
        weight = _dequantise(path, tensor)
        if woven and tensor.name.rpartition(".")[0].endswith(("attn_q", "attn_k")):
            if weight.shape[0] % config.head_size:
                raise InputError(f"{path}: the tensor {tensor.name} does not hold whole heads.")
            weight = _to_rotate_half(weight, config.head_size)
        transposed = config.family == "gpt2" and weight.ndim == 2 and tensor.name.startswith("blk.")
        tensors[hf_name(tensor.name, config.family)] = weight.T if transposed else weight
    _join_experts(path, config, tensors)
    state = from_hf_state(config, tensors, where=str(path))
    built = build_tokenizer(facts.values, where=str(path))
    return ImportedModel(
        config=config,
        state=state,
        tokenizer=built.tokenizer,
        chat_template=built.chat_template,
        add_bos=built.add_bos,
        bos_id=built.bos_id,
        stop_ids=built.stop_ids,
        licence=str(facts.values.get("general.license", "unknown")),
    )


def _open(path: Path) -> GGUFReader:
    try:
        if path.stat().st_size == 0:
            raise InputError(f"{path} is empty.")
        return GGUFReader(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, IndexError, KeyError, OverflowError, struct.error) as error:
        raise InputError(
            f"{path} is not a whole GGUF file: {error}.",
            hint="It may have been cut off while it was copied or downloaded: fetch it again.",
        ) from error


def _join_experts(path: Path, config: ModelConfig, tensors: dict[str, Tensor]) -> None:
    """Gate and up of a layer's experts become one tensor, as newer Hugging Face files have them."""
    for index in range(config.layers):
        if not config.is_mixture(index):
            continue
        prefix = f"model.layers.{index}."
        parts = [tensors.pop(prefix + part, None) for part in ("gate", "up")]
        shape = (config.experts, config.expert_ffn, config.width)
        if any(part is None or part.shape != shape for part in parts):
            raise InputError(
                f"{path}: blk.{index} does not hold gate and up of its experts in shape {shape}."
            )
        tensors[f"{prefix}mlp.experts.gate_up_proj"] = torch.cat([p for p in parts if p is not None], dim=1)


def _dequantise(path: Path, tensor: Any) -> Tensor:
    """A GGUF tensor as bfloat16, the rows first."""
    kind = tensor.tensor_type
    if kind.name not in READABLE:
        raise InputError(
            f"{path}: the tensor {tensor.name} is stored as {kind.name}, which is not supported.",
            hint=f"Supported: {', '.join(READABLE)}.",
        )
    shape = tuple(int(size) for size in reversed(tensor.shape))
    if len(shape) == 1:
        return _bfloat16(dequantize(tensor.data, kind)).reshape(shape)
    weight = torch.empty(shape, dtype=torch.bfloat16)
    step = max(1, ROWS_AT_ONCE // (shape[1] if len(shape) > 2 else 1))
    for start in range(0, shape[0], step):
        rows = slice(start, start + step)
        weight[rows] = _bfloat16(dequantize(tensor.data[rows], kind))
    return weight


def _bfloat16(values: Any) -> Tensor:
    return torch.from_numpy(np.array(values, dtype=np.float32)).to(torch.bfloat16)


def _to_rotate_half(weight: Tensor, head_size: int) -> Tensor:
    """Query or key rows from llama.cpp's order (the pairs that rotate side by side) to halves of a head."""
    heads = weight.shape[0] // head_size
    return weight.view(heads, head_size // 2, 2, -1).transpose(1, 2).reshape(weight.shape)
