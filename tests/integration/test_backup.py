"""Backup and restore: the same state again, in any database; damaged, killed and misdirected ones do no harm."""

from __future__ import annotations

import errno
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from click.testing import CliRunner

from lapis.audit import AuditLog
from lapis.backup import archive, dump
from lapis.backup.backup import make_backup
from lapis.backup.restore import restore_backup
from lapis.cli import backup as backup_cli
from lapis.cli import restore as restore_cli
from lapis.db import connect, open_database, snapshot
from lapis.errors import ConflictError, InputError, IntegrityError, LapisError
from lapis.gateway.files import FileStore
from lapis.gateway.sessions import Sessions
from lapis.home import Home
from lapis.tables.files import files as file_rows
from lapis.tenants.keys import LOCAL, ApiKeys
from lapis.tenants.quota import Quota
from lapis.tenants.tenant import Tenants
from lapis.tenants.usage import Usage, UsageLedger
from tests.postgres import Databases
from tests.unit.test_migrations import fill, make


@pytest.fixture
def full(home: Home) -> Home:
    """A home with something in every corner; its key's text lies beside it."""
    db = open_database(home.database_url)
    tenants = Tenants(db)
    project = tenants.create_project("wörter 言葉", "os:ana")
    tenants.set_quota(project.id, Quota(tokens_per_day=10**12), "os:ana")
    made, text = ApiKeys(db).create("laptop", "os:ana", project=project.id)
    Sessions(db).open(key_id=made.id)
    ledger = UsageLedger(db)
    for tokens in range(1, 30):
        ledger.settle(ledger.reserve(LOCAL, "tiny", tokens), Usage(tokens, 1))
    ledger.reserve(LOCAL, "tiny", 7)
    files = FileStore(home.files, db)
    files.put("default", "chat.jsonl", "fine-tune", b'{"a": 1}\n')
    files.put("default", "large.bin", "user_data", random.Random(1).randbytes(300_000))
    db.dispose()
    for folder in ("data/d1", "runs/r1", "models/tiny", "releases/a/1"):
        (home.root / folder).mkdir(parents=True)
        (home.root / folder / "part.bin").write_bytes(folder.encode() * 1000)
    (home.root / "server.toml").write_text("[console]\nidle_minutes = 5.0\n")
    (home.root / "runs/r1/.half.part").write_text("torn")
    (home.root.parent / "key").write_text(text)
    return home


@pytest.fixture
def empty(tmp_path: Path) -> Home:
    return Home(tmp_path / "empty")


def state(home: Home) -> dict[str, Any]:
    """All rows and all files, but for what backup and restore say of themselves in the audit log."""
    found: dict[str, Any] = {}
    db = connect(home.database_url)
    with snapshot(db) as connection:
        for table in dump.tables(connection):
            if table.name not in ("audit_entries", "audit_head"):
                found[table.name] = b"".join(dump.dump(connection, table)).decode()
    found["audit"] = [entry for entry in AuditLog(db).export() if not entry["action"].startswith("state.")]
    AuditLog(db).verify()
    db.dispose()
    for path in sorted(home.root.rglob("*")):
        name = path.relative_to(home.root).as_posix()
        if (
            path.is_file()
            and not name.startswith(("lapis.db", ".backup"))
            and not name.endswith((".lock", ".part"))
        ):
            found[name] = path.read_bytes()
    return found


def projects(home: Home) -> list[str]:
    """The names of the projects, in a database whose audit log is whole."""
    db = open_database(home.database_url)
    AuditLog(db).verify()
    names = [project.name for project in Tenants(db).projects()]
    db.dispose()
    return names


def use(monkeypatch: pytest.MonkeyPatch, home: Home) -> None:
    """The command line works on this home."""
    monkeypatch.delenv("LAPIS_DATABASE_URL", raising=False)
    url = home.database_url
    monkeypatch.setenv("LAPIS_HOME", str(home.root))
    monkeypatch.setenv("LAPIS_DATABASE_URL", url)


