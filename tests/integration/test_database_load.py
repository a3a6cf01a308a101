"""Many writers at once, on the same few things: none is refused for another's sake, and all that is kept agrees."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import sqlalchemy as sa

from lapis.audit import AuditLog
from lapis.db import connect, open_database, retried, write
from lapis.errors import AuthError, ConflictError, LimitError, NotFoundError, UnavailableError
from lapis.gateway.files import FileStore
from lapis.gateway.metering import Meter
from lapis.gateway.sessions import Sessions
from lapis.home import Home
from lapis.tenants.invites import Invites
from lapis.tenants.keys import LOCAL, ApiKeys
from lapis.tenants.quota import Quota
from lapis.tenants.tenant import Role, Tenants
from lapis.tenants.usage import Usage, UsageLedger
from tests.postgres import Databases

WRITERS, ACTS = 8, 25
EXPECTED = (AuthError, ConflictError, LimitError, NotFoundError)  # somebody else was first


def test_administration_from_many_sides_at_once(home: Home) -> None:
    db = open_database(home.database_url)
    tenants, invites, keys, sessions = Tenants(db), Invites(db), ApiKeys(db), Sessions(db)
    users, ledger, files = invites.users, UsageLedger(db), FileStore(home.files, db)
    projects = [tenants.create_project(f"p{number}", "test").id for number in range(3)]

    def acts(chance: random.Random) -> list[Callable[[], object]]:
        project, email = chance.choice(projects), f"u{chance.randrange(4)}@example.org"
        known = users.find(email)
        user = known.id if known else "user-none"
        return [
            lambda: users.add(email, Role.READER, "test"),
            lambda: users.join(project, user, chance.choice([Role.OWNER, Role.MEMBER]), "test"),
            lambda: users.leave(project, user, "test"),
            lambda: users.remove(user, "test"),
            lambda: invites.create(email, Role.READER, "test", places={project: Role.MEMBER}),
            lambda: invites.accept(email),
            lambda: keys.revoke(keys.create("k", "test", project=project)[0].id, "test"),
            lambda: tenants.set_quota(project, Quota(tokens_per_day=chance.randrange(10**6)), "test"),
            lambda: sessions.open(key_id=keys.create("s", "test", project=project)[0].id),
            lambda: ledger.settle(ledger.reserve(LOCAL, "tiny", 5), Usage(2, 2)),
            lambda: files.delete(project, files.put(project, "f", "user_data", b"x").id),
        ]

    def work(number: int) -> None:
        chance = random.Random(number)
        for _ in range(ACTS):
            try:
                chance.choice(acts(chance))()
            except EXPECTED:
                continue

    with ThreadPoolExecutor(WRITERS) as pool:
        list(pool.map(work, range(WRITERS)))
    assert AuditLog(db).verify().entries > WRITERS * ACTS / 4
    assert ledger.balance().balanced
    assert ledger.balance().open == 0
    db.dispose()


def test_two_writers_that_meet_both_succeed_in_the_end(home: Home, databases: Databases | None) -> None:
    if databases is None:
        pytest.skip("SQLite has one writer at a time")
    db = open_database(home.database_url)
    tenants = Tenants(db)
    ids = [tenants.create_project(name, "test").id for name in ("a", "b")]
    first_locked, undone = threading.Barrier(2, timeout=30), []

    def work(mine: str, other: str, meet: list[bool]) -> None:
        try:
            with write(db, lock=mine) as connection:
                for id in (mine, other):
                    connection.execute(
                        sa.text("UPDATE projects SET created_at = created_at + 1 WHERE id = :id"), {"id": id}
                    )
                    if meet and meet.pop():
                        first_locked.wait()
        except UnavailableError:
            undone.append(mine)
            raise

    threads = [
        threading.Thread(target=retried, args=(work, mine, other, [True]))
        for mine, other in (ids, reversed(ids))
    ]
    before = [tenants.project(id).created_at for id in ids]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(undone) == 1
    assert [tenants.project(id).created_at for id in ids] == [at + 2 for at in before]
    db.dispose()


def test_what_was_used_is_settled_though_the_database_ended_the_connection(
    home: Home, databases: Databases | None
) -> None:
    if databases is None:
        pytest.skip("SQLite has no connection to lose")
    db = open_database(home.database_url)
    ledger = UsageLedger(db)
    meter = Meter(ledger)
    reservation = ledger.reserve(LOCAL, "tiny", 10)
    kept = connect(home.database_url)
    with kept.connect() as connection:
        connection.execute(
            sa.text(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
        )
    meter.settle(reservation, Usage(3, 4))
    meter.close()
    assert (ledger.balance().used, ledger.balance().open) == (7, 0)
    for engine in (kept, db):
        engine.dispose()
