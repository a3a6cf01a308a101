"""The first tables: audit, tenants, keys, usage, releases, jobs; a default organization and project."""

from __future__ import annotations

import time

import sqlalchemy as sa
from alembic import op
from sqlalchemy import BigInteger, Column, Double, ForeignKey, Integer, Text

revision = "001"
down_revision = None

GENESIS = "0" * 64  # what the first audit entry follows


def upgrade() -> None:
    """Make the tables of schema 001."""
    _audit()
    _tenants()
    _usage()
    _releases_and_jobs()
    for table in ("audit_entries", "usage_entries"):
        _append_only(table)


def _audit() -> None:
    op.create_table(
        "audit_entries",
        Column("sequence", Integer, autoincrement=False),
        Column("at", Double, nullable=False),
        Column("actor", Text, nullable=False),
        Column("action", Text, nullable=False),
        Column("target", Text, nullable=False),
        Column("facts", Text, nullable=False),
        Column("previous", Text, nullable=False),
        Column("digest", Text, nullable=False),
        sa.PrimaryKeyConstraint("sequence", name="pk_audit_entries"),
    )
    head = op.create_table(
        "audit_head",
        Column("id", Integer, autoincrement=False),
        Column("sequence", Integer, nullable=False),
        Column("digest", Text, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_audit_head"),
    )
    op.bulk_insert(head, [{"id": 1, "sequence": 0, "digest": GENESIS}])


def _tenants() -> None:
    organizations = op.create_table(
        "organizations",
        Column("id", Text),
        Column("name", Text, nullable=False),
        Column("created_at", Double, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_organizations"),
        sa.UniqueConstraint("name", name="uq_organizations_name"),
    )
    projects = op.create_table(
        "projects",
        Column("id", Text),
        Column("organization_id", Text, ForeignKey("organizations.id"), nullable=False),
        Column("name", Text, nullable=False),
        Column("created_at", Double, nullable=False),
        Column("requests_per_minute", Integer),
        Column("tokens_per_minute", BigInteger),
        Column("tokens_per_day", BigInteger),
        sa.PrimaryKeyConstraint("id", name="pk_projects"),
        sa.UniqueConstraint("organization_id", "name", name="uq_projects_organization_id_name"),
    )
    op.create_table(
        "api_keys",
        Column("id", Text),
        Column("project_id", Text, ForeignKey("projects.id"), nullable=False),
        Column("name", Text, nullable=False),
        Column("prefix", Text, nullable=False),
        Column("salt", Text, nullable=False),
        Column("digest", Text, nullable=False),
        Column("scopes", Text, nullable=False),
        Column("created_at", Double, nullable=False),
        Column("created_by", Text, nullable=False),
        Column("expires_at", Double),
        Column("revoked_at", Double),
        sa.PrimaryKeyConstraint("id", name="pk_api_keys"),
        sa.UniqueConstraint("prefix", name="uq_api_keys_prefix"),
    )
    now = time.time()
    op.bulk_insert(organizations, [{"id": "default", "name": "default", "created_at": now}])
    op.bulk_insert(
        projects, [{"id": "default", "organization_id": "default", "name": "default", "created_at": now}]
    )


def _usage() -> None:
    op.create_table(
        "usage_entries",
        Column("id", BigInteger().with_variant(Integer, "sqlite"), autoincrement=True),
        Column("reservation_id", Text, nullable=False),
        Column("kind", Text, nullable=False),
        Column("at", Double, nullable=False),
        Column("project_id", Text, ForeignKey("projects.id"), nullable=False),
        Column("key_id", Text),
        Column("model", Text, nullable=False),
        Column("tokens", Integer, nullable=False),
        Column("prompt_tokens", Integer, nullable=False),
        Column("completion_tokens", Integer, nullable=False),
        Column("cached_tokens", Integer, nullable=False),
        Column("reason", Text, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_usage_entries"),
        sa.UniqueConstraint("reservation_id", "kind", name="uq_usage_entries_reservation_id_kind"),
    )
    op.create_index("ix_usage_entries_project_id_at", "usage_entries", ["project_id", "at"])
    op.create_table(
        "open_reservations",
        Column("id", Text),
        Column("project_id", Text, ForeignKey("projects.id"), nullable=False),
        Column("key_id", Text),
        Column("model", Text, nullable=False),
        Column("tokens", Integer, nullable=False),
        Column("at", Double, nullable=False),
        Column("expires_at", Double, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_open_reservations"),
    )
    op.create_index(
        "ix_open_reservations_project_id_expires_at", "open_reservations", ["project_id", "expires_at"]
    )
    op.create_table(
        "usage_windows",
        Column("project_id", Text, ForeignKey("projects.id")),
        Column("seconds", Integer, autoincrement=False),
        Column("start", Integer, autoincrement=False),
        Column("requests", Integer, nullable=False),
        Column("tokens", BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("project_id", "seconds", "start", name="pk_usage_windows"),
    )


def _releases_and_jobs() -> None:
    op.create_table(
        "releases",
        Column("name", Text),
        Column("version", Integer, autoincrement=False),
        Column("state", Text, nullable=False),
        Column("digest", Text, nullable=False),
        Column("manifest_digest", Text, nullable=False),
        Column("run_id", Text),
        Column("report", Text),
        Column("lineage", Text, nullable=False),
        Column("created_at", Double, nullable=False),
        Column("created_by", Text, nullable=False),
        Column("approved_by", Text),
        Column("reason", Text, nullable=False),
        sa.PrimaryKeyConstraint("name", "version", name="pk_releases"),
    )
    op.create_table(
        "jobs",
        Column("id", Text),
        Column("project_id", Text, ForeignKey("projects.id"), nullable=False),
        Column("name", Text, nullable=False),
        Column("spec", Text, nullable=False),
        Column("state", Text, nullable=False),
        Column("reason", Text, nullable=False),
        Column("attempt", Integer, nullable=False),
        Column("losses", Integer, nullable=False),
        Column("executor", Text),
        Column("exit_code", Integer),
        Column("lease_token", Text),
        Column("lease_until", Double),
        Column("cancel_at", Double),
        Column("created_at", Double, nullable=False),
        Column("created_by", Text, nullable=False),
        Column("started_at", Double),
        Column("ended_at", Double),
        sa.PrimaryKeyConstraint("id", name="pk_jobs"),
    )
    op.create_index("ix_jobs_state_created_at", "jobs", ["state", "created_at"])


def _append_only(table: str) -> None:
    """Let the database itself refuse to change or remove what was written."""
    refusal = f"{table} is append-only"
    if op.get_bind().dialect.name == "postgresql":
        op.execute(
            f"CREATE FUNCTION {table}_refuse() RETURNS trigger LANGUAGE plpgsql AS "
            f"$$ BEGIN RAISE EXCEPTION '{refusal}'; END $$"
        )
        op.execute(
            f"CREATE TRIGGER {table}_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON {table} "
            f"FOR EACH STATEMENT EXECUTE FUNCTION {table}_refuse()"
        )
        return
    for act in ("UPDATE", "DELETE"):
        op.execute(
            f"CREATE TRIGGER {table}_no_{act.lower()} BEFORE {act} ON {table} "
            f"BEGIN SELECT RAISE(ABORT, '{refusal}'); END"
        )