def test_a_restored_home_is_the_one_that_was_backed_up(full: Home, empty: Home, tmp_path: Path) -> None:
    made = make_backup(full, tmp_path / "b.lapis")
    assert made.rows["usage_entries"] > 80
    assert not (full.root / ".backup").exists()
    restore_backup(empty, tmp_path / "b.lapis")
    assert state(empty) == state(full)
    assert not (empty.root / ".restore").exists()
    assert not (empty.root / "runs/r1/.half.part").exists()
    db = open_database(empty.database_url)
    assert ApiKeys(db).verify((tmp_path / "key").read_text()).project_id.startswith("proj_")
    ledger = UsageLedger(db)
    ledger.settle(ledger.reserve(LOCAL, "tiny", 5), Usage(5, 0))  # keys count on
    assert ledger.balance().balanced
    acts = [entry.action for entry in AuditLog(db).newest(1)]
    assert acts == ["state.restore"]
    with db.connect() as connection:
        assert connection.execute(sa.text("SELECT count(*) FROM sessions")).scalar() == 0
    db.dispose()


@pytest.mark.sqlite
@pytest.mark.parametrize("place", ["state.db", "deep/er/state.db"])
def test_a_database_of_any_name_in_the_home_is_kept_by_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    home = Home(tmp_path / "home")
    database = home.root / place
    monkeypatch.setenv("LAPIS_DATABASE_URL", f"sqlite:///{database}")
    beside = database.with_name("beside")
    db = open_database(home.database_url)
    Tenants(db).create_project("one", "os:ana")
    beside.write_text("one")
    (home.root / "lapis.db").write_text("of another time")
    assert database.with_name("state.db-wal").exists()
    made = make_backup(home, tmp_path / "b.lapis")
    names = {member.name for member in made.members if member.name.startswith("home/")}
    assert names == {f"home/{beside.relative_to(home.root)}"}
    Tenants(db).create_project("two", "os:ana")
    db.dispose()
    beside.write_text("two")
    beside.with_name("later").write_text("two")
    restore_backup(home, tmp_path / "b.lapis", force=True)
    assert projects(home) == ["default", "one"]
    assert beside.read_text() == "one"
    assert not beside.with_name("later").exists()
    elsewhere = Home(tmp_path / "elsewhere")
    monkeypatch.setenv("LAPIS_DATABASE_URL", f"sqlite:///{elsewhere.root / place}")
    restore_backup(elsewhere, tmp_path / "b.lapis")
    assert projects(elsewhere) == ["default", "one"]
    assert (elsewhere.root / beside.relative_to(home.root)).read_text() == "one"


