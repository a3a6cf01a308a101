"""A Hugging Face folder in: config.json, safetensors in one file or in shards, tokenizer.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from lapis.errors import InputError
from lapis.log import Progress, silent
from lapis.model.hf_state import from_hf_state
from lapis.model.layout import (
    CONFIG,
    GENERATION,
    TOKENIZER,
    read_config,
    read_json,
    read_licence,
    read_tokenizer_config,
    refuse_pickles,
    token_text,
    weight_files,
)
from lapis.model.weights import ImportedModel, read_chat_template, read_tensors, read_tokenizer
from lapis.tokenizer.bpe import Tokenizer


def read_folder(folder: Path, progress: Progress = silent) -> ImportedModel:
    """Convert a Hugging Face folder. Raises InputError or ConfigError for what is missing or foreign."""
    if not (folder / CONFIG).exists():
        refuse_pickles(folder)
        raise InputError(f"{folder} is not a Hugging Face folder: it has no {CONFIG}.")
    config = read_config(folder)
    names = weight_files(folder)
    if not (folder / TOKENIZER).exists():
        raise InputError(
            f"{folder} has no {TOKENIZER}.",
            hint="Older models keep only tokenizer.model: save them once with transformers' AutoTokenizer.",
        )
    values = read_tokenizer_config(folder)
    tokenizer = read_tokenizer(folder, values)
    bos = _bos_id(folder, values, tokenizer)
    template = read_chat_template(folder, values)
    return ImportedModel(
        config=config,
        state=from_hf_state(config, _read_weights(folder, names, progress), where=str(folder)),
        tokenizer=tokenizer,
        chat_template=template.template if template else None,
        add_bos=bos is not None and _adds_bos(folder, values),
        bos_id=bos,
        stop_ids=_stop_ids(folder, values, tokenizer),
        licence=read_licence(folder),
    )


def _read_weights(folder: Path, names: list[str], progress: Progress) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for done, name in enumerate(names):
        progress(done, len(names), f"reading {name}")
        for key, tensor in read_tensors(folder / name).items():
            if key in tensors:
                raise InputError(f"{folder / name}: the tensor {key} stands in another file too.")
            tensors[key] = tensor
    return tensors


def _bos_id(folder: Path, values: dict[str, Any], tokenizer: Tokenizer) -> int | None:
    named = tokenizer.token_id(token_text(values.get("bos_token")))
    return _token_number(read_json(folder / CONFIG).get("bos_token_id")) if named is None else named


def _adds_bos(folder: Path, values: dict[str, Any]) -> bool:
    """Whether a text starts with bos: what tokenizer_config.json says, else what tokenizer.json does."""
    if isinstance(values.get("add_bos_token"), bool):
        return bool(values["add_bos_token"])
    step = read_json(folder / TOKENIZER).get("post_processor")
    return _starts_with(step, token_text(values.get("bos_token")))


def _starts_with(step: Any, token: str) -> bool:
    """Whether a post-processor of tokenizer.json puts this token before a text."""
    if not isinstance(step, dict):
        return False
    if step.get("type") == "Sequence":
        return any(_starts_with(inner, token) for inner in step.get("processors", ()))
    first = (step.get("single") or [{}])[0]
    return bool(token) and first.get("SpecialToken", {}).get("id") == token


def _stop_ids(folder: Path, values: dict[str, Any], tokenizer: Tokenizer) -> tuple[int, ...]:
    """The end tokens that the folder's files name, end-of-sequence first, then the tokenizer's own."""
    found = [tokenizer.token_id(token_text(values.get("eos_token")))]
    for name in (GENERATION, CONFIG):
        ends = read_json(folder / name).get("eos_token_id") if (folder / name).exists() else None
        found += [_token_number(end) for end in (ends if isinstance(ends, list) else [ends])]
    known = [id for id in [*found, *sorted(tokenizer.stop_ids)] if id is not None]
    return tuple(dict.fromkeys(known))


def _token_number(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
