"""The ModelConfig of a GGUF file, from its metadata and the tensors that it holds, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader

from lapis.errors import ConfigError, InputError
from lapis.kernels.rope import RopeScaling, frequencies, yarn_attention
from lapis.model.config import SUPPORTED, ModelConfig
from lapis.model.config_hf import hf_kind

ARCHITECTURES = ("llama", "qwen2", "qwen3", "qwen3moe", "olmoe", "gpt2")
# what GGUF calls a model_type of transformers; the others have the same name
OF_MODEL_TYPE = {"mistral": "llama", "mixtral": "llama", "qwen3_moe": "qwen3moe"}
FREQUENCIES = "rope_freqs.weight"
TABLES = (FREQUENCIES,)  # tensors that are no weights


class Metadata:
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


def read_config(facts: Metadata, tensors: Mapping[str, Any]) -> ModelConfig:
    """The shape of the model. Raises ConfigError for another architecture, InputError for what is missing."""
    kind = facts.values.get("general.architecture")
    if kind not in ARCHITECTURES:
        raise ConfigError(
            f"{facts.path}: the architecture {kind!r} is not supported.", hint=f"Supported: {SUPPORTED}."
        )
    if "token_embd.weight" not in tensors:
        raise InputError(f"{facts.path}: the tensor token_embd.weight is missing.")
    gpt2 = kind == "gpt2"
    width, heads = facts.whole(f"{kind}.embedding_length"), facts.whole(f"{kind}.attention.head_count")
    head_size = facts.whole(f"{kind}.attention.key_length", width // heads)
    context, base = facts.whole(f"{kind}.context_length"), facts.number(f"{kind}.rope.freq_base", 10000.0)
    _refuse_features(facts, kind, head_size)
    window = int(facts.number(f"{kind}.attention.sliding_window", 0))
    norm = tensors.get("blk.0.attn_q_norm.weight")
    epsilon = "layer_norm_epsilon" if gpt2 else "layer_norm_rms_epsilon"
    return ModelConfig(
        family="gpt2" if gpt2 else "moe" if facts.number(f"{kind}.expert_count", 0) > 0 else "llama",
        vocab_size=int(tensors["token_embd.weight"].shape[1]),
        layers=facts.whole(f"{kind}.block_count"),
        width=width,
        heads=heads,
        kv_heads=facts.whole(f"{kind}.attention.head_count_kv", heads),
        head_size=head_size,
        ffn=facts.whole(f"{kind}.feed_forward_length"),
        context=context,
        rope_base=0.0 if gpt2 else base,
        norm_eps=facts.number(f"{kind}.attention.{epsilon}", 1e-5),
        tied="output.weight" not in tensors,
        rope_scaling=None if gpt2 else _scaling(facts, kind, tensors, head_size, base, context),
        qkv_bias="blk.0.attn_q.bias" in tensors or gpt2,
        out_bias="blk.0.attn_output.bias" in tensors,
        ffn_bias="blk.0.ffn_up.bias" in tensors,
        head_norm="" if norm is None else "head" if int(norm.shape[0]) == head_size else "whole",
        window=window if 0 < window < context else None,
        **_experts(facts, kind, tensors),
    )


def _experts(facts: Metadata, kind: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
    if not facts.number(f"{kind}.expert_count", 0):
        return {}
    layers = facts.whole(f"{kind}.block_count")
    return {
        "experts": facts.whole(f"{kind}.expert_count"),
        "experts_per_token": facts.whole(f"{kind}.expert_used_count"),
        "expert_ffn": facts.whole(
            f"{kind}.expert_feed_forward_length", facts.whole(f"{kind}.feed_forward_length")
        ),
        "normalise_experts": kind != "olmoe",  # the architecture decides; the file does not say
        "dense_layers": tuple(
            layer for layer in range(layers) if f"blk.{layer}.ffn_gate_inp.weight" not in tensors
        ),
    }


def _refuse_features(facts: Metadata, kind: str, head_size: int) -> None:
    """Raise ConfigError for what a file may ask for and this model does not compute."""
    asked = {
        "rotation of a part of a head": facts.number(f"{kind}.rope.dimension_count", head_size) != head_size,
        "values wider than keys": facts.number(f"{kind}.attention.value_length", head_size) != head_size,
        "clamped queries and keys": facts.number(f"{kind}.attention.clamp_kqv", 0) > 0,
        "shared experts": facts.number(f"{kind}.expert_shared_count", 0) > 0,
    }
    for what, present in asked.items():
        if present:
            raise ConfigError(f"{facts.path}: {what}: not supported.", hint=f"Supported: {SUPPORTED}.")


def _scaling(
    facts: Metadata, kind: str, tensors: Mapping[str, Any], head_size: int, base: float, context: int
) -> RopeScaling | None:
    named = facts.values.get(f"{kind}.rope.scaling.type", "none")
    factor = facts.number(f"{kind}.rope.scaling.factor", facts.number(f"{kind}.rope.scale_linear", 1.0))
    if FREQUENCIES in tensors:
        if named != "none":
            raise ConfigError(
                f"{facts.path}: rope scaling {named!r} beside a table of frequencies: not supported."
            )
        return _from_table(facts.path, tensors[FREQUENCIES].data, head_size, base)
    if factor == 1.0 and named in ("none", "linear", "yarn"):
        return None
    if named in ("linear", "none"):
        return RopeScaling("linear", factor)
    if named != "yarn":
        raise ConfigError(f"{facts.path}: rope scaling of type {named!r}: not supported.")
    original = facts.whole(f"{kind}.rope.scaling.original_context_length", context)
    attention = facts.number(f"{kind}.rope.scaling.attn_factor", 1.0) * yarn_attention(factor)
    return RopeScaling("yarn", factor, original, attention=attention)


def _from_table(path: Path, table: Any, head_size: int, base: float) -> RopeScaling | None:
    """The Llama 3 scaling whose frequencies are the plain ones divided by this table."""
    divisors = np.array(table, dtype=np.float64).reshape(-1)
    if np.allclose(divisors, 1.0):
        return None
    plain = np.array(frequencies(head_size, base))
    for original in (
        2**power for power in range(10, 18)
    ):  # the file keeps the result, not what it was made of
        scaling = RopeScaling("llama3", float(f"{divisors.max():.5g}"), original)
        made = plain / np.array(frequencies(head_size, base, scaling))
        if divisors.shape == made.shape and np.allclose(divisors, made, rtol=1e-4):
            return scaling
    raise ConfigError(
        f"{path}: its table of rotary frequencies (rope_freqs) is not Llama 3's: not supported.",
        hint=f"Supported: {SUPPORTED}.",
    )


def architecture(config: ModelConfig) -> str:
    """What a GGUF file calls such a model."""
    kind = hf_kind(config)
    return OF_MODEL_TYPE.get(kind, kind)


def to_metadata(config: ModelConfig) -> dict[str, Any]:
    """The metadata from which `read_config` reads this shape.

    Raises ConfigError for a sliding window: of the architectures here, llama.cpp computes none with one.
    """
    if config.window is not None:
        raise ConfigError(
            f"A GGUF file of this model would be computed without its sliding window of {config.window} tokens.",
            hint="The plain folder has it: lapis models export NAME FOLDER",
        )
    kind, gpt2 = architecture(config), config.family == "gpt2"
    values: dict[str, Any] = {
        "context_length": config.context,
        "embedding_length": config.width,
        "block_count": config.layers,
        "feed_forward_length": config.ffn,
        "attention.head_count": config.heads,
        "attention.head_count_kv": config.kv_heads,
        "attention.key_length": config.head_size,
        "attention.value_length": config.head_size,
        f"attention.layer_norm_{'' if gpt2 else 'rms_'}epsilon": config.norm_eps,
    }
    if config.rotary:
        values |= {"rope.freq_base": config.rope_base, "rope.dimension_count": config.head_size}
        values |= _scaling_metadata(config.rope_scaling)
    if config.experts:
        values |= {
            "expert_count": config.experts,
            "expert_used_count": config.experts_per_token,
            "expert_feed_forward_length": config.expert_ffn,
        }
    return {f"{kind}.{key}": value for key, value in values.items()}


def frequency_table(config: ModelConfig) -> np.ndarray[Any, Any] | None:
    """What Llama 3's scaling divides each frequency by: a tensor of the file, since no metadata tell it."""
    scaling = config.rope_scaling
    if scaling is None or scaling.kind != "llama3":
        return None
    plain, scaled = (frequencies(config.head_size, config.rope_base, how) for how in (None, scaling))
    table: np.ndarray[Any, Any] = (np.array(plain) / np.array(scaled)).astype(np.float32)
    return table


def require_same(config: ModelConfig, found: ModelConfig) -> None:
    """Raise ConfigError if a file that was written of `config` says something else."""
    scaling = found.rope_scaling
    if scaling is not None and config.rope_scaling is not None and scaling.kind == "yarn":
        attention = config.rope_scaling.attention  # stored as a float32 factor of YaRN's own
        if np.isclose(scaling.attention, attention, rtol=1e-6, atol=0):
            found = replace(found, rope_scaling=replace(scaling, attention=attention))
    if found != config:
        odd = [name for name, value in asdict(config).items() if value != asdict(found)[name]]
        raise ConfigError(
            f"A GGUF file cannot say what this {config.family} model computes ({', '.join(odd)}).",
            hint="The plain folder can: lapis models export NAME FOLDER",
        )


def _scaling_metadata(scaling: RopeScaling | None) -> dict[str, Any]:
    if scaling is None or scaling.kind == "llama3":
        return {}
    values: dict[str, Any] = {"rope.scaling.type": scaling.kind, "rope.scaling.factor": scaling.factor}
    if scaling.kind == "yarn":
        values["rope.scaling.original_context_length"] = scaling.original_context
        values["rope.scaling.attn_factor"] = scaling.attention / yarn_attention(scaling.factor)
    return values