@pytest.mark.sqlite
def test_a_copy_of_a_database_file_in_a_backup_does_not_replace_the_rows(
    full: Home, empty: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (full.root / "state.db").write_text("a file among others here")
    make_backup(full, tmp_path / "b.lapis")
    before = projects(full)
    monkeypatch.setenv("LAPIS_DATABASE_URL", f"sqlite:///{empty.root / 'state.db'}")
    restore_backup(empty, tmp_path / "b.lapis")
    assert projects(empty) == before


def test_a_file_that_is_cut_while_it_is_read_does_not_end_the_backup(
    full: Home, empty: Home, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cut = full.root / "runs/r1/part.bin"
    cut.write_bytes(b"x" * 1_000_000)
    original = archive.Writer._add

    def slow(self: archive.Writer, info: tarfile.TarInfo, source: Any) -> None:
        if info.name.endswith("runs/r1/part.bin"):
            os.truncate(cut, 3)  # after its size was written
        original(self, info, source)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(archive.Writer, "_add", slow)
        make_backup(full, tmp_path / "b.lapis")
    assert "part.bin was cut" in caplog.text
    restore_backup(empty, tmp_path / "b.lapis")
    kept = (empty.root / "runs/r1/part.bin").read_bytes()
    assert kept == b"xxx" + bytes(999_997)


@pytest.mark.parametrize("gone", [True, False])
def test_on_a_disk_without_links_files_are_copied_but_for_those_that_go(
    full: Home, empty: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gone: bool
) -> None:
    victim = full.root / "models/tiny/part.bin"

    def link(source: Path, target: Path, **_: Any) -> None:
        if gone and source == victim:
            victim.unlink()
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", link)
    make_backup(full, tmp_path / "b.lapis")
    restore_backup(empty, tmp_path / "b.lapis")
    assert (empty.root / "data/d1/part.bin").read_bytes() == b"data/d1" * 1000
    assert (empty.root / "models/tiny/part.bin").exists() is not gone


def test_any_tar_program_lists_and_unpacks_it(full: Home, tmp_path: Path) -> None:
    make_backup(full, tmp_path / "b.lapis")
    done = subprocess.run(["tar", "-tf", tmp_path / "b.lapis"], capture_output=True, text=True, check=True)
    assert "home/server.toml" in done.stdout.splitlines()
    assert done.stdout.splitlines()[-1] == "manifest.json"


def test_sqlite_into_postgresql_and_back(
    full: Home, empty: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, databases: Databases | None
) -> None:
    if databases is None:
        pytest.skip("make test-postgres runs it")
    before = state(full)
    make_backup(full, tmp_path / "postgres.lapis")
    monkeypatch.setenv("LAPIS_DATABASE_URL", f"sqlite:///{tmp_path / 'other.db'}")
    restore_backup(empty, tmp_path / "postgres.lapis")
    assert state(empty) == before
    make_backup(empty, tmp_path / "sqlite.lapis")
    monkeypatch.setenv("LAPIS_DATABASE_URL", databases.of(Home(tmp_path / "third")))
    third = Home(tmp_path / "third")
    restore_backup(third, tmp_path / "sqlite.lapis")
    assert state(third) == before
    db = open_database(third.database_url)
    UsageLedger(db).reserve(LOCAL, "tiny", 5)  # its counting key goes on
    db.dispose()


def test_large_things_that_can_be_made_again_may_be_left_out(
    full: Home, empty: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = CliRunner().invoke
    use(monkeypatch, full)
    arguments = [str(tmp_path / "b.lapis"), "--without", "data", "--without", "runs", "--json"]
    made = run(backup_cli.command, arguments)
    assert made.exit_code == 0, made.output
    assert json.loads(made.stdout)["left_out"] == ["data", "runs"]
    use(monkeypatch, empty)
    done = run(restore_cli.command, [str(tmp_path / "b.lapis")])
    assert done.exit_code == 0, done.output
    names = {path.name for path in empty.root.iterdir() if path.is_dir()}
    assert names == {"files", "models", "releases"}


def test_what_is_there_is_replaced_only_by_force(full: Home, empty: Home, tmp_path: Path) -> None:
    make_backup(full, tmp_path / "b.lapis", ("data",))
    db = open_database(empty.database_url)
    ApiKeys(db).create("other", "os:bo")
    db.dispose()
    with pytest.raises(ConflictError, match="database is not empty"):
        restore_backup(empty, tmp_path / "b.lapis")
    for name in ("data", "jobs"):
        (empty.root / name).mkdir(parents=True, exist_ok=True)
        (empty.root / name / "old").write_text("old")
    with pytest.raises(ConflictError, match="not empty: it has"):
        restore_backup(empty, tmp_path / "b.lapis")
    assert (empty.root / "jobs" / "old").exists()
    restore_backup(empty, tmp_path / "b.lapis", force=True)
    assert not (empty.root / "jobs").exists()
    assert (empty.root / "data" / "old").exists()  # left out of the backup
    restored, source = state(empty), state(full)
    assert restored.pop("data/old") == b"old"
    assert restored == {name: value for name, value in source.items() if not name.startswith("data/")}


def test_a_damaged_backup_changes_nothing(full: Home, empty: Home, tmp_path: Path) -> None:
    path = tmp_path / "b.lapis"
    make_backup(full, path)
    good, chance = path.read_bytes(), random.Random(7)
    places = [0, 300, len(good) // 2, len(good) - 80, len(good) - 1]
    places += [chance.randrange(len(good)) for _ in range(40)]
    for place in places:
        bad = bytearray(good)
        bad[place] ^= 1 << chance.randrange(8)
        path.write_bytes(bad)
        with pytest.raises(IntegrityError, match="Nothing was changed"):
            restore_backup(empty, path)
    for length in (0, 50, 1000, len(good) - 1):
        path.write_bytes(good[:length])
        with pytest.raises(IntegrityError):
            restore_backup(empty, path)
    path.write_bytes(good + b"x")
    with pytest.raises(IntegrityError):
        restore_backup(empty, path)
    assert not empty.root.exists()
    with pytest.raises(InputError, match="cannot be read"):
        restore_backup(empty, tmp_path / "nothing")


def test_a_backup_that_names_places_outside_is_refused(empty: Home, tmp_path: Path) -> None:
    for name in ("home/../../evil", "/home/evil", "other/evil", "home"):
        path = tmp_path / "evil.lapis"
        with path.open("wb") as file:
            writer = archive.Writer(file)
            info = tarfile.TarInfo(name)
            info.size = 4
            writer._add(info, io.BytesIO(b"evil"))
            writer.finish("001", 0.0, (), {})
        with pytest.raises(IntegrityError, match="outside"):
            restore_backup(empty, path)
    assert not empty.root.exists()


def test_a_backup_in_the_home_that_it_would_replace_is_refused(full: Home) -> None:
    make_backup(full, full.root / "b.lapis")
    make_backup(full, full.root / "b.lapis")  # replaced, and not in itself
    assert all(member.name != "home/b.lapis" for member in archive.verify(full.root / "b.lapis").members)
    with pytest.raises(InputError, match="Move it elsewhere"):
        restore_backup(full, full.root / "b.lapis", force=True)


def test_a_backup_of_an_older_lapis_goes_on_under_this_one(
    empty: Home, empty_database_url: str, tmp_path: Path
) -> None:
    make(empty_database_url, "001")
    db = connect(empty_database_url)
    with db.begin() as connection:
        texts = fill(connection)
    with (tmp_path / "old.lapis").open("wb") as file, snapshot(db) as connection:
        writer = archive.Writer(file)
        rows = {
            table.name: writer.add_lines(f"database/{table.name}.jsonl", dump.dump(connection, table)) - 1
            for table in dump.tables(connection)
        }
        writer.finish("001", 0.0, (), rows)
    db.dispose()
    restore_backup(empty, tmp_path / "old.lapis")
    db = open_database(empty.database_url)
    assert ApiKeys(db).verify(texts["full"]).project_id == "proj_1"
    assert AuditLog(db).verify().entries == 2
    assert UsageLedger(db).balance().used == 30
    db.dispose()


def test_a_newer_backup_is_refused(empty: Home, tmp_path: Path) -> None:
    with (tmp_path / "new.lapis").open("wb") as file:
        archive.Writer(file).finish("999", 0.0, (), {})
    with pytest.raises(ConflictError, match="999"):
        restore_backup(empty, tmp_path / "new.lapis")
    assert not empty.root.exists()


def test_while_others_write_it_is_one_moment_with_all_its_files(
    full: Home, empty: Home, tmp_path: Path
) -> None:
    db, stop = open_database(full.database_url), threading.Event()
    files, audit = FileStore(full.files, db), AuditLog(db)

    def write() -> None:
        kept: list[str] = []
        while not stop.is_set():
            kept.append(files.put("default", "f", "user_data", b"x" * 100).id)
            audit.append("os:ana", "test.write", kept[-1])
            if len(kept) > 3:
                files.delete("default", kept.pop(0))

    thread = threading.Thread(target=write)
    thread.start()
    try:
        for number in range(2):
            make_backup(full, tmp_path / f"{number}.lapis")
    finally:
        stop.set()
        thread.join()
    db.dispose()
    for number in range(2):
        restore_backup(empty, tmp_path / f"{number}.lapis", force=True)
        restored = open_database(empty.database_url)
        AuditLog(restored).verify()
        with restored.connect() as connection:
            rows = connection.execute(sa.select(file_rows.c.project_id, file_rows.c.id)).all()
        assert len(rows) >= 2
        for row in rows:
            assert (empty.files / row.project_id / row.id).is_file()
        restored.dispose()


def started(home: Home, code: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "LAPIS_HOME": str(home.root), "LAPIS_DATABASE_URL": home.database_url}
    head = "import sys\nfrom pathlib import Path\nfrom lapis.home import Home\nhome = Home.default()\n"
    # The child says where it is, and waits there to be killed.
    return subprocess.Popen([sys.executable, "-c", head + code], env=environment, stdout=subprocess.PIPE)


def kill_at_its_word(process: subprocess.Popen[bytes]) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == b"here\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()


STOP = "lambda *_: (print('here', flush=True), sys.stdin.read(), __import__('time').sleep(60))"


def test_a_killed_backup_leaves_no_half_file(full: Home, empty: Home, tmp_path: Path) -> None:
    path = tmp_path / "backups" / "b.lapis"
    code = f"from lapis.backup.backup import make_backup\nmake_backup(home, Path({str(path)!r}), progress={STOP})"
    kill_at_its_word(started(full, code))
    assert not path.exists()
    make_backup(full, path)
    assert [entry.name for entry in path.parent.iterdir()] == ["b.lapis"]
    good = path.read_bytes()
    kill_at_its_word(started(full, code))
    assert path.read_bytes() == good
    restore_backup(empty, path)
    assert state(empty) == state(full)


@pytest.mark.parametrize(
    "where",
    [
        pytest.param(f"restore._unpack = {STOP}", marks=pytest.mark.long),
        pytest.param(f"restore._load = {STOP}", marks=pytest.mark.long),
        f"restore.upgrade = {STOP}",
        pytest.param(f"restore._move = {STOP}", marks=pytest.mark.long),
        pytest.param(f"restore.migrate = {STOP}", marks=pytest.mark.long),
        f"restore.os.rename = {STOP}",
        f"restore.AuditLog = {STOP}",
    ],
)
def test_a_killed_restore_is_finished_by_the_next_one(
    full: Home, empty: Home, tmp_path: Path, where: str
) -> None:
    path = tmp_path / "b.lapis"
    make_backup(full, path)
    code = f"from lapis.backup import restore\n{where}\nrestore.restore_backup(home, Path({str(path)!r}))"
    kill_at_its_word(started(empty, code))
    if "AuditLog" in where:  # all was done but for its entry
        assert state(empty) == state(full)
        return
    restore_backup(empty, path)
    assert state(empty) == state(full)


@pytest.mark.long
def test_a_backup_replaces_a_backup_and_no_other_file(full: Home, tmp_path: Path) -> None:
    thesis = tmp_path / "thesis.tex"
    thesis.write_text("years of work")
    with pytest.raises(ConflictError, match="thesis.tex is there and no backup"):
        make_backup(full, thesis)
    assert thesis.read_text() == "years of work"
    for _ in range(2):
        make_backup(full, tmp_path / "b.lapis")
    assert archive.verify(tmp_path / "b.lapis").members


def test_two_backups_at_once_are_refused(full: Home, tmp_path: Path) -> None:
    code = "from lapis.backup.backup import make_backup\n" + (
        f"make_backup(home, Path({str(tmp_path / 'a.lapis')!r}), progress={STOP})"
    )
    process = started(full, code)
    assert process.stdout is not None
    assert process.stdout.readline() == b"here\n"
    with pytest.raises(LapisError, match="is in use by process"):
        make_backup(full, tmp_path / "b.lapis")
    process.kill()
    process.communicate()
    shutil.rmtree(full.root / ".backup")
