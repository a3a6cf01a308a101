"""The files of a Hugging Face folder: their names, and what can be read of them without torch."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lapis.errors import InputError
from lapis.model import config_hf
from lapis.model.config import ModelConfig

CONFIG, TOKENIZER, TOKENIZER_CONFIG, GENERATION = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
)
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TEMPLATE, CARD = "chat_template.jinja", "README.md"
LOADED = (CONFIG, TOKENIZER, TOKENIZER_CONFIG, TEMPLATE, WEIGHTS)  # what loading a model reads
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_LICENCE = re.compile(r"^licen[sc]e:\s*(?:\"([^\"\n]+)\"|'([^'\n]+)'|['\"]?([\w.+-]+))", re.MULTILINE)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises InputError."""
    try:
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} is not a JSON object.")
    return values


def read_config(folder: Path) -> ModelConfig:
    """The ModelConfig of config.json. Raises InputError without one, ConfigError for a foreign model."""
    return config_hf.from_hf(read_json(folder / CONFIG))


def read_tokenizer_config(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json, or nothing where there is none. Raises InputError if it cannot be read."""
    path = folder / TOKENIZER_CONFIG
    return read_json(path) if path.exists() else {}


def read_template(folder: Path, values: Mapping[str, Any]) -> str | None:
    """The text of chat_template.jinja, or of the template in `values` (tokenizer_config.json), or None."""
    if (folder / TEMPLATE).exists():
        return (folder / TEMPLATE).read_text(encoding="utf-8")
    template = values.get("chat_template")
    if isinstance(template, list):  # several named ones: [{"name": …, "template": …}]
        template = {item.get("name"): item.get("template") for item in template}.get("default")
    return template if isinstance(template, str) else None


def read_licence(folder: Path) -> str:
    """The licence that the model card (README.md) states in its front matter, or "unknown"."""
    card = folder / CARD
    if not card.exists():
        return "unknown"
    found = _LICENCE.search(card.read_text(encoding="utf-8", errors="replace")[:20_000])
    return found[1] or found[2] or found[3] if found else "unknown"


def model_card(licence: str) -> str:
    """A model card that says no more than the licence; `read_licence` reads it back."""
    return '---\nlicense: "{}"\n---\n'.format(licence.replace('"', "'").replace("\n", " "))


def weight_files(folder: Path) -> list[str]:
    """Names of the safetensors files: one, or the shards of an index. Raises InputError without any."""
    if (folder / INDEX).exists():
        return shard_names(folder / INDEX)
    if (folder / WEIGHTS).exists():
        return [WEIGHTS]
    refuse_pickles(folder)
    raise InputError(f"{folder} holds no weights: neither {WEIGHTS} nor {INDEX}.")


def shard_names(index: Path) -> list[str]:
    """The files that an index names. Raises InputError for a name that is no plain safetensors file."""
    entries = read_json(index).get("weight_map")
    names = sorted({str(name) for name in entries.values()}) if isinstance(entries, dict) else []
    if not names:
        raise InputError(f"{index} names no weight files.")
    for name in names:
        if not re.fullmatch(r"[\w.-]+\.safetensors", name):
            raise InputError(f"{index}: {name!r} is not the name of a safetensors file.")
    return names


def refuse_pickles(folder: Path) -> None:
    """Raise InputError if the folder holds weights only as pickle, which can run code when it is read."""
    found = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if found and not any(folder.glob("*.safetensors")):
        raise InputError(
            f"{folder} holds its weights as pickle, which can run code when read: refused ({found[0]}).",
            hint="Take a copy of the model in safetensors or GGUF.",
        )


def token_text(value: object) -> str:
    """The text of a token in tokenizer_config.json: a string, or an object with `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else ""
