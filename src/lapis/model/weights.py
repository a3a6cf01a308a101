"""A model folder out and in: Hugging Face's layout in bfloat16 safetensors, sealed by lapis.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lapis.errors import ConflictError, InputError, StorageError
from lapis.kernels.ops import Ops
from lapis.log import Progress, silent
from lapis.model import layout
from lapis.model import manifest as manifests
from lapis.model.config import ModelConfig
from lapis.model.families import Llama
from lapis.model.manifest import Manifest, Source
from lapis.storage import atomic_folder, write_text
from lapis.tokenizer.bpe import Tokenizer
from lapis.tokenizer.chat import ChatTemplate

EMBED, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


@dataclass(frozen=True)
class ImportedModel:
    """A foreign model, converted: weights (bfloat16) under our names, tokenizer, and how to prompt it."""

    config: ModelConfig
    state: Mapping[str, Tensor]
    tokenizer: Tokenizer
    chat_template: str | None = None
    add_bos: bool = False
    bos_id: int | None = None
    stop_ids: tuple[int, ...] = ()  # the first is the end-of-sequence token; none = the tokenizer's own
    licence: str = "unknown"


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run, and the manifest that its files were checked against."""

    model: Llama
    config: ModelConfig
    tokenizer: Tokenizer
    chat: ChatTemplate | None
    manifest: Manifest

    @property
    def add_bos(self) -> bool:
        """Whether a plain prompt starts with `bos_id`."""
        return self.manifest.add_bos

    @property
    def bos_id(self) -> int | None:
        """The token that starts a sequence."""
        return self.manifest.bos_id

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end an answer."""
        return frozenset(self.manifest.stop_ids)


def write_model(
    folder: Path,
    config: ModelConfig,
    state: Mapping[str, Tensor],
    tokenizer: Tokenizer,
    *,
    source: Source,
    chat_template: str | None = None,
    add_bos: bool = False,
    bos_id: int | None = None,
    stop_ids: tuple[int, ...] = (),
) -> Manifest:
    """Write a model folder, whole or not at all; an empty folder may be there already.

    With `add_bos`, `bos_id` is by default the tokenizer's end token, as in Lapis' token streams. The first of
    `stop_ids` is the end-of-sequence token; by default they are the tokenizer's own. Raises ConflictError if
    the folder holds something, InputError if weights, tokenizer and config do not fit.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConflictError(f"{folder} is there already.", hint="Choose another name, or remove it first.")
    if tokenizer.vocab_size > config.vocab_size:
        raise InputError(
            f"The tokenizer has {tokenizer.vocab_size} entries, the model rows for {config.vocab_size} only."
        )
    bos = tokenizer.end_id if bos_id is None and add_bos else bos_id
    stops = stop_ids or (tokenizer.end_id, *sorted(tokenizer.stop_ids - {tokenizer.end_id}))
    with atomic_folder(folder) as place:
        tensors = to_hf_state(config, state)
        tokenizer.save(place / layout.TOKENIZER)
        ends = {"bos_token_id": bos, "eos_token_id": stops[0] if len(stops) == 1 else list(stops)}
        _write_json(place / layout.CONFIG, {**config.to_hf(), **ends})
        _write_json(place / layout.GENERATION, ends)
        _write_json(
            place / layout.TOKENIZER_CONFIG,
            _tokenizer_config(config, tokenizer, chat_template, add_bos, bos, stops),
        )
        _save(tensors, place / layout.WEIGHTS)
        files = manifests.describe_files(place)
        made = Manifest(
            digest=manifests.digest_of_files(files),
            source=source,
            files=files,
            parameters=config.parameters,
            add_bos=add_bos,
            bos_id=bos,
            stop_ids=stops,
        )
        write_text(place / manifests.NAME, made.to_json())
    return made


def write_imported(folder: Path, model: ImportedModel, source: Source) -> Manifest:
    """Write a converted foreign model as a model folder. Raises as `write_model`."""
    licence = model.licence if source.licence == "unknown" else source.licence
    return write_model(
        folder,
        model.config,
        model.state,
        model.tokenizer,
        source=replace(source, licence=licence),
        chat_template=model.chat_template,
        add_bos=model.add_bos,
        bos_id=model.bos_id,
        stop_ids=model.stop_ids,
    )


def read_model(folder: Path, ops: Ops | None = None, progress: Progress = silent) -> LoadedModel:
    """Load a model folder after every file matched its digest.

    Raises IntegrityError naming the file that does not, InputError for a folder that is no model folder or
    holds only pickle.
    """
    manifest = manifests.verify(folder, progress)
    config = layout.read_config(folder)
    tensors = read_tensors(folder / layout.WEIGHTS)
    model = Llama(config, ops)
    model.load_state_dict(from_hf_state(config, tensors, where=str(folder / layout.WEIGHTS)))
    values = layout.read_tokenizer_config(folder)
    return LoadedModel(
        model, config, read_tokenizer(folder, values), read_chat_template(folder, values), manifest
    )


def read_chat_template(folder: Path, values: Mapping[str, Any]) -> ChatTemplate | None:
    """The chat template: chat_template.jinja, or that in `values` (tokenizer_config.json), or None."""
    template = values.get("chat_template")
    if isinstance(template, list):  # several named ones: [{"name": …, "template": …}]
        template = {item.get("name"): item.get("template") for item in template}.get("default")
    if (folder / layout.TEMPLATE).exists():
        template = (folder / layout.TEMPLATE).read_text(encoding="utf-8")
    if not isinstance(template, str):
        return None
    return ChatTemplate(
        template, layout.token_text(values.get("bos_token")), layout.token_text(values.get("eos_token"))
    )


