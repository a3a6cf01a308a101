"""The names of tensors in a GGUF file and in Hugging Face's files, one for the other, both ways."""

from __future__ import annotations

import re

from lapis.model.hf_state import EMBED, HEAD, NORM

# tensor of one layer in a GGUF file -> Hugging Face's name, of models with rotary positions and of GPT-2
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
}
GPT2_NAMES = {
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
WHOLE_NAMES = {"token_embd.weight": EMBED, "output_norm.weight": NORM, "output.weight": HEAD}
GPT2_WHOLE_NAMES = {
    "token_embd.weight": "transformer.wte.weight",
    "position_embd.weight": "transformer.wpe.weight",
    "output_norm.weight": "transformer.ln_f.weight",
    "output_norm.bias": "transformer.ln_f.bias",
    "output.weight": HEAD,
}
# the matrices of all experts of a layer in one tensor
EXPERTS = {
    "ffn_gate_exps.weight": "gate",
    "ffn_up_exps.weight": "up",
    "ffn_down_exps.weight": "mlp.experts.down_proj",
}
# a matrix of one expert in Hugging Face's files, by the names of OLMoE and Qwen3, and of Mixtral
ONE_EXPERT = re.compile(r"(?:mlp|block_sparse_moe)\.experts\.\d+\.(\w+)")
EXPERT_PARTS = {
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
    "w1": "gate",
    "w3": "up",
    "w2": "down",
}
MIXTRAL_ROUTER = "block_sparse_moe.gate"


def hf_name(name: str, family: str) -> str:
    """Hugging Face's name of a GGUF tensor; a name that has none stays, and is refused as unknown later."""
    gpt2 = family == "gpt2"
    whole = GPT2_WHOLE_NAMES if gpt2 else WHOLE_NAMES
    if name in whole:
        return whole[name]
    prefix, _, rest = name.partition(".")
    index, _, part = rest.partition(".")
    stem, _, kind = part.rpartition(".")
    known = (GPT2_NAMES if gpt2 else LAYER_NAMES).get(stem)
    if prefix == "blk" and part in EXPERTS:
        return f"model.layers.{index}.{EXPERTS[part]}"
    if prefix != "blk" or known is None or kind not in ("weight", "bias"):
        return name
    return f"transformer.h.{index}.{known}.{kind}" if gpt2 else f"model.layers.{index}.{known}.{kind}"


def gguf_name(name: str, family: str) -> str:
    """The GGUF name of a tensor under Hugging Face's; the matrices of all experts of a layer share one.

    Raises KeyError for a name that is not of the family.
    """
    gpt2 = family == "gpt2"
    whole = _turned(GPT2_WHOLE_NAMES if gpt2 else WHOLE_NAMES)
    if name in whole:
        return whole[name]
    _, _, index, part = name.split(".", 3)  # of transformer.h.0.… or model.layers.0.…
    stem, _, kind = part.rpartition(".")
    expert = ONE_EXPERT.fullmatch(stem)
    if expert:
        return f"blk.{index}.ffn_{EXPERT_PARTS[expert[1]]}_exps.{kind}"
    layer = _turned(GPT2_NAMES if gpt2 else LAYER_NAMES) | {MIXTRAL_ROUTER: "ffn_gate_inp"}
    return f"blk.{index}.{layer[stem]}.{kind}"


def _turned(names: dict[str, str]) -> dict[str, str]:
    return {theirs: ours for ours, theirs in names.items()}
