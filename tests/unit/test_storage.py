"""Files that cannot be written: what is said, and of which file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from lapis.cli.main import lapis
from lapis.errors import StorageError
from lapis.storage import atomic_folder, lock, write_text

UNWRITABLE = Path("/proc/nothing")  # not even root makes a file there


def _lock(path: Path) -> None:
    with lock(path, "It"):
        pass


def _folder(path: Path) -> None:
    with atomic_folder(path):
        pass


@pytest.mark.parametrize(
    "make", [lambda path: write_text(path, "text"), _folder, _lock], ids=["file", "folder", "lock"]
)
def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, make: Callable[[Path], None]) -> None:
    (tmp_path / "file").write_text("a file where a folder should be")
    for place in (UNWRITABLE, UNWRITABLE / "below", tmp_path / "file" / "x", tmp_path / "file" / "y" / "x"):
        with pytest.raises(StorageError, match=f"^{place} cannot be written: "):
            make(place)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_file_that_a_writer_does_not_find_is_not_the_one_it_writes(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="source"), atomic_folder(tmp_path / "made"):
        (tmp_path / "source").read_bytes()


def test_a_lock_is_not_blamed_for_what_fails_under_it(tmp_path: Path) -> None:
    with pytest.raises(PermissionError, match="elsewhere"), lock(tmp_path / "lock", "It"):
        raise PermissionError(1, "Operation not permitted", "elsewhere")


def test_a_backup_names_the_file_that_it_cannot_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAPIS_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("LAPIS_DATABASE_URL", raising=False)
    (tmp_path / "file").write_text("")
    arguments = ["backup", str(tmp_path / "file" / "b")]
    with pytest.raises(StorageError) as caught:
        CliRunner().invoke(lapis, arguments, catch_exceptions=False, standalone_mode=False)
    assert str(caught.value) == f"{tmp_path}/file/b cannot be written: Not a directory."
