"""Our weights under Hugging Face's names and back: joined matrices are split, GPT-2's transposed, experts stacked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from lapis.errors import InputError
from lapis.model.config import ModelConfig

EMBED, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
# what a file may hold beside weights: computed tables and masks
COMPUTED = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")


@dataclass(frozen=True)
class _Place:
    """Where one of our tensors lies: Hugging Face's tensors, with their rows, one below the other."""

    shape: tuple[int, ...]  # ours
    parts: tuple[tuple[str, int], ...]
    transposed: bool = False
    fused: str = ""  # the name under which newer files hold all parts at once, in our shape


def to_hf_state(
    config: ModelConfig, state: Mapping[str, Tensor], dtype: torch.dtype = torch.bfloat16
) -> dict[str, Tensor]:
    """Our weights under Hugging Face's names. Raises InputError if they do not fit the config."""
    places = _places(config)
    if set(state) != set(places):
        odd = sorted(set(state) ^ set(places))
        raise InputError(
            f"The weights do not fit the configuration: missing or unknown: {', '.join(odd[:5])}."
        )
    result = {}
    for name, place in places.items():
        rows = state[name].detach().to(dtype).cpu().reshape(-1, *place.shape[-1:])
        if len(place.shape) == 1:
            rows = rows.flatten()
        split = torch.split(rows, [count for _, count in place.parts])
        for (hf_name, _), part in zip(place.parts, split, strict=True):
            result[hf_name] = (part.T if place.transposed else part).contiguous().clone()
    return result


def from_hf_state(
    config: ModelConfig, tensors: Mapping[str, Tensor], where: str, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Tensor]:
    """Hugging Face's tensors under our names.

    Raises InputError naming a tensor that is missing, of the wrong shape, or unknown.
    """
    prefix = "transformer." if config.family == "gpt2" else ""  # the first GPT-2 files have none
    rest = {
        name if name.startswith(prefix) or name == HEAD else prefix + name: tensor
        for name, tensor in tensors.items()
        if not name.endswith(COMPUTED)
    }

    def take(name: str, *shape: int) -> Tensor:
        if name not in rest:
            raise InputError(f"{where}: the tensor {name} is missing.")
        tensor = rest.pop(name)
        if tuple(tensor.shape) != shape:
            raise InputError(
                f"{where}: the tensor {name} has shape {tuple(tensor.shape)} instead of {shape}."
            )
        if not tensor.is_floating_point():
            raise InputError(
                f"{where}: the tensor {name} holds {tensor.dtype}: quantised weights come as GGUF only."
            )
        return tensor.to(dtype)

    state = {}
    for name, place in _places(config).items():
        if place.fused in rest:
            state[name] = take(place.fused, *place.shape)
            continue
        inner = place.shape[-1:] if len(place.shape) > 1 else ()
        taken = [
            take(part, *inner, rows).T if place.transposed else take(part, rows, *inner)
            for part, rows in place.parts
        ]
        joined = torch.cat(taken) if len(taken) > 1 else taken[0].contiguous()
        state[name] = joined.view(place.shape)
    if config.tied and HEAD in rest and not torch.equal(take(HEAD, *state["embed"].shape), state["embed"]):
        raise InputError(f"{where}: config.json says that {HEAD} is tied to the embedding, but they differ.")
    if rest:
        raise InputError(f"{where}: unknown tensors: {', '.join(sorted(rest)[:3])} ({len(rest)} in all).")
    return state


def _places(config: ModelConfig) -> dict[str, _Place]:
    """Our name of every weight of a model -> where it lies."""
    if config.family == "gpt2":
        places = _gpt2_places(config)
    else:
        places = {"embed": _one(EMBED, config.vocab_size, config.width), "norm": _one(NORM, config.width)}
        for index in range(config.layers):
            layer = _attention_places(config, f"model.layers.{index}.")
            layer |= (_mixture_places if config.is_mixture(index) else _ffn_places)(
                config, f"model.layers.{index}."
            )
            places |= {f"layers.{index}.{name}": place for name, place in layer.items()}
    if not config.tied:
        places["head"] = _one(HEAD, config.vocab_size, config.width)
    return places


def _one(name: str, *shape: int) -> _Place:
    return _Place(shape, ((name, prod(shape[:-1]) if len(shape) > 1 else shape[0]),))


