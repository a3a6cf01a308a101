"""Folders that `datasets` wrote with save_to_disk: which of their files hold rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from lapis.errors import InputError

STATE, INFO, SPLITS = "state.json", "dataset_info.json", "dataset_dict.json"
TRAIN = "train"


@dataclass
class SavedDatasets:
    """What a listing's files are to the saved datasets among them."""

    rows: set[str] = field(default_factory=set)
    """Arrow files with the rows of a dataset."""
    metadata: set[str] = field(default_factory=set)
    """Files about a dataset."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Files that are not read, and why: another split than train, or what a cache left there."""


def saved_datasets(names: Iterable[str], read: Callable[[str], bytes]) -> SavedDatasets:
    """Find saved datasets among the files of a source. Raises InputError if one of their files is missing."""
    names = set(names)
    found = SavedDatasets()
    folders = [_folder(name) for name in names if _base(name) == STATE and _in(_folder(name), INFO) in names]
    for folder in sorted(folders):
        rows = {_in(folder, entry["filename"]) for entry in _facts(folder, STATE, read)["_data_files"]}
        if missing := sorted(rows - names):
            raise InputError(
                f"The dataset in {folder or 'the folder'} lacks {missing[0]}: its copy is not complete."
            )
        found.rows |= rows
        about = {_in(folder, STATE), _in(folder, INFO)}
        found.metadata |= about
        others = {name for name in names if _folder(name) == folder} - rows - about
        found.left_out |= dict.fromkeys(others, "not among the dataset's files")
    for name in sorted(name for name in names if _base(name) == SPLITS):
        found.metadata.add(name)
        _choose_split(_folder(name), _facts(_folder(name), SPLITS, read)["splits"], names, found)
    return found


def _choose_split(folder: str, splits: list[str], names: set[str], found: SavedDatasets) -> None:
    if len(splits) > 1 and TRAIN not in splits:
        raise InputError(
            f"The dataset in {folder or 'the folder'} has the splits {', '.join(splits)} and none called {TRAIN}.",
            hint=f'Name the one to read: path = "…/{splits[0]}"',
        )
    for split in splits:
        if len(splits) > 1 and split != TRAIN:
            below = {name for name in names if name.startswith(_in(folder, split) + "/")}
            found.left_out |= dict.fromkeys(below & found.rows, f"split {split}, not {TRAIN}")
            found.rows -= below


def _facts(folder: str, base: str, read: Callable[[str], bytes]) -> dict[str, Any]:
    try:
        facts: dict[str, Any] = json.loads(read(_in(folder, base)))
        assert isinstance(facts, dict)
    except ValueError as error:
        raise InputError(f"{_in(folder, base)} is no readable JSON: {error}.") from error
    return facts


def _folder(name: str) -> str:
    return name.rpartition("/")[0]


def _base(name: str) -> str:
    return name.rpartition("/")[2]


def _in(folder: str, base: str) -> str:
    return f"{folder}/{base}" if folder else base