def read_tokenizer(folder: Path, values: Mapping[str, object]) -> Tokenizer:
    """The folder's tokenizer.json; `values` (tokenizer_config.json) name the end token if it is unusual."""
    path = folder / layout.TOKENIZER
    try:
        return Tokenizer.load(path)
    except InputError:
        end = layout.token_text(values.get("eos_token"))
        if not end or not path.exists():
            raise
        return Tokenizer.load(path, end=end)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file. Raises InputError if it cannot be read."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} is not a readable safetensors file: {error}.") from error


def to_hf_state(config: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our weights under Hugging Face's names, in bfloat16; joined matrices are split. Raises InputError."""
    _check_names(config, state)
    result = {EMBED: state["embed"], NORM: state["norm"]}
    if not config.tied:
        result[HEAD] = state["head"]
    for index in range(config.layers):
        for name, parts in _layer_map(config).items():
            joined = state[f"layers.{index}.{name}"]
            split = torch.split(joined, [rows for _, rows in parts]) if len(parts) > 1 else (joined,)
            for (hf_name, _), tensor in zip(parts, split, strict=True):
                result[f"model.layers.{index}.{hf_name}.weight"] = tensor
    return {
        name: tensor.detach().to(torch.bfloat16).cpu().contiguous().clone() for name, tensor in result.items()
    }


def from_hf_state(config: ModelConfig, tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Hugging Face's tensors under our names, in bfloat16, query/key/value and gate/up joined.

    Raises InputError naming a tensor that is missing, of the wrong shape, or unknown.
    """
    rest = dict(tensors)

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
        return tensor.to(torch.bfloat16)

    shapes = _layer_inputs(config)
    state = {"embed": take(EMBED, config.vocab_size, config.width), "norm": take(NORM, config.width)}
    for index in range(config.layers):
        for name, parts in _layer_map(config).items():
            inputs = shapes[name]
            taken = [take(f"model.layers.{index}.{hf_name}.weight", rows, *inputs) for hf_name, rows in parts]
            state[f"layers.{index}.{name}"] = torch.cat(taken) if len(taken) > 1 else taken[0]
    if not config.tied:
        state["head"] = take(HEAD, config.vocab_size, config.width)
    elif HEAD in rest and not torch.equal(take(HEAD, config.vocab_size, config.width), state["embed"]):
        raise InputError(f"{where}: config.json says that {HEAD} is tied to the embedding, but they differ.")
    unknown = sorted(
        name for name in rest if not name.endswith("rotary_emb.inv_freq")
    )  # computed, not weights
    if unknown:
        raise InputError(f"{where}: unknown tensors: {', '.join(unknown[:3])} ({len(unknown)} in all).")
    return state


def _layer_map(config: ModelConfig) -> dict[str, list[tuple[str, int]]]:
    """Our name of a layer's weight -> the Hugging Face names it joins, with their rows."""
    query, key = config.heads * config.head_size, config.kv_heads * config.head_size
    return {
        "attn_norm": [("input_layernorm", config.width)],
        "qkv": [("self_attn.q_proj", query), ("self_attn.k_proj", key), ("self_attn.v_proj", key)],
        "out": [("self_attn.o_proj", config.width)],
        "ffn_norm": [("post_attention_layernorm", config.width)],
        "gate_up": [("mlp.gate_proj", config.ffn), ("mlp.up_proj", config.ffn)],
        "down": [("mlp.down_proj", config.width)],
    }


def _layer_inputs(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Our name of a layer's weight -> its trailing dims: none for a norm, else its inputs."""
    return {
        "attn_norm": (),
        "qkv": (config.width,),
        "out": (config.heads * config.head_size,),
        "ffn_norm": (),
        "gate_up": (config.width,),
        "down": (config.ffn,),
    }


def _check_names(config: ModelConfig, state: Mapping[str, Tensor]) -> None:
    wanted = {"embed", "norm"} | (set() if config.tied else {"head"})
    wanted |= {f"layers.{index}.{name}" for index in range(config.layers) for name in _layer_map(config)}
    if set(state) != wanted:
        odd = sorted(set(state) ^ wanted)
        raise InputError(
            f"The weights do not fit the configuration: missing or unknown: {', '.join(odd[:5])}."
        )


def _tokenizer_config(
    config: ModelConfig,
    tokenizer: Tokenizer,
    chat_template: str | None,
    add_bos: bool,
    bos: int | None,
    stops: tuple[int, ...],
) -> dict[str, object]:
    names = {id: text for text, id in tokenizer.special_tokens.items()}
    values: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.context,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": add_bos,
        "bos_token": names.get(bos) if bos is not None else None,
        "eos_token": names.get(stops[0]),
        "chat_template": chat_template,
    }
    return {key: value for key, value in values.items() if value is not None}


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    try:
        save_file(dict(tensors), path, metadata={"format": "pt"})
    except SafetensorError as error:  # the Rust writer reports a full disk so
        raise StorageError(f"{path} cannot be written: {error}.") from error
    path.chmod(path.with_name(layout.CONFIG).stat().st_mode)  # safetensors makes it the owner's alone


def _write_json(path: Path, value: Mapping[str, object]) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
