"""Low-rank adapters as folders of the store: a PEFT folder, sealed, with its base model's name. No torch here."""

from __future__ import annotations

import shutil
from pathlib import Path

from lapis.errors import InputError, NotFoundError
from lapis.model import layout
from lapis.model import manifest as manifests
from lapis.model.manifest import Manifest, Source
from lapis.model.store import ModelStore, StoredModel
from lapis.storage import atomic_folder, write_text

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a PEFT adapter and no whole model."""
    return (folder / CONFIG).exists() and not (folder / layout.CONFIG).exists()


def base_of(folder: Path, store: ModelStore) -> StoredModel:
    """The stored model that an adapter says it was made for. Raises InputError, NotFoundError."""
    said = layout.read_json(folder / CONFIG).get("base_model_name_or_path")
    if not isinstance(said, str) or not said.strip("/ "):
        raise InputError(f"{folder / CONFIG} does not name its base model (base_model_name_or_path).")
    for model in store.list():
        made_from = model.source.reference.removeprefix("hf:").partition("@")[0]
        if model.base is None and said in (model.name, made_from):
            return model
    name = said.rstrip("/").rpartition("/")[2].lower()
    try:
        found = store.get(name)
    except NotFoundError as error:
        raise NotFoundError(
            f"{folder} is an adapter of {said}, which is not here.",
            hint=f"Fetch it first: lapis pull hf:{said} --name {name}",
        ) from error
    if found.base is not None:
        raise InputError(f"{folder} is an adapter of {name!r}, which is an adapter itself.")
    return found


def write_adapter_folder(folder: Path, target: Path, base: StoredModel, source: Source) -> Manifest:
    """Copy a PEFT folder to `target` and seal it as an adapter of `base`. Raises InputError without weights."""
    if not (folder / WEIGHTS).is_file():
        layout.refuse_pickles(folder)
        raise InputError(f"{folder} holds no {WEIGHTS}.")
    with atomic_folder(target) as place:
        for name in (CONFIG, WEIGHTS, layout.CARD):
            if (folder / name).is_file():
                shutil.copyfile(folder / name, place / name)
        files = manifests.describe_files(place)
        made = Manifest(
            digest=manifests.digest_of_files(files),
            source=source,
            files=files,
            parameters=_parameters(folder / WEIGHTS),
            add_bos=base.manifest.add_bos,
            bos_id=base.manifest.bos_id,
            stop_ids=base.manifest.stop_ids,
            base=base.name,
        )
        write_text(place / manifests.NAME, made.to_json())
    return made


def _parameters(weights: Path) -> int:
    """The number of weights in a safetensors file, read from its header."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(weights, framework="numpy") as file:
            shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise InputError(f"{weights} is not a readable safetensors file: {error}.") from error
    total = 0
    for shape in shapes:
        count = 1
        for size in shape:
            count *= size
        total += count
    return total
