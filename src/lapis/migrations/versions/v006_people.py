"""Users, service accounts, invitations, admin keys; keys that are somebody's; whom an audit entry is about."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy import Column, Double, ForeignKey, Text

revision = "006"
down_revision = "005"


def upgrade() -> None:
    """Make the tables of schema 006."""
    op.add_column("projects", Column("archived_at", Double))
    for column in (
        Column("last_used_at", Double),
        Column("user_id", Text),
        Column("service_account_id", Text),
    ):
        op.add_column("api_keys", column)
    op.create_index("ix_api_keys_project_id", "api_keys", ["project_id"])
    _widen_scopes()
    _admin_keys()
    _people()
    _audit()


def _widen_scopes() -> None:
    """Keys that could do all that there was go on to do so: files, batches and training came later."""
    keys = sa.table("api_keys", sa.column("id"), sa.column("scopes"))
    connection = op.get_bind()
    for row in connection.execute(sa.select(keys)).all():
        had = row.scopes.split()
        if "models.use" in had:
            scopes = " ".join(sorted({*had, "work.read", "work.write"}))
            connection.execute(keys.update().where(keys.c.id == row.id).values(scopes=scopes))


def _admin_keys() -> None:
    op.create_table(
        "admin_keys",
        Column("id", Text),
        Column("organization_id", Text, ForeignKey("organizations.id"), nullable=False),
        Column("name", Text, nullable=False),
        Column("prefix", Text, nullable=False),
        Column("salt", Text, nullable=False),
        Column("digest", Text, nullable=False),
        Column("role", Text, nullable=False),
        Column("created_at", Double, nullable=False),
        Column("created_by", Text, nullable=False),
        Column("expires_at", Double),
        Column("revoked_at", Double),
        Column("last_used_at", Double),
        Column("user_id", Text),
        sa.PrimaryKeyConstraint("id", name="pk_admin_keys"),
        sa.UniqueConstraint("prefix", name="uq_admin_keys_prefix"),
    )
    op.create_index("ix_admin_keys_organization_id", "admin_keys", ["organization_id"])


def _people() -> None:
    op.create_table(
        "users",
        Column("id", Text),
        Column("organization_id", Text, ForeignKey("organizations.id"), nullable=False),
        Column("email", Text, nullable=False),
        Column("name", Text, nullable=False),
        Column("role", Text, nullable=False),
        Column("created_at", Double, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_users"),
        sa.UniqueConstraint("organization_id", "email", name="uq_users_organization_id_email"),
    )
    op.create_table(
        "project_users",
        Column("project_id", Text, ForeignKey("projects.id"), nullable=False),
        Column("user_id", Text, ForeignKey("users.id"), nullable=False),
        Column("role", Text, nullable=False),
        Column("added_at", Double, nullable=False),
        sa.PrimaryKeyConstraint("project_id", "user_id", name="pk_project_users"),
    )
    op.create_index("ix_project_users_user_id", "project_users", ["user_id"])
    op.create_table(
        "service_accounts",
        Column("id", Text),
        Column("project_id", Text, ForeignKey("projects.id"), nullable=False),
        Column("name", Text, nullable=False),
        Column("role", Text, nullable=False),
        Column("created_at", Double, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_service_accounts"),
    )
    op.create_index("ix_service_accounts_project_id", "service_accounts", ["project_id"])
    op.create_table(
        "invites",
        Column("id", Text),
        Column("organization_id", Text, ForeignKey("organizations.id"), nullable=False),
        Column("email", Text, nullable=False),
        Column("role", Text, nullable=False),
        Column("projects", Text, nullable=False),
        Column("created_at", Double, nullable=False),
        Column("expires_at", Double, nullable=False),
        Column("accepted_at", Double),
        sa.PrimaryKeyConstraint("id", name="pk_invites"),
    )
    op.create_index("ix_invites_organization_id_email", "invites", ["organization_id", "email"])


def _audit() -> None:
    """Columns to find entries by. They repeat what the facts say, so old entries keep their digests."""
    names = ("organization_id", "project_id")
    for name in names:
        op.add_column("audit_entries", Column(name, Text))
        op.create_index(f"ix_audit_entries_{name}", "audit_entries", [name, "sequence"])
    postgresql = op.get_bind().dialect.name == "postgresql"
    trigger = "ALTER TABLE audit_entries {} TRIGGER audit_entries_append_only"
    if postgresql:
        op.execute(trigger.format("DISABLE"))
    else:
        op.execute("DROP TRIGGER audit_entries_no_update")
    for name in names:
        value = f"facts::json->>'{name}'" if postgresql else f"json_extract(facts, '$.{name}')"
        op.execute(f"UPDATE audit_entries SET {name} = {value}")
    if postgresql:
        op.execute(trigger.format("ENABLE"))
    else:
        op.execute(
            "CREATE TRIGGER audit_entries_no_update BEFORE UPDATE ON audit_entries "
            "BEGIN SELECT RAISE(ABORT, 'audit_entries is append-only'); END"
        )
