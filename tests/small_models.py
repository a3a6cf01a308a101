"""Small random models for tests: as our weights, as a Hugging Face folder, as a GGUF file."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from lapis.kernels.rope import RopeScaling
from lapis.kernels.stock import StockOps
from lapis.model.adapters import Adapter
from lapis.model.config import ModelConfig
from lapis.model.config_hf import to_hf
from lapis.model.families import build
from lapis.tokenizer.bpe import Tokenizer

TEXT = ["the quick brown fox jumps over the lazy dog 1234567890\n", "def f(x):\n    return x + 1\n"] * 20


def config(**changes: object) -> ModelConfig:
    """Two layers with grouped heads: small, and every shape different from the others."""
    values = {
        "family": "llama",
        "vocab_size": 320,
        "layers": 2,
        "width": 128,
        "heads": 4,
        "kv_heads": 2,
        "head_size": 32,
        "ffn": 256,
        "context": 256,
        "rope_base": 10000.0,
        "norm_eps": 1e-5,
        "tied": True,
    }
    return ModelConfig(**{**values, **changes})  # type: ignore[arg-type]


def families() -> dict[str, ModelConfig]:
    """A small model of every kind, by the name that its feature or its origin has."""
    gpt2 = {"family": "gpt2", "kv_heads": 4, "rope_base": 0.0}
    experts = {"family": "moe", "ffn": 64, "experts": 8, "experts_per_token": 2, "expert_ffn": 64}
    biases = {"qkv_bias": True, "out_bias": True, "ffn_bias": True}
    return {
        "llama": config(tied=False),
        "biases": config(**biases),
        "linear": config(rope_scaling=RopeScaling("linear", 4.0)),
        "llama3": config(rope_base=5e5, rope_scaling=RopeScaling("llama3", 8.0, 64)),
        "yarn": config(rope_scaling=RopeScaling("yarn", 4.0, 64, attention=1.1386)),
        "mistral": config(window=40),
        "qwen2": config(layers=3, qkv_bias=True, window=33, full_layers=(0, 1)),
        "qwen3": config(head_size=64, head_norm="head"),
        "mixtral": config(**experts, normalise_experts=True),
        "olmoe": config(**experts, head_norm="whole", tied=False),
        "qwen3 moe": config(
            **experts | {"ffn": 256}, layers=3, normalise_experts=True, head_norm="head", dense_layers=(1,)
        ),
        "gpt2": config(**gpt2, **biases),
        "gpt2 untied": config(**gpt2, **biases, tied=False, ffn=192),
    }


def tokenizer(size: int = 300) -> Tokenizer:
    """A byte-level BPE of a few sentences."""
    return Tokenizer.train(TEXT, size)


def random_state(shape: ModelConfig, seed: int = 0) -> dict[str, Tensor]:
    """Weights of lively size, so that every one of them shows in the logits."""
    model = build(shape, StockOps())
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, weight in model.state_dict().items():
        noise = torch.randn(weight.shape, generator=generator)
        noise *= 4 if name.endswith("router") else 1  # so that rounding seldom decides between two experts
        state[name] = (1 + noise * 0.1 if weight.ndim == 1 and "bias" not in name else noise * 0.08).to(
            torch.bfloat16
        )
    return state


def random_adapter(shape: ModelConfig, seed: int, rank: int = 4) -> Adapter:
    """A low-rank adapter of every linear map that one can adapt, strong enough to change texts."""
    generator = torch.Generator().manual_seed(seed)
    inner, whole = shape.heads * shape.head_size, (shape.heads + 2 * shape.kv_heads) * shape.head_size
    sizes = {"qkv": (whole, shape.width), "out": (shape.width, inner)}
    if shape.family == "llama":
        sizes |= {"gate_up": (2 * shape.ffn, shape.width), "down": (shape.width, shape.ffn)}
    if shape.family == "gpt2":
        sizes |= {"up": (shape.ffn, shape.width), "down": (shape.width, shape.ffn)}

    def matrix(*size: int) -> Tensor:
        return (torch.randn(*size, generator=generator) * 0.2).bfloat16()

    pairs = [
        {name: (matrix(rank, columns), matrix(rows, rank)) for name, (rows, columns) in sizes.items()}
        for _ in range(shape.layers)
    ]
    return Adapter(tuple(pairs))


def write_hf_folder(
    folder: Path, shape: ModelConfig, tensors: Mapping[str, Tensor], shards: int = 1, **config_changes: object
) -> Path:
    """A Hugging Face folder as others write it: weights in one file or in shards with an index."""
    folder.mkdir(parents=True)
    made = tokenizer()
    made.save(folder / "tokenizer.json")
    ends = {"eos_token_id": made.end_id}
    (folder / "config.json").write_text(json.dumps({**to_hf(shape), **ends, **config_changes}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors")
        return folder
    weight_map = {}
    for number in range(shards):
        name = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {key: tensors[key] for key in sorted(tensors)[number::shards]}
        save_file(part, folder / name)
        weight_map.update(dict.fromkeys(part, name))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
    "block_sparse_moe.gate": "ffn_gate_inp",
    "block_sparse_moe.experts.w1": "ffn_gate_exps",
    "block_sparse_moe.experts.w3": "ffn_up_exps",
    "block_sparse_moe.experts.w2": "ffn_down_exps",
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
}


def gguf_name(name: str) -> str:
    """Hugging Face's name of a tensor as llama.cpp names it; all experts of a layer share one name."""
    stem, _, kind = name.rpartition(".")
    if stem in GGUF_NAMES:
        return f"{GGUF_NAMES[stem]}.{kind}"
    _, _, index, part = stem.split(".", 3)
    return f"blk.{index}.{GGUF_NAMES[re.sub(r'experts[.][0-9]+', 'experts', part)]}.{kind}"


