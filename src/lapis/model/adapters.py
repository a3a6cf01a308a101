"""Low-rank adapters (LoRA, Hu et al. 2021) in and out, in the format of Hugging Face's PEFT.

A pair (A, B) adds B A x to a linear map. PEFT adapts query, key and value one by one; here they are one map, so
their As are stacked and their Bs stand on a diagonal. The scale is part of B; ranks are even.
Dims: K and N inputs and outputs of a linear map, R rank.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from lapis.errors import ConflictError, InputError
from lapis.kernels.batch import AdapterPair
from lapis.model import layout
from lapis.model.config import ModelConfig
from lapis.model.weights import read_tensors
from lapis.storage import atomic_folder, write_text

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Pair = tuple[Tensor, Tensor]

# Keys of adapter_config.json that change what is computed; each must have one of these values, or be left out.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "use_dora": (False, None),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "alpha_pattern": (None, {}),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None,),
    "alora_invocation_tokens": (None,),
}


@dataclass(frozen=True)
class Adapter:
    """The pairs of one adapter: for each layer, by the name of the weight they belong to."""

    layers: tuple[Mapping[str, Pair], ...]

    @property
    def bytes(self) -> int:
        """Bytes of memory."""
        return sum(x.nbytes for layer in self.layers for pair in layer.values() for x in pair)


def read_adapter(folder: Path, config: ModelConfig, dtype: torch.dtype = torch.bfloat16) -> Adapter:
    """Read a PEFT folder for a model of this shape that is computed in `dtype`.

    Raises InputError for another kind of adapter, one of another model, or one that adapts more than the linear
    maps of the layers.
    """
    facts = layout.read_json(folder / CONFIG)
    for key, allowed in NEUTRAL.items():
        if key in facts and facts[key] not in allowed:
            raise InputError(
                f"{folder / CONFIG}: {key} = {facts[key]!r} is not supported.",
                hint="Supported: plain LoRA of the layers' linear maps, with or without rslora.",
            )
    alpha, rslora = facts.get("lora_alpha", 8), bool(facts.get("use_rslora"))
    if not isinstance(alpha, int | float) or isinstance(alpha, bool):
        raise InputError(f"{folder / CONFIG}: lora_alpha = {alpha!r}: a number was expected.")
    if not (folder / WEIGHTS).exists():
        layout.refuse_pickles(folder)
        raise InputError(f"{folder} holds no {WEIGHTS}.")
    tensors = read_tensors(folder / WEIGHTS)
    layers = tuple(
        {
            name: (pair[0].to(dtype), pair[1].to(dtype))
            for name, parts in modules_of(config).items()
            if (pair := _take(tensors, config, index, parts, alpha, rslora, folder)) is not None
        }
        for index in range(config.layers)
    )
    if tensors:
        names = ", ".join(sorted(tensors)[:3])
        raise InputError(
            f"{folder / WEIGHTS}: these tensors adapt nothing of this model: {names} ({len(tensors)} in all).",
            hint="The adapter was made for another model, or it adapts more than the layers' linear maps.",
        )
    return Adapter(layers)


def write_adapter(folder: Path, config: ModelConfig, adapter: Adapter, base: str) -> None:
    """Write a PEFT folder for the base model of that name; what does not adapt a layer is written as zeros.

    Raises ConflictError if the folder holds something.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ConflictError(f"{folder} is there already.", hint="Choose a folder that is new or empty.")
    found = [_split(layer, config) for layer in adapter.layers]
    modules = sorted({module for layer in found for module in layer})
    rank = max((a_RK.shape[0] for layer in found for a_RK, _ in layer.values()), default=1)
    sizes = {module: size for parts in modules_of(config).values() for module, size in parts.items()}
    tensors = {}
    for index, layer in enumerate(found):
        for module in modules:
            rows, columns = sizes[module]
            a_RK, b_NR = layer.get(module, (torch.zeros(0, columns), torch.zeros(rows, 0)))
            name, missing = _tensor_name(config, index, module), rank - a_RK.shape[0]
            tensors[f"{name}.lora_A.weight"] = F.pad(a_RK.float(), (0, 0, 0, missing)).contiguous()
            tensors[f"{name}.lora_B.weight"] = F.pad(b_NR.float(), (0, missing)).contiguous()
    facts = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank,  # the scale is 1
        "target_modules": sorted({module.rsplit(".", 1)[-1] for module in modules}),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": config.family == "gpt2",
        "inference_mode": True,
    }
    with atomic_folder(folder) as place:
        write_text(place / CONFIG, json.dumps(facts, indent=2) + "\n")
        save_file(tensors, place / WEIGHTS, metadata={"format": "pt"})


