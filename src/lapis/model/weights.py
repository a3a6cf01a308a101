"""A model folder out and in: Hugging Face's layout in safetensors of bf16 or fp32, sealed by lapis.json."""

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
from lapis.kernels.quantized import Kind
from lapis.log import Progress, silent
from lapis.model import layout
from lapis.model import manifest as manifests
from lapis.model.config import ModelConfig
from lapis.model.config_hf import to_hf
from lapis.model.families import Decoder, build
from lapis.model.hf_state import from_hf_state, to_hf_state
from lapis.model.manifest import Manifest, Source
from lapis.storage import atomic_folder, write_text
from lapis.tokenizer.bpe import Tokenizer
from lapis.tokenizer.chat import ChatTemplate

# how weights can be stored
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


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

    model: Decoder
    config: ModelConfig
    tokenizer: Tokenizer
    chat: ChatTemplate | None
    manifest: Manifest
    as_stored: bool = True  # computed in the type of the file: as it was trained

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
    dtype: torch.dtype = torch.bfloat16,
) -> Manifest:
    """Write a model folder, whole or not at all; an empty folder may be there already.

    `dtype`, bf16 or fp32, is how the weights are stored: by default a model is computed in it when it is read.

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
        tensors = to_hf_state(config, state, dtype)
        tokenizer.save(place / layout.TOKENIZER)
        ends = {"bos_token_id": bos, "eos_token_id": stops[0] if len(stops) == 1 else list(stops)}
        stored = {"torch_dtype": str(dtype).removeprefix("torch.")}
        _write_json(place / layout.CONFIG, {**to_hf(config), **stored, **ends})
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


def read_model(
    folder: Path,
    ops: Ops | None = None,
    progress: Progress = silent,
    manifest: Manifest | None = None,
    quantize: Kind | None = None,
    dtype: torch.dtype | None = None,
) -> LoadedModel:
    """Load a model folder after every file matched its digest; `manifest` says that this was seen just now.

    The model is computed in `dtype`, bf16 or fp32; by default in that of its file. `quantize` keeps the linear
    maps in fewer bits, the rest in bf16.

    Raises IntegrityError naming the file that does not, InputError for a folder that is no model folder or
    holds only pickle.
    """
    manifest = manifests.verify(folder, progress) if manifest is None else manifest
    config = layout.read_config(folder)
    tensors = read_tensors(folder / layout.WEIGHTS)
    stored = DTYPES["fp32" if all(tensor.dtype is torch.float32 for tensor in tensors.values()) else "bf16"]
    if dtype is None:
        dtype = stored if quantize is None else DTYPES["bf16"]
    model = build(config, ops, dtype)
    state = from_hf_state(config, tensors, str(folder / layout.WEIGHTS), dtype)
    model.load_state_dict(state, assign=True)  # no copy of what need not be joined
    model.to(model.ops.device)
    if quantize is not None:
        model.quantize(quantize)
    values = layout.read_tokenizer_config(folder)
    tokenizer, chat = read_tokenizer(folder, values), read_chat_template(folder, values)
    return LoadedModel(model, config, tokenizer, chat, manifest, dtype is stored)


def read_chat_template(folder: Path, values: Mapping[str, Any]) -> ChatTemplate | None:
    """The chat template: chat_template.jinja, or that in `values` (tokenizer_config.json), or None."""
    template = layout.read_template(folder, values)
    if template is None:
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
