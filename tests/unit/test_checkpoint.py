"""A checkpoint proves itself: what is loaded is what was saved, or nothing is."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lapis.checkpoint.folder import listing, read, verify
from lapis.checkpoint.manifest import FORMAT, MANIFEST, folder_name, parse, render
from lapis.checkpoint.piece import Box, Part, Sharded
from lapis.checkpoint.retention import Retention
from lapis.checkpoint.sharded import Checkpoint, latest, load, save
from lapis.errors import ConflictError, InputError, IntegrityError, StorageError
from lapis.hashing import digest_json
from lapis.storage import lock

STATE = {"step": 7, "seed": 3, "losses": [3.25, 0.1], "data": {"epoch": 0, "name": "ü"}}

FORMAT_1 = {  # as the first version wrote it
    "manifest.json": (
        b'{\n "digest": "9bad946dba1947646b9e685be5a89ce94f8873619e6b7f1cb96b38aa02be3213",\n "files": {\n'
        b'  "model.safetensors": {\n   "bytes": 212,\n   "sha256": '
        b'"452907dd308331a50b7e74be214eb356b2e2c935b8f1ea7d863f5b0820a07dd6",\n   "tensors": {\n    "a": {\n'
        b'     "bytes": 12,\n     "sha256": '
        b'"a8c3c50be91f116761c95b3137575dd8e77e91794f6ff74fb18fe40875bb640c",\n     "start": 200\n    },\n'
        b'    "b": {\n     "bytes": 8,\n     "sha256": '
        b'"aae89fc0f03e2959ae4d701a80cc3915918c950b159f6abb6c92c1433b1a8534",\n     "start": 192\n    }\n'
        b'   }\n  },\n  "state.json": {\n   "bytes": 10,\n   "sha256": '
        b'"fbe47f6d82b435a89f6e6fca65ad16138195de06c5fc3ffb66826a76e64e479f",\n   "tensors": {}\n  }\n },\n'
        b' "format": 1,\n "step": 3\n}\n'
    ),
    "model.safetensors": (
        b'\xb8\x00\x00\x00\x00\x00\x00\x00{"__metadata__":{"format":"pt"},'
        b'"b":{"dtype":"I64","shape":[],"data_offsets":[0,8]},'
        b'"a":{"dtype":"BF16","shape":[2,3],"data_offsets":[8,20]}}' + b" " * 43 + b"\x07\x00\x00\x00"
        b"\x00\x00\x00\x00\x00\x00\x80?\x00@@@\x80@\xa0@"
    ),
    "state.json": b'{"seed":1}',
}


def some_groups(seed: int = 0) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "model": {
            "embed": torch.randn(17, 8, generator=generator).bfloat16(),
            "layers.0.norm": torch.ones(8, dtype=torch.bfloat16),
        },
        "optimizer": {
            "master": torch.randn(200, generator=generator),
            "count": torch.tensor(7, dtype=torch.int64),
            "mask": torch.tensor([True, False, True]),
            "empty": torch.empty(0, 4),
        },
    }


def assert_equal(found: dict[str, dict[str, Tensor]], expected: dict[str, dict[str, Tensor]]) -> None:
    assert found.keys() == expected.keys()
    for group, tensors in expected.items():
        assert found[group].keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert found[group][name].dtype == tensor.dtype
            assert torch.equal(found[group][name], tensor), name


def flip(path: Path, byte: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 1 << bit
    path.write_bytes(data)


@pytest.fixture
def saved(tmp_path: Path) -> Checkpoint:
    return save(tmp_path, 7, some_groups(), STATE, keep=Retention(2))


def test_load_returns_what_was_saved(saved: Checkpoint) -> None:
    groups, state = load(saved)
    assert_equal(groups, some_groups())
    assert state == STATE


def test_loaded_tensors_can_be_trained_on(saved: Checkpoint) -> None:
    groups, _ = load(saved)
    groups["optimizer"]["master"].mul_(2)
    assert torch.equal(groups["optimizer"]["master"], some_groups()["optimizer"]["master"] * 2)


def test_files_are_plain_safetensors(saved: Checkpoint) -> None:
    for group, tensors in some_groups().items():
        assert_equal({group: load_file(saved.folder / f"{group}.safetensors")}, {group: tensors})


def test_views_of_a_flat_buffer_and_strided_tensors_are_saved_by_value(tmp_path: Path) -> None:
    flat = torch.arange(12, dtype=torch.float32)
    groups = {"model": {"a": flat[:4].view(2, 2), "b": flat[4:].view(2, 4).T}}
    assert_equal(load(save(tmp_path, 1, groups, {}, keep=Retention(1))).groups, groups)


def test_equal_content_gives_equal_folder_and_digest(tmp_path: Path, saved: Checkpoint) -> None:
    again = save(tmp_path / "elsewhere", 7, some_groups(), STATE, keep=Retention(2))
    assert (again.folder.name, again.digest) == (saved.folder.name, saved.digest)
    assert save(tmp_path, 7, some_groups(), STATE, keep=Retention(2)) == saved
    other = save(tmp_path / "elsewhere", 7, some_groups(seed=1), STATE, keep=Retention(2))
    assert other.digest != saved.digest


def test_state_that_is_not_json_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        save(tmp_path / "new", 1, some_groups(), {"loss": float("nan")}, keep=Retention(1))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["embed", "layers.0.norm"])
def test_a_flipped_bit_names_file_and_tensor(saved: Checkpoint, name: str) -> None:
    place = saved.manifest.groups["model"][name].pieces[0]
    flip(saved.folder / "model.safetensors", place.start + place.bytes - 1, bit=6)
    with pytest.raises(IntegrityError, match=rf"model\.safetensors .* in tensor {name}\.\n"):
        load(saved)


def test_a_flipped_bit_in_the_header_names_the_file(saved: Checkpoint) -> None:
    flip(saved.folder / "optimizer.safetensors", 0)
    with pytest.raises(IntegrityError, match=r"optimizer\.safetensors does not match .* in its header"):
        load(saved)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", MANIFEST])
def test_a_missing_file_is_named(saved: Checkpoint, name: str) -> None:
    (saved.folder / name).unlink()
    with pytest.raises(IntegrityError, match=name):
        load(saved)
    assert latest(saved.folder.parent) is None


def test_a_truncated_and_an_added_file_are_refused(saved: Checkpoint) -> None:
    path = saved.folder / "extra.safetensors"
    path.write_bytes(b"")
    with pytest.raises(IntegrityError, match=r"extra\.safetensors is not in the manifest"):
        load(saved)
    path.unlink()
    path = saved.folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(IntegrityError, match=r"model\.safetensors has .* bytes instead of"):
        verify(saved)


def test_every_byte_of_the_manifest_counts(saved: Checkpoint) -> None:
    """Also a change that JSON does not see: more space, another order of keys, a whole other manifest."""
    raw = (saved.folder / MANIFEST).read_bytes()
    name = saved.folder.name
    values = json.loads(raw)
    for changed in (raw + b"\n", json.dumps(values).encode(), raw.replace(b" ", b"  ", 1)):
        with pytest.raises(IntegrityError):
            parse(changed, name)
    other = render(replace(saved.manifest, step=8)).encode()
    with pytest.raises(IntegrityError, match="name of its folder"):
        parse(other, name)
    with pytest.raises(IntegrityError):
        parse(b"\xff\x00", name)
    with pytest.raises(IntegrityError):
        parse(b"[]", name)


def test_an_unknown_format_is_refused_and_never_skipped(saved: Checkpoint) -> None:
    """A checkpoint of a newer Lapis is no damage: going on from an older one would lose work."""
    values = json.loads((saved.folder / MANIFEST).read_text())
    values["format"] = FORMAT + 1
    del values["digest"]
    values["digest"] = digest_json(values)
    (saved.folder / MANIFEST).write_text(json.dumps(values))
    with pytest.raises(InputError, match=f"format {FORMAT + 1}"):
        load(saved)
    with pytest.raises(InputError):
        latest(saved.folder.parent)


def test_a_checkpoint_of_the_first_format_loads_and_proves_itself(tmp_path: Path) -> None:
    folder = tmp_path / "step-00000003-9bad946dba19"
    folder.mkdir()
    for name, text in FORMAT_1.items():
        (folder / name).write_bytes(text)
    expected = {"model": {"a": torch.arange(6).bfloat16().reshape(2, 3), "b": torch.tensor(7)}}
    old = latest(tmp_path)
    assert old is not None
    assert_equal(load(old).groups, expected)
    right = torch.zeros(2, 1, dtype=torch.bfloat16)
    load(old, {"model": {"a": Sharded((2, 3), (Part(Box((0, 2), (2, 1)), right),))}})
    assert right.tolist() == [[2], [5]]
    for name, data in FORMAT_1.items():
        for byte in range(0, len(data), 7):
            flip(folder / name, byte, bit=byte % 8)
            with pytest.raises(IntegrityError, match=name):
                load(read(folder))
            flip(folder / name, byte, bit=byte % 8)
    assert load(old).state == {"seed": 1}


@pytest.mark.parametrize(
    ("name", "wanted", "message"),
    [
        ("layers.9.norm", torch.zeros(8).bfloat16(), "no tensor layers.9.norm in model"),
        ("embed", torch.zeros(17, 9).bfloat16(), r"embed of model is BF16 \(17, 8\) .* not \(17, 9\)"),
        ("embed", torch.zeros(17, 8), r"embed of model is BF16 \(17, 8\) .* not F32 \(17, 8\)"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_before_anything_is_filled(
    saved: Checkpoint, name: str, wanted: Tensor, message: str
) -> None:
    right = torch.zeros(8, dtype=torch.bfloat16)
    with pytest.raises(InputError, match=message):
        load(saved, {"model": {"layers.0.norm": right, name: wanted}})
    assert not right.any()
    load(saved, {"model": {"layers.0.norm": right}})
    assert right.all()


def test_latest_skips_corrupt_ones_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = save(tmp_path, 1, some_groups(1), STATE, keep=Retention(3))
    second = save(tmp_path, 2, some_groups(2), STATE, keep=Retention(3))
    third = save(tmp_path, 3, some_groups(3), STATE, keep=Retention(3))
    assert latest(tmp_path) == third
    flip(third.folder / "state.json", 5)
    flip(second.folder / MANIFEST, 40)
    assert latest(tmp_path) == first
    assert "state.json" in caplog.text
    assert second.folder.name in caplog.text
    good, bad = listing(tmp_path)
    assert [checkpoint.step for checkpoint in good] == [
        1,
        3,
    ]  # its manifest is whole: only verify sees the rest
    assert len(bad) == 1


def test_latest_of_nothing_is_none(tmp_path: Path) -> None:
    assert latest(tmp_path / "absent") is None
    (tmp_path / "step-latest").mkdir()
    assert latest(tmp_path) is None


def test_the_newest_are_kept_and_the_rest_goes(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step, some_groups(step), STATE, keep=Retention(2))
    assert [checkpoint.step for checkpoint in listing(tmp_path)[0]] == [3, 4]


def test_after_going_back_the_newest_save_is_the_latest(tmp_path: Path) -> None:
    """A run resumed from step 1 because 2 was corrupt: the damaged future must not come back."""
    save(tmp_path, 1, some_groups(1), STATE, keep=Retention(5))
    abandoned = save(tmp_path, 3, some_groups(3), STATE, keep=Retention(5))
    again = save(tmp_path, 2, some_groups(2), STATE, keep=Retention(5))
    assert latest(tmp_path) == again
    assert not abandoned.folder.exists()


def test_saving_over_a_damaged_equal_repairs_it(tmp_path: Path, saved: Checkpoint) -> None:
    flip(saved.folder / "model.safetensors", 3000 % saved.manifest.files["model.safetensors"].bytes)
    assert latest(tmp_path) is None
    assert save(tmp_path, 7, some_groups(), STATE, keep=Retention(2)) == saved
    assert_equal(load(saved).groups, some_groups())


def test_leftovers_of_killed_saves_are_cleared(tmp_path: Path, saved: Checkpoint) -> None:
    for name in (".saving-abc", ".removing-abc"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"half")
    assert latest(tmp_path) == saved
    new = save(tmp_path, 8, some_groups(8), STATE, keep=Retention(2))
    assert {path.name for path in tmp_path.iterdir()} == {".lock", saved.folder.name, new.folder.name}


def test_two_processes_cannot_save_into_one_folder(tmp_path: Path) -> None:
    tmp_path.joinpath("run").mkdir()
    with lock(tmp_path / "run" / ".lock", "this run"), pytest.raises(ConflictError):
        save(tmp_path / "run", 1, some_groups(), STATE, keep=Retention(1))


def test_a_full_disk_is_a_storage_error_and_the_old_one_stays(tmp_path: Path) -> None:
    old = save(tmp_path, 1, some_groups(), STATE, keep=Retention(1))
    large = {"model": {"w": torch.zeros(1 << 18)}}
    with _files_no_larger_than(100_000), pytest.raises(StorageError, match="No space left") as caught:
        save(tmp_path, 2, large, STATE, keep=Retention(1))
    assert "Free some space" in caught.value.hint
    assert latest(tmp_path) == old
    assert {path.name for path in tmp_path.iterdir()} == {".lock", old.folder.name}


def test_bytes_that_come_back_wrong_are_never_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that lies: what is read back after the flush differs from what was written."""
    old = save(tmp_path, 1, some_groups(), STATE, keep=Retention(1))
    with monkeypatch.context() as lying:
        lying.setattr("lapis.checkpoint.folder._digest", lambda *_: "0" * 64)
        with pytest.raises(IntegrityError, match=r"came back from the disk with other bytes.* in tensor \w+"):
            save(tmp_path, 2, some_groups(), STATE, keep=Retention(1))
    assert latest(tmp_path) == old


def test_manifest_and_folder_need_no_torch() -> None:
    code = "import sys, lapis.checkpoint.folder, lapis.train.run; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_copied_checkpoint_loads_under_its_name(tmp_path: Path, saved: Checkpoint) -> None:
    copy = tmp_path / "copy" / saved.folder.name
    shutil.copytree(saved.folder, copy)
    found = latest(copy.parent)
    assert found is not None
    assert found.digest == saved.digest
    assert folder_name(found.manifest) == copy.name


@contextmanager
def _files_no_larger_than(size: int) -> Iterator[Any]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_who_reads_beside_a_training_gets_the_newest_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between looking and reading, a newer checkpoint is committed and the one that was found is removed."""
    save(tmp_path, 1, some_groups(), {}, Retention(1))
    left = [2, 3]

    def meanwhile(checkpoint: Checkpoint) -> None:
        if left:
            save(tmp_path, left.pop(0), some_groups(), {}, Retention(1))
        verify(checkpoint)

    monkeypatch.setattr("lapis.checkpoint.folder.verify", meanwhile)
    found = latest(tmp_path)
    assert found is not None
    assert found.step == 3
