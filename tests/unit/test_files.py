"""The store of files: complete or not there, seen by their project only, swept when their writer died."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy.engine import Engine

from lapis.db import open_database, write
from lapis.errors import InputError, LimitError, NotFoundError
from lapis.gateway.files import ABANDONED_SECONDS, FileStore, checked_name
from lapis.hashing import digest_file
from lapis.home import Home
from lapis.tables.tenants import projects
from lapis.tenants.keys import LOCAL


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def db(home: Home) -> Iterator[Engine]:
    engine = open_database(home.database_url)
    with write(engine) as connection:
        row = {"id": "proj_2", "organization_id": "default", "name": "second", "created_at": 0.0}
        connection.execute(projects.insert().values(**row))
    yield engine
    engine.dispose()


@pytest.fixture
def store(home: Home, db: Engine) -> FileStore:
    return FileStore(home.files, db, Clock())


def on_disk(store: FileStore) -> list[str]:
    return sorted(path.name for path in store.folder.rglob("*") if path.is_file())


def test_a_file_is_what_was_written_and_has_its_digest(store: FileStore, tmp_path: Path) -> None:
    made = store.create(LOCAL, "a.jsonl", "user_data", [b"one ", b"two"])
    assert store.get("default", made.id) == made
    assert (made.bytes, made.filename, made.purpose, made.key_id) == (7, "a.jsonl", "user_data", None)
    with store.open("default", made.id) as file:
        assert file.read() == b"one two"
    assert digest_file(store.path("default", made.id)) == made.digest
    (tmp_path / "result").write_bytes(b"x" * (3 << 20))
    result = store.put("default", "out.jsonl", "batch_output", tmp_path / "result")
    assert store.path("default", result.id).read_bytes() == b"x" * (3 << 20)


def test_another_project_learns_nothing_of_a_file(store: FileStore) -> None:
    made = store.create(LOCAL, "a.txt", "user_data", [b"secret"])
    said = set()
    for id in (made.id, "file-000000000000000000000000", "../default/" + made.id):
        for act in (store.get, store.open, store.path, store.delete):
            with pytest.raises(NotFoundError) as caught:
                act("proj_2", id)
            said.add(str(caught.value).replace(id, "ID"))
    assert len(said) == 1
    assert store.list("proj_2") == ([], False)
    with pytest.raises(InputError, match="go on after"):
        store.list("proj_2", after=made.id)
    assert store.get("default", made.id) == made


def test_lists_are_walked_by_purpose_and_order(store: FileStore) -> None:
    made = [
        store.create(LOCAL, f"{n}.jsonl", "batch" if n % 2 else "evals", [b"{}"]).id for n in range(7)
    ]  # all in the same second
    walked: list[str] = []
    more, after = True, None
    while more:
        found, more = store.list("default", after=after, limit=3, order="asc")
        walked += [file.id for file in found]
        after = walked[-1]
    assert sorted(walked) == sorted(made)
    odd, more = store.list("default", purpose="batch")
    assert {file.id for file in odd} == {made[1], made[3], made[5]}
    assert not more


def test_a_file_is_gone_when_its_time_is_over(store: FileStore) -> None:
    made = store.create(LOCAL, "a.txt", "user_data", [b"x"], expires_at=1010.0)
    kept = store.create(LOCAL, "b.txt", "user_data", [b"x"])
    store.clock.now = 1010.0  # type: ignore[attr-defined]
    with pytest.raises(NotFoundError):
        store.get("default", made.id)
    assert [file.id for file in store.list("default")[0]] == [kept.id]
    assert store.used("default") == 1
    assert (store.expire(), store.expire()) == (1, 0)
    assert on_disk(store) == [kept.id]


def test_what_fails_leaves_nothing(store: FileStore) -> None:
    def broken() -> Iterator[bytes]:
        yield b"half"
        raise ConnectionError

    with pytest.raises(ConnectionError):
        store.create(LOCAL, "a.txt", "user_data", broken())
    with pytest.raises(InputError):
        store.create(LOCAL, "..", "user_data", [b"whole"])
    assert on_disk(store) == []
    assert store.list("default") == ([], False)


def test_a_project_stores_no_more_than_its_limit(store: FileStore) -> None:
    store.storage_limit = {"default": 10, "proj_2": None}.get
    first = store.create(LOCAL, "a", "user_data", [b"123456"])
    with pytest.raises(LimitError, match="6 of 10 bytes") as caught:
        store.create(LOCAL, "b", "user_data", [b"12345"])
    assert caught.value.retry_after is None
    assert on_disk(store) == [first.id]
    store.create(LOCAL, "b", "user_data", [b"1234"])
    with pytest.raises(LimitError):
        store.receive("default")  # full: not one byte is read
    store.put("default", "result", "batch_output", b"made already")
    store.delete("default", first.id)
    store.receive("proj_2").__exit__()


def test_what_a_killed_writer_left_is_swept_and_nothing_else(store: FileStore, home: Home) -> None:
    kept = store.create(LOCAL, "a.txt", "user_data", [b"x"])
    code = f"""
import os
from pathlib import Path
from lapis.gateway.files import Incoming
part = Incoming(Path({str(store.folder / "default")!r}))
part.write(b"half"); part._file.flush()
placed = Incoming(Path({str(store.folder / "default")!r}))
placed.write(b"whole"); placed.place()
os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    (store.folder / "stray").write_text("of somebody else")
    (store.folder / "default" / "folder").mkdir()
    os.utime(store.folder / "default" / "folder", (0, 0))
    assert len(on_disk(store)) == 4
    assert [file.id for file in store.list("default")[0]] == [kept.id]
    times = [path.stat().st_mtime for path in store.folder.rglob("*") if path.is_file()]
    store.clock.now = max(times) + 1  # type: ignore[attr-defined]
    assert store.sweep() == 0  # their writers may still live
    store.clock.now = max(times) + ABANDONED_SECONDS + 1  # type: ignore[attr-defined]
    assert store.sweep() == 2
    assert on_disk(store) == [kept.id, "stray"]


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        ("../../etc/passwd", "passwd"),
        ("C:\\data\\a b.jsonl", "a b.jsonl"),
        ("größe 数据.jsonl", "größe 数据.jsonl"),
        ("/", None),
        ("../..", None),
        ("", None),
        ("a\0.jsonl", None),
        ("a\r\nset-cookie: x", None),
        ("a\u202etxt.exe", None),
        ("x" * 256, None),
    ],
)
def test_a_files_name_is_a_label_and_never_a_path(sent: str, kept: str | None) -> None:
    if kept is None:
        with pytest.raises(InputError) as caught:
            checked_name(sent)
        assert caught.value.param == "file"
        assert str(caught.value).isprintable()
    else:
        assert checked_name(sent) == kept


def test_files_are_for_their_owner_only(store: FileStore) -> None:
    store.create(LOCAL, "a.txt", "user_data", [b"x"])
    assert os.stat(store.folder).st_mode & 0o077 == 0
