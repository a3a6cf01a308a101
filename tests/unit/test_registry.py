"""The registry: weights are copied, verified, governed, and never served when they changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from lapis.audit import AuditLog
from lapis.db import open_database
from lapis.errors import ConflictError, InputError, IntegrityError, NotFoundError
from lapis.home import Home
from lapis.model import manifest as manifests
from lapis.model.manifest import Manifest, Source
from lapis.release.registry import Registry
from lapis.release.release import State

REPORT = {"bits_per_byte": 1.5, "yardsticks": {"5-gram": 2.0}}
ORIGIN = {"dataset": "d" * 64, "licences": {"MIT": 3}}


def write_model_folder(folder: Path, weights: bytes, licence: str = "Apache-2.0") -> Path:
    """A model folder by its manifest; the registry never looks into the weights."""
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "tokenizer.json").write_text("{}")
    files = manifests.describe_files(folder)
    source = Source("run", "laptop-1", licence)
    digest = manifests.digest_of_files(files)
    manifest = Manifest(digest, source, files, parameters=1, add_bos=True, bos_id=0, stop_ids=(0,))
    (folder / manifests.NAME).write_text(manifest.to_json())
    return folder


@pytest.fixture
def registry(home: Home) -> Iterator[Registry]:
    db = open_database(home.database_url)
    yield Registry(home, db)
    db.dispose()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model_folder(tmp_path / "model", b"weights" * 100)


def test_a_release_goes_its_way_and_is_served(registry: Registry, model: Path, home: Home) -> None:
    made = registry.create("my", model, "laptop-1", REPORT, "os:ana", ORIGIN)
    assert (made.id, made.state, made.lineage.run) == ("my:1", State.EVALUATED, "laptop-1")
    shutil.rmtree(model)  # the release has its own copy
    assert registry.approve("my", "os:bo").approved_by == "os:bo"
    servable = registry.resolve("my")
    assert (servable.kind, servable.licence, servable.digest) == ("release", "Apache-2.0", made.digest)
    assert servable.folder == home.root / "releases" / "my" / "1"
    assert registry.go_live("my:1", "os:bo").state is State.LIVE
    assert registry.go_live("my:1", "os:bo").state is State.LIVE
    assert registry.resolve("my:1").name == "my:1"
    assert registry.retire("my", "os:bo", "old").state is State.RETIRED
    with pytest.raises(ConflictError, match="retired"):
        registry.resolve("my")
    actions = [entry.action for entry in AuditLog(registry.db).entries()]
    assert actions == ["release.create", "release.approve", "release.go_live", "release.retire"]


def test_the_newest_approved_version_has_the_name(registry: Registry, tmp_path: Path) -> None:
    for version in (1, 2, 3):
        folder = write_model_folder(tmp_path / str(version), b"weights" * version)
        registry.create("my", folder, None, REPORT, "os:ana")
    registry.approve("my:1", "os:ana")
    registry.approve("my:2", "os:ana")
    assert registry.resolve("my").digest == registry.show("my:2").digest
    assert registry.show("my").version == 3
    assert sorted(item.name for item in registry.servables()) == ["my", "my:1", "my:2"]
    with pytest.raises(ConflictError, match="my:3 is evaluated") as caught:
        registry.resolve("my:3")
    assert caught.value.hint == "lapis release approve my:3"


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "lapis.json"])
def test_a_flipped_byte_is_never_served(registry: Registry, model: Path, name: str) -> None:
    release = registry.create("my", model, None, REPORT, "os:ana")
    registry.approve("my", "os:ana")
    path = release.folder / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match=name.replace(".", r"\.")):
        registry.resolve("my")


def test_weights_exchanged_with_a_manifest_that_fits_them_are_noticed(
    registry: Registry, model: Path, tmp_path: Path
) -> None:
    release = registry.create("my", model, None, REPORT, "os:ana")
    registry.approve("my", "os:ana")
    shutil.rmtree(release.folder)
    shutil.copytree(write_model_folder(tmp_path / "other", b"other weights"), release.folder)
    with pytest.raises(IntegrityError, match="registered"):
        registry.resolve("my")
    shutil.rmtree(release.folder)
    with pytest.raises(IntegrityError, match="cannot be read"):
        registry.resolve("my")


def test_damaged_weights_do_not_come_in(registry: Registry, model: Path, home: Home) -> None:
    (model / "model.safetensors").write_bytes(b"Weights" * 100)
    with pytest.raises(IntegrityError, match=r"model\.safetensors"):
        registry.create("my", model, None, REPORT, "os:ana")
    assert registry.list() == []
    assert [path.name for path in (home.root / "releases" / "my").iterdir()] == [".lock"]


def test_gates_refuse_and_an_override_is_recorded(registry: Registry, model: Path) -> None:
    registry.create("my", model, None, None, "os:ana")
    with pytest.raises(ConflictError, match=r"\[evaluation\]"):
        registry.approve("my", "os:ana")
    with pytest.raises(InputError, match="reason"):
        registry.approve("my", "os:ana", force=True)
    assert (
        registry.approve("my", "os:ana", force=True, reason="measured elsewhere").reason
        == "measured elsewhere"
    )
    facts = AuditLog(registry.db).entries()[-1].facts
    assert facts["force"] is True
    assert facts["reason"] == "measured elsewhere"
    assert facts["gates"]["evaluation"] == "refuse"


def test_damaged_weights_are_not_approved_by_force(registry: Registry, model: Path) -> None:
    release = registry.create("my", model, None, REPORT, "os:ana")
    (release.folder / "model.safetensors").unlink()
    with pytest.raises(ConflictError, match=r"\[digest\]"):
        registry.approve("my", "os:ana", force=True, reason="please")


def test_a_draft_is_evaluated_once(registry: Registry, model: Path) -> None:
    registry.create("my", model, None, None, "os:ana")
    assert registry.record_evaluation("my", REPORT, "os:ana").report == REPORT
    with pytest.raises(ConflictError, match="cannot become evaluated"):
        registry.record_evaluation("my", REPORT, "os:ana")


def test_a_killed_create_leaves_nothing_that_counts(registry: Registry, model: Path, home: Home) -> None:
    folder = home.root / "releases" / "my"
    (folder / ".1.0123.part").mkdir(parents=True)
    (folder / "1").mkdir()  # whole, and killed before its record was written
    assert registry.create("my", model, None, REPORT, "os:ana").id == "my:2"
    assert not (folder / ".1.0123.part").exists()


def test_pulled_models_are_served_beside_releases(registry: Registry, model: Path, home: Home) -> None:
    shutil.copytree(model, home.models / "pulled")
    assert registry.resolve("pulled").kind == "pulled"
    registry.create("pulled", model, None, REPORT, "os:ana")
    assert registry.resolve("pulled").kind == "pulled"  # a release that is not approved takes nothing away
    registry.approve("pulled", "os:ana")
    assert registry.resolve("pulled").kind == "release"
    assert [item.kind for item in registry.servables()] == ["release", "release"]


def test_an_unknown_name_is_answered_with_the_nearest(registry: Registry, model: Path) -> None:
    registry.create("laptop", model, None, REPORT, "os:ana")
    registry.approve("laptop", "os:ana")
    with pytest.raises(NotFoundError, match="Did you mean 'laptop'") as caught:
        registry.resolve("laptpo")
    assert "lapis pull laptpo" in caught.value.hint
    with pytest.raises(NotFoundError, match="Did you mean 'laptop:1'"):
        registry.show("laptop:2")


def test_the_record_is_read_back_as_it_was_made(registry: Registry, model: Path) -> None:
    made = registry.create("my", model, "run-1", REPORT, "os:ana", ORIGIN)
    assert registry.show("my:1") == made == registry.list("my")[0]
    assert json.loads(json.dumps(made.report)) == REPORT
    assert made.lineage.licences == {"MIT": 3}
