"""A GGUF file in: its weights dequantised to bfloat16, its tokenizer rebuilt.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Only the `llama` architecture.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from torch import Tensor

from lapis.errors import ConfigError, InputError
from lapis.log import Progress, silent
from lapis.model.config import SUPPORTED, ModelConfig
from lapis.model.gguf_tokenizer import build_tokenizer
from lapis.model.hf_state import EMBED, HEAD, NORM, from_hf_state
from lapis.model.weights import ImportedModel

READABLE = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")
ROWS_AT_ONCE = 4096  # rows dequantised together: bounds the float32 copy

# tensor of one layer in a GGUF file -> Hugging Face's name
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def read_gguf(path: Path, progress: Progress = silent) -> ImportedModel:
    """Convert a GGUF file.

    Raises InputError for a damaged file or an unknown tokenizer, ConfigError for another architecture.
    """
    reader = _open(path)
    facts = _Metadata(path, reader)
    config = _read_config(facts, {tensor.name: tensor for tensor in reader.tensors})
    tensors: dict[str, Tensor] = {}
    for done, tensor in enumerate(reader.tensors):
        progress(done, len(reader.tensors), f"converting {tensor.name}")
        name = _hf_name(tensor.name)
        weight = _dequantise(path, tensor)
        if tensor.name.endswith(("attn_q.weight", "attn_k.weight")):
            if weight.ndim != 2 or weight.shape[0] % config.head_size:
                raise InputError(f"{path}: the tensor {tensor.name} does not hold whole heads.")
            weight = _to_rotate_half(weight, config.head_size)
        tensors[name] = weight
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


class _Metadata:
    """The key-value pairs of a GGUF file, checked as they are read."""

    def __init__(self, path: Path, reader: GGUFReader) -> None:
        self.path = path
        try:
            self.values: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
        except (ValueError, IndexError) as error:
            raise InputError(f"{path}: its metadata cannot be read: {error}.") from error

    def whole(self, key: str, default: int | None = None) -> int:
        """A positive whole number. Raises InputError; ConfigError where each layer has its own."""
        value = self.values.get(key, default)
        if isinstance(value, list):
            raise ConfigError(f"{self.path}: layers of different shapes ({key}) are not supported.")
        if not isinstance(value, int) or value < 1:
            raise InputError(f"{self.path}: {key} = {value!r}: a positive whole number was expected.")
        return value

    def number(self, key: str, default: float) -> float:
        """A number. Raises InputError."""
        value = self.values.get(key, default)
        if not isinstance(value, int | float):
            raise InputError(f"{self.path}: {key} = {value!r}: a number was expected.")
        return float(f"{value:.7g}")  # stored as float32: 9.999999747e-06 means 1e-5


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


def _read_config(facts: _Metadata, tensors: Mapping[str, Any]) -> ModelConfig:
    architecture = facts.values.get("general.architecture")
    if architecture != "llama":
        raise ConfigError(
            f"{facts.path}: the architecture {architecture!r} is not supported.",
            hint=f"Supported: {SUPPORTED}.",
        )
    if "token_embd.weight" not in tensors:
        raise InputError(f"{facts.path}: the tensor token_embd.weight is missing.")
    width, heads = facts.whole("llama.embedding_length"), facts.whole("llama.attention.head_count")
    head_size = facts.whole("llama.attention.key_length", width // heads)
    context = facts.whole("llama.context_length")
    _refuse_features(facts, tensors, head_size, context)
    return ModelConfig(
        family="llama",
        vocab_size=int(tensors["token_embd.weight"].shape[1]),
        layers=facts.whole("llama.block_count"),
        width=width,
        heads=heads,
        kv_heads=facts.whole("llama.attention.head_count_kv", heads),
        head_size=head_size,
        ffn=facts.whole("llama.feed_forward_length"),
        context=context,
        rope_base=facts.number("llama.rope.freq_base", 10000.0),
        norm_eps=facts.number("llama.attention.layer_norm_rms_epsilon", 1e-5),
        tied="output.weight" not in tensors,
    )


def _refuse_features(facts: _Metadata, tensors: Mapping[str, Any], head_size: int, context: int) -> None:
    """Raise ConfigError for what a llama-architecture file may ask for and this model does not compute."""
    scaling = facts.values.get("llama.rope.scaling.type", "none")
    asked = {
        "a mixture of experts": facts.number("llama.expert_count", 0) > 0,
        "rope scaling": scaling != "none"
        or facts.number("llama.rope.scale_linear", 1.0) != 1.0
        or "rope_freqs.weight" in tensors,
        "a sliding window": 0 < facts.number("llama.attention.sliding_window", 0) < context,
        "rotation of a part of a head": facts.number("llama.rope.dimension_count", head_size) != head_size,
        "values wider than keys": facts.number("llama.attention.value_length", head_size) != head_size,
        "biases": any(name.endswith(".bias") for name in tensors),
    }
    for what, present in asked.items():
        if present:
            raise ConfigError(f"{facts.path}: {what}: not supported.", hint=f"Supported: {SUPPORTED}.")


def _hf_name(name: str) -> str:
    """Hugging Face's name of a GGUF tensor; a name that has none stays, and is refused as unknown later."""
    whole = {"token_embd.weight": EMBED, "output_norm.weight": NORM, "output.weight": HEAD}
    if name in whole:
        return whole[name]
    prefix, _, rest = name.partition(".")
    index, _, part = rest.partition(".")
    known = LAYER_NAMES.get(part.removesuffix(".weight"))
    return f"model.layers.{index}.{known}.weight" if prefix == "blk" and known else name


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
    for start in range(0, shape[0], ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        weight[rows] = _bfloat16(dequantize(tensor.data[rows], kind))
    return weight


def _bfloat16(values: Any) -> Tensor:
    return torch.from_numpy(np.array(values, dtype=np.float32)).to(torch.bfloat16)


def _to_rotate_half(weight: Tensor, head_size: int) -> Tensor:
    """Query or key rows from llama.cpp's order (the pairs that rotate side by side) to halves of a head."""
    rows, width = weight.shape
    return weight.view(rows // head_size, head_size // 2, 2, width).transpose(1, 2).reshape(rows, width)