def gguf_architecture(shape: ModelConfig) -> str:
    """What llama.cpp calls such a model."""
    if shape.family == "gpt2":
        return "gpt2"
    if shape.family == "moe":
        return {"": "llama", "head": "qwen3moe", "whole": "olmoe"}[shape.head_norm]
    return "qwen3" if shape.head_norm else "qwen2" if shape.qkv_bias and not shape.out_bias else "llama"


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """Query or key rows as llama.cpp's converter stores them: the two halves of a head woven together."""
    rows = weight.shape[0]
    return weight.reshape(heads, 2, rows // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    path: Path,
    shape: ModelConfig,
    tensors: Mapping[str, np.ndarray],
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    raw: Mapping[str, tuple[np.ndarray, gguf.GGMLQuantizationType]] | None = None,
    architecture: str | None = None,
    pre: str = "smollm",
    extra: Mapping[str, object] | None = None,
) -> Path:
    """A GGUF file of float32 tensors under Hugging Face's names, matrices quantised to `kind`.

    `raw` gives tensors (GGUF's names) as they are to be stored, in place of or beside the others.
    """
    architecture = architecture or gguf_architecture(shape)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    (writer.add_layer_norm_rms_eps if shape.rotary else writer.add_layer_norm_eps)(shape.norm_eps)
    writer.add_key_length(shape.head_size)
    if shape.rotary:
        writer.add_rope_freq_base(shape.rope_base)
        writer.add_rope_dimension_count(shape.head_size)
    if shape.experts:
        writer.add_expert_count(shape.experts)
        writer.add_expert_used_count(shape.experts_per_token)
        writer.add_expert_feed_forward_length(shape.expert_ffn)
    writer.add_license("apache-2.0")
    _add_tokenizer(writer, pre)
    for key, value in (extra or {}).items():
        adding = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}
        adding[type(value)](key, value)  # type: ignore[operator]
    raw = dict(raw or {})
    stacks: dict[str, list[np.ndarray]] = {}
    for name, array in tensors.items():
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            array = interleave(array, shape.heads if "q_proj" in name else shape.kv_heads)
        if architecture == "gpt2" and array.ndim == 2 and ".h." in name:
            array = np.ascontiguousarray(array.T)
        stacks.setdefault(gguf_name(name), []).append(array)
    for name, arrays in stacks.items():
        array = np.stack(arrays) if "_exps" in name else arrays[0]
        stored = gguf.GGMLQuantizationType.F32 if array.ndim == 1 else kind
        raw.setdefault(name, (gguf.quants.quantize(array, stored), stored))
    for name, (array, stored) in raw.items():
        writer.add_tensor(name, array, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: gguf.GGUFWriter, pre: str) -> None:
    model = json.loads(tokenizer().to_json())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
