"""Who is signed in to the console, and who is about to."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy import Column, Double, ForeignKey, Text

from lapis.tables.schema import metadata

sessions = sa.Table(
    "sessions",
    metadata,
    Column("id", Text, primary_key=True),  # SHA-256 of the cookie's text, which is kept nowhere
    Column("key_id", Text, ForeignKey("api_keys.id")),  # what was shown: a key, or
    Column("user_id", Text),  # a user whom the provider named
    Column("project_id", Text),  # the one looked at; NULL: the key's, or the user's first
    Column("created_at", Double, nullable=False),
    Column("used_at", Double, nullable=False),
    Column("expires_at", Double, nullable=False),
    sa.Index("ix_sessions_expires_at", "expires_at"),
)

sign_ins = (
    sa.Table(  # sent to the provider and not back yet; removed when they come back, so each counts once
        "sign_ins",
        metadata,
        Column("state", Text, primary_key=True),  # SHA-256 of the state that the provider gives back
        Column("browser", Text, nullable=False),  # SHA-256 of the cookie of the browser that began
        Column("nonce", Text, nullable=False),
        Column("verifier", Text, nullable=False),  # PKCE
        Column("expires_at", Double, nullable=False),
        sa.Index("ix_sign_ins_expires_at", "expires_at"),
    )
)

subjects = sa.Table(  # which account of a provider is which user
    "subjects",
    metadata,
    Column("issuer", Text, primary_key=True),
    Column("subject", Text, primary_key=True),
    Column(
        "user_id", Text, nullable=False
    ),  # stays when the user is removed, who then does not come back unasked
    sa.Index("ix_subjects_user_id", "user_id"),
)
