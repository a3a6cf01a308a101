"""A GGUF file out: a model folder for llama.cpp and its kin, one tensor at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from math import prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader, GGUFWriter, LlamaFileType
from torch import Tensor

from lapis.errors import ConfigError, ConflictError, InputError
from lapis.log import Progress, silent
from lapis.model import gguf_tokenizer, layout
from lapis.model import manifest as manifests
from lapis.model.config import ModelConfig
from lapis.model.gguf_config import (
    FREQUENCIES,
    Metadata,
    architecture,
    frequency_table,
    read_config,
    require_same,
    to_metadata,
)
from lapis.model.gguf_names import gguf_name
from lapis.model.manifest import Manifest
from lapis.model.weights import read_chat_template, read_tensors, read_tokenizer
from lapis.storage import atomic_file

# how matrices can be stored, and what the file says of it; vectors are always float32
KINDS = {
    "f32": (Kind.F32, LlamaFileType.ALL_F32),
    "f16": (Kind.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (Kind.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (Kind.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
ALWAYS_F32 = ("ffn_gate_inp.weight", "position_embd.weight")  # as llama.cpp's own converter has it


def export_gguf(folder: Path, target: Path, kind: str, progress: Progress = silent) -> Manifest:
    """Write a model folder, verified, as a GGUF file with its tokenizer and chat template; whole or not at all.

    Raises IntegrityError for a damaged folder, ConflictError if `target` is there, and ConfigError or InputError for
    what a GGUF file cannot hold.
    """
    manifest = manifests.verify(folder)
    if target.exists():
        raise ConflictError(f"{target} is there already.", hint="Choose another name, or remove it first.")
    if manifest.base is not None:
        raise InputError(
            f"{folder} is an adapter of {manifest.base!r}; a GGUF file holds a whole model.",
            hint="A run's adapter is merged on export: lapis models export RUN FILE.gguf --gguf bf16",
        )
    config = layout.read_config(folder)
    with atomic_file(target) as file:
        with closing(GGUFWriter(file.name, architecture(config))) as writer:
            for key, value in _metadata(folder, manifest, config, kind).items():
                _add(writer, key, value)
            _write_weights(writer, config, read_tensors(folder / layout.WEIGHTS), kind, progress)
        reader = GGUFReader(file.name)
        found = read_config(Metadata(target, reader), {tensor.name: tensor for tensor in reader.tensors})
        require_same(config, found)
    return manifest


def _write_weights(
    writer: GGUFWriter, config: ModelConfig, tensors: dict[str, Tensor], kind: str, progress: Progress
) -> None:
    """Announce all tensors, then write one after the other: only one is there twice."""
    parts = _parts(config, tensors)
    if (table := frequency_table(config)) is not None:
        tensors[FREQUENCIES], parts[FREQUENCIES] = torch.from_numpy(table), [FREQUENCIES]
    kinds = {name: _kind(name, tensors[names[0]], kind) for name, names in parts.items()}
    for name, names in parts.items():
        shape = tuple(_joined(config, name, [tensors[part].to("meta") for part in names]).shape)
        writer.add_tensor_info(
            name, shape, np.dtype(np.float32), _bytes(name, shape, kinds[name]), kinds[name]
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for done, (name, names) in enumerate(parts.items()):
        progress(done, len(parts), f"writing {name}")
        weight = _joined(config, name, [tensors.pop(part) for part in names])
        writer.write_tensor_data(_stored(name, weight, kinds[name]))


def _metadata(folder: Path, manifest: Manifest, config: ModelConfig, kind: str) -> dict[str, Any]:
    values = layout.read_tokenizer_config(folder)
    template = read_chat_template(folder, values)
    return {
        "general.name": manifest.source.reference,
        "general.license": manifest.source.licence,
        "general.file_type": int(KINDS[kind][1]),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        **to_metadata(config),
        **gguf_tokenizer.to_metadata(
            read_tokenizer(folder, values),
            config.vocab_size,
            chat_template=template.template if template else None,
            add_bos=manifest.add_bos,
            bos_id=manifest.bos_id,
            stop_ids=manifest.stop_ids,
        ),
    }


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    adding: dict[type, Callable[[str, Any], None]] = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    adding[type(value)](key, value)


def _parts(config: ModelConfig, tensors: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Name of every tensor of the file -> the folder's tensors that it holds: one, or one of each expert."""

    def in_order(name: str) -> list[tuple[str, int]]:
        return [(text, int(number or 0)) for text, number in re.findall(r"(\D*)(\d*)", name)]

    parts: dict[str, list[str]] = {}
    for name in sorted(tensors, key=in_order):
        parts.setdefault(gguf_name(name, config.family), []).append(name)
    return parts


def _kind(name: str, weight: Tensor, kind: str) -> Kind:
    return Kind.F32 if weight.ndim == 1 or name.endswith(ALWAYS_F32) else KINDS[kind][0]


def _bytes(name: str, shape: tuple[int, ...], kind: Kind) -> int:
    values, size = gguf.GGML_QUANT_SIZES[kind]
    if shape[-1] % values:
        raise ConfigError(
            f"The rows of {name} hold {shape[-1]} weights, no multiple of {values}: {kind.name} cannot store them.",
            hint="Choose bf16.",
        )
    return prod(shape) // values * size


def _joined(config: ModelConfig, name: str, parts: Sequence[Tensor]) -> Tensor:
    """The tensor that the file holds: experts stacked, rotated pairs side by side, GPT-2's matrices turned."""
    weight = torch.stack(list(parts)) if name.endswith("_exps.weight") else parts[0]
    if architecture(config) == "llama" and name.rpartition(".")[0].endswith(("attn_q", "attn_k")):
        weight = _to_pairs(weight, config.head_size)
    transposed = config.family == "gpt2" and weight.ndim == 2 and name.startswith("blk.")
    return weight.T if transposed else weight


def _to_pairs(weight: Tensor, head_size: int) -> Tensor:
    """Query or key rows from halves of a head to llama.cpp's order: the pairs that rotate side by side."""
    heads = weight.shape[0] // head_size
    return weight.view(heads, 2, head_size // 2, -1).transpose(1, 2).reshape(weight.shape)


def _stored(name: str, weight: Tensor, kind: Kind) -> Any:
    values = weight.float().contiguous().numpy()
    with np.errstate(over="ignore"):
        data = gguf.quants.quantize(values, kind)
    if kind is Kind.F16 and not np.isfinite(data).all():
        raise InputError(
            f"{name} holds numbers as large as {np.abs(values).max():.3g}, which F16 cannot store.",
            hint="Choose bf16.",
        )
    return data