def for_batch(adapters: Sequence[Adapter], layers: int) -> list[dict[str, list[AdapterPair]]]:
    """What `Batch.adapters` holds, so that number n of `adapter_T` means the nth of these."""
    names = sorted({name for adapter in adapters for layer in adapter.layers for name in layer})
    return [
        {name: [adapter.layers[index].get(name) for adapter in adapters] for name in names}
        for index in range(layers)
    ]


def modules_of(config: ModelConfig) -> dict[str, dict[str, tuple[int, int]]]:
    """Our weight -> the modules of transformers that it joins, each with its outputs and inputs, in their order."""
    query, key, width = config.heads * config.head_size, config.kv_heads * config.head_size, config.width
    if config.family == "gpt2":
        return {
            "qkv": {"attn.c_attn": (3 * width, width)},
            "out": {"attn.c_proj": (width, width)},
            "up": {"mlp.c_fc": (config.ffn, width)},
            "down": {"mlp.c_proj": (width, config.ffn)},
        }
    parts = {
        "qkv": {
            "self_attn.q_proj": (query, width),
            "self_attn.k_proj": (key, width),
            "self_attn.v_proj": (key, width),
        },
        "out": {"self_attn.o_proj": (width, query)},
    }
    if config.family == "llama":
        parts["gate_up"] = {"mlp.gate_proj": (config.ffn, width), "mlp.up_proj": (config.ffn, width)}
        parts["down"] = {"mlp.down_proj": (width, config.ffn)}
    return parts


def _tensor_name(config: ModelConfig, index: int, module: str) -> str:
    stem = "transformer.h" if config.family == "gpt2" else "model.layers"
    return f"base_model.model.{stem}.{index}.{module}"


def _take(
    tensors: dict[str, Tensor],
    config: ModelConfig,
    index: int,
    parts: Mapping[str, tuple[int, int]],
    alpha: float,
    rslora: bool,
    folder: Path,
) -> Pair | None:
    """Takes the tensors of a weight's modules and joins them; None if there are none."""
    above, pieces, columns = [], [], 0
    for module, (rows, inputs) in parts.items():
        name = _tensor_name(config, index, module)
        a_RK, b_NR = (tensors.pop(f"{name}.lora_{letter}.weight", None) for letter in "AB")
        rank = 0
        if a_RK is not None or b_NR is not None:
            if a_RK is None or b_NR is None:
                raise InputError(f"{folder / WEIGHTS}: {name} has only one of lora_A and lora_B.")
            rank = a_RK.shape[0]
            if rank < 1 or a_RK.shape != (rank, inputs) or b_NR.shape != (rows, rank):
                raise InputError(
                    f"{folder / WEIGHTS}: {name} has shapes {tuple(a_RK.shape)} and {tuple(b_NR.shape)}: not of "
                    f"a map from {inputs} to {rows}.",
                    hint="The adapter was made for another model.",
                )
            above.append(a_RK.float())
            b_NR = b_NR.float() * (alpha / (math.sqrt(rank) if rslora else rank))
        pieces.append((rows, columns, rank, b_NR))
        columns += rank
    if not above:
        return None
    odd = columns % 2
    joined_NR = torch.zeros(sum(rows for rows, *_ in pieces), columns + odd)
    start = 0
    for rows, column, rank, b_NR in pieces:
        if b_NR is not None:
            joined_NR[start : start + rows, column : column + rank] = b_NR
        start += rows
    a_RK = F.pad(torch.cat(above), (0, 0, 0, odd))
    return a_RK.contiguous(), joined_NR.contiguous()


def _split(layer: Mapping[str, Pair], config: ModelConfig) -> dict[str, Pair]:
    """The pairs of transformers' modules: each keeps the ranks that its own rows of B use."""
    result = {}
    for name, (a_RK, b_NR) in layer.items():
        parts = modules_of(config)[name]
        rows_of_parts = torch.split(b_NR, [rows for rows, _ in parts.values()])
        for module, rows_NR in zip(parts, rows_of_parts, strict=True):
            used = rows_NR.any(0)
            if bool(used.any()):
                result[module] = (a_RK[used], rows_NR[:, used])
    return result