def _joined(prefix: str, kind: str, columns: tuple[int, ...], parts: dict[str, int]) -> _Place:
    return _Place(
        (sum(parts.values()), *columns),
        tuple((f"{prefix}{name}.{kind}", rows) for name, rows in parts.items()),
    )


def _attention_places(config: ModelConfig, prefix: str) -> dict[str, _Place]:
    query, key, width = config.heads * config.head_size, config.kv_heads * config.head_size, config.width
    inputs = {"self_attn.q_proj": query, "self_attn.k_proj": key, "self_attn.v_proj": key}
    places = {
        "attn_norm": _one(f"{prefix}input_layernorm.weight", width),
        "ffn_norm": _one(f"{prefix}post_attention_layernorm.weight", width),
        "qkv": _joined(prefix, "weight", (width,), inputs),
        "out": _one(f"{prefix}self_attn.o_proj.weight", width, query),
    }
    if config.qkv_bias:
        places["qkv_bias"] = _joined(prefix, "bias", (), inputs)
    if config.out_bias:
        places["out_bias"] = _one(f"{prefix}self_attn.o_proj.bias", width)
    if config.head_norm:
        whole = config.head_norm == "whole"
        places["q_norm"] = _one(f"{prefix}self_attn.q_norm.weight", query if whole else config.head_size)
        places["k_norm"] = _one(f"{prefix}self_attn.k_norm.weight", key if whole else config.head_size)
    return places


def _ffn_places(config: ModelConfig, prefix: str) -> dict[str, _Place]:
    inputs = {"mlp.gate_proj": config.ffn, "mlp.up_proj": config.ffn}
    places = {
        "gate_up": _joined(prefix, "weight", (config.width,), inputs),
        "down": _one(f"{prefix}mlp.down_proj.weight", config.width, config.ffn),
    }
    if config.ffn_bias:
        places["gate_up_bias"] = _joined(prefix, "bias", (), inputs)
        places["down_bias"] = _one(f"{prefix}mlp.down_proj.bias", config.width)
    return places


def _mixture_places(config: ModelConfig, prefix: str) -> dict[str, _Place]:
    count, width, ffn = config.experts, config.width, config.expert_ffn
    mixtral = not config.head_norm
    block = f"{prefix}block_sparse_moe." if mixtral else f"{prefix}mlp."
    gate, up, down = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    inputs = tuple((f"{block}experts.{n}.{name}.weight", ffn) for n in range(count) for name in (gate, up))
    outputs = tuple((f"{block}experts.{n}.{down}.weight", width) for n in range(count))
    router = _one(f"{block}gate.weight", count, width)
    return {
        "router": _Place(router.shape, router.parts, fused=f"{prefix}mlp.gate.weight"),
        "experts_gate_up": _Place((count, 2 * ffn, width), inputs, fused=f"{prefix}mlp.experts.gate_up_proj"),
        "experts_down": _Place((count, width, ffn), outputs, fused=f"{prefix}mlp.experts.down_proj"),
    }


def _gpt2_places(config: ModelConfig) -> dict[str, _Place]:
    width, ffn = config.width, config.ffn
    places = {
        "embed": _one("transformer.wte.weight", config.vocab_size, width),
        "positions": _one("transformer.wpe.weight", config.context, width),
        "norm": _one("transformer.ln_f.weight", width),
        "norm_bias": _one("transformer.ln_f.bias", width),
    }
    shapes = {
        "qkv": ("attn.c_attn", 3 * width, width),
        "out": ("attn.c_proj", width, width),
        "up": ("mlp.c_fc", ffn, width),
        "down": ("mlp.c_proj", width, ffn),
    }
    for index in range(config.layers):
        prefix, ours = f"transformer.h.{index}.", f"layers.{index}."
        for name, hf_name in (("attn_norm", "ln_1"), ("ffn_norm", "ln_2")):
            places[f"{ours}{name}"] = _one(f"{prefix}{hf_name}.weight", width)
            places[f"{ours}{name}_bias"] = _one(f"{prefix}{hf_name}.bias", width)
        for name, (hf_name, rows, columns) in shapes.items():
            place = ((f"{prefix}{hf_name}.weight", rows),)
            places[f"{ours}{name}"] = _Place((rows, columns), place, transposed=True)
            places[f"{ours}{name}_bias"] = _one(f"{prefix}{hf_name}.bias", rows)
    return places
