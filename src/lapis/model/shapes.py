"""Names and shapes of all weights of a model, without torch: for whoever plans before anything is built."""

from __future__ import annotations

from lapis.model.config import ModelConfig

Shape = tuple[int, ...]


def shapes(config: ModelConfig) -> dict[str, Shape]:
    """The whole shape of every weight by its name, in the order of `Decoder.named_parameters`."""
    table = (config.vocab_size, config.width)
    found: dict[str, Shape] = {"embed": table, "norm": (config.width,)}
    if not config.tied:
        found["head"] = table
    if config.family == "gpt2":
        found |= {"positions": (config.context, config.width), "norm_bias": (config.width,)}
    for layer in range(config.layers):
        parts = _attention(config) | _feed_forward(config, layer)
        found |= {f"layers.{layer}.{name}": shape for name, shape in parts.items()}
    return found


def _attention(config: ModelConfig) -> dict[str, Shape]:
    width, size = config.width, config.head_size
    query, key = config.heads * size, config.kv_heads * size
    found: dict[str, Shape] = {
        "attn_norm": (width,),
        "qkv": (query + 2 * key, width),
        "out": (width, query),
    }
    if config.qkv_bias:
        found["qkv_bias"] = (query + 2 * key,)
    if config.out_bias:
        found["out_bias"] = (width,)
    if config.head_norm:
        whole = config.head_norm == "whole"
        found |= {"q_norm": (query if whole else size,), "k_norm": (key if whole else size,)}
    return found


def _feed_forward(config: ModelConfig, layer: int) -> dict[str, Shape]:
    width, ffn = config.width, config.ffn
    if config.is_mixture(layer):
        count, ffn = config.experts, config.expert_ffn
        stacks = {"experts_gate_up": (count, 2 * ffn, width), "experts_down": (count, width, ffn)}
        return {"ffn_norm": (width,), "router": (count, width), **stacks}
    if config.family == "gpt2":
        norms = dict.fromkeys(("attn_norm_bias", "ffn_norm", "ffn_norm_bias"), (width,))
        maps = {"up": (ffn, width), "up_bias": (ffn,), "down": (width, ffn), "down_bias": (width,)}
        return norms | maps
    found: dict[str, Shape] = {"ffn_norm": (width,), "gate_up": (2 * ffn, width), "down": (width, ffn)}
    if config.ffn_bias:
        found |= {"gate_up_bias": (2 * ffn,), "down_bias": (width,)}
    return found
